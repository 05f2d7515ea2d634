"""REINFORCE on language models: a reproducible experiment pipeline. One module per DVC stage."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.runs.loaded_run import LoadedRun

# DVC starts stages with the first `python` in PATH. If that is another Python than this project's, imports would end in
# a traceback.
if sys.version_info < (3, 11) or find_spec("pydantic") is None:
    sys.exit(f"error: {sys.executable} is not the Python that the project is installed in: `source .venv/bin/activate`")


def load_run(path: "str | Path" = ".") -> "LoadedRun":
    """The run in a project's folder, for a notebook: `load_run().history` is a DataFrame, `load_run().plot()` a
    figure."""
    from pipeline.runs import loaded_run  # every stage imports this package: it must stay light

    return loaded_run.load_run(path)
