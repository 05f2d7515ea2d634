"""One module for each stage of dvc.yaml. Thin: reads files, calls the packages below, writes files."""
