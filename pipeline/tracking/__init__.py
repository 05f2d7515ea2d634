"""MLflow as a view of the files."""
