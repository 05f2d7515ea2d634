"""The figure of the README: one training with two recipes, as a run and its cure are shown.

python -m benchmarks.readme_figure COLLAPSED HEALTHY    # `reports` folders -> docs/figures/healthy-and-collapsed.png
"""

import sys
from pathlib import Path

from pipeline.report import cure_figure, inputs, style

TARGET = Path(__file__).resolve().parents[1] / "docs/figures/healthy-and-collapsed.png"

if __name__ == "__main__":
    collapsed, healthy = (inputs.load(Path(folder)) for folder in sys.argv[1:])
    names = ("recipe notebook", "recipe stable")
    TARGET.write_bytes(style.png(cure_figure.overlay(collapsed, healthy, "One training with two recipes", names)))
