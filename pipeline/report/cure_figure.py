"""The figure of a cure: a run and the same run with the change, in the same panels."""

import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.paths import RUN_FILES
from pipeline.report.figures import reward_label, unit_axis
from pipeline.report.inputs import Inputs
from pipeline.report.style import (
    BLUE,
    GREY,
    INK,
    NARROW,
    RED,
    canvas,
    figure_function,
    footer,
    inline_legend,
    line,
    start_line,
    steps_axis,
    value_axis,
)

PANELS = {  # column -> its name
    "reward_mean": "mean reward",
    "entropy": "entropy",
    "ref_logprob": "reference's log-likelihood",
    "distinct_completions": "different completions",
    "empty_share": "empty completions",
}


@figure_function
def overlay(
    collapsed: Inputs,
    after: Inputs,
    title: str = "The run without and with the change",
    names: tuple[str, str] = ("without the change", "with the change"),
    narrow: bool = False,
) -> Figure:
    """Five columns of history.csv over the steps of both runs; vertical lines where findings set in."""
    source = f"{RUN_FILES.history}, and that of train key {after.run['train_key'][:8]}"
    figure = canvas(*((NARROW, 1700) if narrow else (1400, 800)), title, footer(collapsed.run, source))
    grid = figure.subplots(6, 1, height_ratios=[1, 1, 1, 1, 1, 1.8]) if narrow else figure.subplots(2, 3)
    runs = [(after, BLUE, False), (collapsed, RED, True)]  # dashes on top, so that lines that coincide both show
    for place, (panel, (column, name)) in enumerate(zip(grid.flat, PANELS.items(), strict=False)):
        values = []
        for run, colour, dashes in runs:
            steps, y = (run.history[each].to_numpy(dtype=float) for each in ("step", column))
            y = np.where(np.abs(y) < 1e100, y, np.nan)  # infinities have no place on an axis
            line(panel, steps, y, colour, dashes=dashes)
            start_line(panel, steps, y, colour)
            for onset in {finding["onset"]: None for finding in run.diagnosis["findings"]}:
                panel.axvline(onset, color=colour, linewidth=1.1, alpha=0.75, zorder=1.5)
            values.append(y)
        inline_legend(panel, [(name, INK)])
        if column == "reward_mean":
            value_axis(panel, textwrap.fill(reward_label(collapsed.run), 20 if narrow else 30), *values)
        else:
            unit_axis(panel, column, *values)
        longest = max((run.history["step"].to_numpy(dtype=float) for run, _, _ in runs), key=lambda steps: steps[-1])
        steps_axis(panel, longest, label=place == 4 if narrow else place > 1)
        panel.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    _legend(grid.flat[-1], collapsed, after, names)
    return figure


def _legend(axes: Axes, collapsed: Inputs, after: Inputs, names: tuple[str, str]) -> None:
    """In the place of the sixth panel: which line is which run, and its verdict."""
    axes.axis("off")
    entries = [(collapsed, names[0], RED, "╍"), (after, names[1], BLUE, "━")]
    for place, (run, name, colour, mark) in enumerate(entries):
        findings = run.diagnosis["findings"]
        verdict = [f"{finding['title'][:40]}, step {finding['onset']}" for finding in findings[:3]] or ["healthy"]
        more = [f"and {len(findings) - 3} more"] if len(findings) > 3 else []
        top = 0.98 - 0.46 * place
        axes.text(0, top, f"{mark} {name}", color=colour, fontsize=15, fontweight="bold", va="top")
        axes.text(0.07, top - 0.1, "\n".join([*verdict, *more]), color=INK, va="top")
    words = "vertical lines: onsets of the findings\ndotted: step 0, the reference model"
    axes.text(0, 0.0, words, color=GREY, fontsize=12, va="bottom")
