"""Figures and the report page: pure functions from the files of a run to figures and HTML. No torch, no tracker.

matplotlib reads two variables when it is imported, and ends where their values are none: a notebook's backend, a broken
matplotlibrc. Nothing is shown on a screen here and no style of the user's is used, so they are set before it is.
"""

import os

os.environ |= {"MPLBACKEND": "agg", "MATPLOTLIBRC": os.devnull}
