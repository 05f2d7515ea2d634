"""Where what outlives one run is kept: resume states, locks and the tracking store."""

import os
from pathlib import Path


def root() -> Path:
    """The main workspace: $DVC_ROOT, which DVC sets for stages also inside --temp and --queue experiments, whose own
    folder is deleted afterwards; by hand, the current directory.
    """
    return Path(os.environ.get("DVC_ROOT") or ".").resolve()
