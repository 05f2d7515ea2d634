"""The figure of the held-out evaluation: what training changed, by every reward."""

import textwrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, Locator, MaxNLocator

from pipeline.paths import RUN_FILES
from pipeline.report.style import BLUE, GREY, INK, NARROW, RED, canvas, figure_function, footer, is_narrow, signed

LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}  # readable across the line at zero


@figure_function
def evaluate(metrics: dict[str, Any], trained: str, run: dict[str, Any], narrow: bool = False) -> Figure:
    """Held-out difference of every reward, each on its own scale, and how often the trained policy wins."""
    names = sorted(metrics, key=lambda name: (name != trained, name))
    size = (NARROW, 250 + 150 * len(names)) if narrow else (1400, max(800, 190 + 116 * len(names)))
    title = "Held-out rewards: trained policy minus reference model"
    figure = canvas(*size, title, footer(run, RUN_FILES.metrics))
    ratios = [1] if narrow else [5, 2]  # in a narrow figure, the win rate is a number beside the mean
    grid = figure.subplots(len(names), len(ratios), width_ratios=ratios, squeeze=False)
    for row, name in zip(grid, names, strict=True):
        _difference(row[0], metrics[name], name + (" (trained)" if name == trained else ""))
        if not narrow:
            _win_rate(row[1], metrics[name]["win_rate"])
    intervals = any(metric["difference"]["low"] is not None for metric in metrics.values())
    words = "difference of means with 95% interval" if intervals else "difference of means on one prompt"
    words += ", units of each reward"
    grid[-1][0].set_xlabel(textwrap.fill(words, 45) if narrow else words)
    if not narrow:
        grid[-1][1].set_xlabel("win rate, %")
    return figure


def _difference(axes: Axes, metric: dict[str, Any], label: str) -> None:
    """A point with its interval beside zero: filled where the interval leaves zero out. One prompt has no interval."""
    mean, low, high = (metric["difference"][name] for name in ("mean", "low", "high"))
    means = " → ".join(signed(metric[who]["mean"]) for who in ("checkpoint", "policy"))
    numbers = f"mean {means}"
    if is_narrow(axes):
        label += "\n"  # the numbers stand below the name
        numbers += "" if metric["win_rate"] is None else f"   ·   win rate {100 * metric['win_rate']:.0f}%"
    axes.set_title(label, fontweight="bold", pad=7)
    axes.set_title(numbers, loc="right", color=GREY, fontsize=12, pad=7)
    axes.axvline(0, color=GREY, linewidth=1.4)
    if mean is not None:
        colour, ends = INK, [mean]
        if low is not None and high is not None:
            colour, ends = BLUE if low > 0 else RED if high < 0 else GREY, [low, high, mean]
            axes.plot([low, high], [0, 0], color=colour, linewidth=7, alpha=0.4, solid_capstyle="butt")
        axes.plot(mean, 0, "o", color=colour, markersize=11, markerfacecolor="white" if colour == GREY else colour)
        reach = 1.25 * max(map(abs, ends)) or 1.0
        axes.set_xlim(-reach, reach)
        words = f"{'+' if mean > 0 else ''}{signed(mean)}"
        axes.annotate(words, (mean, 0), (0, 12), textcoords="offset points", ha="center", color=colour, bbox=LABEL)
    else:
        axes.text(0.51, 0.5, "undefined", transform=axes.transAxes, color=GREY, va="center")
    _one_row(axes, MaxNLocator(nbins=5))


def _win_rate(axes: Axes, rate: float | None) -> None:
    axes.axvline(0.5, color=GREY, linewidth=1.4)
    if rate is not None:
        axes.plot([0.5, rate], [0, 0], color=INK, linewidth=2)
        axes.plot(rate, 0, "o", color=INK, markersize=11)
        axes.annotate(f"{100 * rate:.0f}%", (rate, 0), (0, 12), textcoords="offset points", ha="center", bbox=LABEL)
    axes.set_xlim(-0.03, 1.03)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}"))
    _one_row(axes, FixedLocator([0, 0.25, 0.5, 0.75, 1]))


def _one_row(axes: Axes, ticks: Locator) -> None:
    axes.xaxis.set_major_locator(ticks)
    axes.set_ylim(-1, 1.6)
    axes.set_yticks([])
    axes.spines.left.set_visible(False)
