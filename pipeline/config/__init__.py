"""params.yaml as validated objects."""
