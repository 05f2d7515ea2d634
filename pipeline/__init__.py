"""REINFORCE on language models: a reproducible experiment pipeline. One module per DVC stage."""

import sys
from importlib.util import find_spec

# DVC starts stages with the first `python` in PATH. With another one than ours, imports would end in a traceback.
if sys.version_info < (3, 11) or find_spec("pydantic") is None:
    sys.exit(f"error: {sys.executable} is not the Python that the project is installed in: `source .venv/bin/activate`")
