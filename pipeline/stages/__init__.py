"""One module for each stage of dvc.yaml, of the same name. A stage reads files, calls the packages below and writes
files. What two stages share, or what can be tested without files, belongs in those packages.

Importing this package chooses the kernels of this process, which torch and numpy read when they are loaded."""

from pipeline.arithmetic.environment import choose_kernels

choose_kernels()
