"""MLflow as a view of a run's files. No output of a stage depends on a number read from it."""
