"""Language models: loading, sampling, teacher-forced log-probabilities."""
