"""REINFORCE on language models: a reproducible experiment pipeline. One module per DVC stage."""

import sys
from importlib.util import find_spec

# DVC starts each stage as `python`: the first in PATH, which need not be ours. Whatever imports more would end in a traceback.
if sys.version_info < (3, 11) or find_spec("pydantic") is None:
    sys.exit(f"error: {sys.executable} is not the Python that the project is installed in: `source .venv/bin/activate`")
