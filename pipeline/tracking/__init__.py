"""MLflow as a view of a run's files. Nothing reads a number from it that a stage's output depends on."""
