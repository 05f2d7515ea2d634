"""One module for each stage of dvc.yaml, of the same name. A stage reads files, calls the packages below and writes
files. What two stages share, or what can be tested without files, belongs in those packages."""
