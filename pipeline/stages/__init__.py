"""One module for each stage of dvc.yaml, named as it is. A stage reads files, calls the packages below and writes files. What
two stages share, and what can be tested without files, belongs below.
"""
