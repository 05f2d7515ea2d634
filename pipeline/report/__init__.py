"""Figures and the report page: pure functions from the files of a run to figures and HTML. No torch, no tracker.

matplotlib reads two environment variables when it is imported, and fails if they name a notebook's backend or a broken
matplotlibrc. Nothing is shown on a screen here and no style of the user's is used, so both are set before the import.
"""

import os

os.environ |= {"MPLBACKEND": "agg", "MATPLOTLIBRC": os.devnull}
