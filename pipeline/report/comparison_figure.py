"""The figure of a comparison: learning curves of many configurations with bands, one panel a reward."""

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from pipeline.report.comparison import OVER_SEEDS, Configuration, band, verdicts
from pipeline.report.figures import UNITS
from pipeline.report.labels import MEANING, SHARES
from pipeline.report.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    RED,
    canvas,
    figure_function,
    inline_legend,
    line,
    share_axis,
    steps_axis,
    value_axis,
)

COLOURS = (BLUE, RED, GREEN, ORANGE, PURPLE, INK, "#56B4E9")  # the last one is of Okabe & Ito's palette too
LOOKS = 2 * len(COLOURS)  # each solid and dashed
ACROSS = 2  # panels beside each other
PANEL, ONE_PANEL, ROW = 380, 500, 20  # pixels: a panel, one that stands alone, a line of text below it
GAP = 0.4  # of a line, between the entries of a legend
CHARACTERS, BOLD = 62, 54  # of a legend's line over half of the width, its first line in bold type
Look = tuple[str, bool]


@figure_function
def curves(found: Sequence[Configuration], column: str, source: str) -> Figure:
    """Mean ± std over seeds of a column of history.csv, with each configuration's verdicts below its panel."""
    rewards = list(dict.fromkeys(each.reward for each in found))
    across = min(ACROSS, len(rewards))
    panels = [[each for each in found if each.reward == reward] for reward in rewards]
    looks = look_of(found)
    legends = [legend_of(panel) for panel in panels]
    beside = 2 if across == 1 else 1  # entries beside each other in a legend
    rows = range(0, len(panels), across)
    rooms = [max(room_of(legend, beside) for legend in legends[row : row + across]) for row in rows]
    heights = [height for room in rooms for height in (ONE_PANEL if across == 1 else PANEL, ROW * room)]
    several = any(len(each.trainings) > 1 for each in found)
    title = MEANING.get(column, column) + (f": {OVER_SEEDS}" if several else "")
    figure = canvas(
        1400, int(130 + sum(heights)), title[0].upper() + title[1:], f"{seeds_of(found)}   ·   from {source}"
    )
    grid = figure.subplots(len(heights), across, squeeze=False, height_ratios=heights)
    for axes in grid.flat:
        axes.axis("off")
    for place, (panel, legend) in enumerate(zip(panels, legends, strict=True)):
        row, side = divmod(place, across)
        grid[2 * row][side].axis("on")
        colours = [looks[each.label(without="reward")] for each in panel]
        _panel(grid[2 * row][side], panel, column, colours, of_reward=len(rewards) > 1, name=f"panel-{place}")
        _legend(grid[2 * row + 1][side], legend, colours, rooms[row], beside)
    return figure


def look_of(found: Sequence[Configuration]) -> dict[str, Look]:
    """The colour of each label's line and whether it is dashed: the same in every panel."""
    labels = dict.fromkeys(each.label(without="reward") for each in found)
    return {
        label: (COLOURS[place % len(COLOURS)], place // len(COLOURS) % 2 == 1) for place, label in enumerate(labels)
    }


def seeds_of(found: Sequence[Configuration]) -> str:
    counts = sorted({len(each.trainings) for each in found})
    many = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    pale = "   ·   pale: fewer seeds have come that far" if any(uneven(each) for each in found) else ""
    return f"{many} seed{'s' if counts[-1] > 1 else ''} a configuration{pale}"


def uneven(configuration: Configuration) -> bool:
    return len({max(training.curve("lr"), default=-1) for training in configuration.trainings}) > 1


def _panel(
    axes: Axes, panel: Sequence[Configuration], column: str, looks: Sequence[Look], of_reward: bool, name: str
) -> None:
    """Draw a curve for each configuration; in the SVG each curve is a group of its own."""
    drawn, last = [], 0
    for number, (each, (colour, dashes)) in enumerate(zip(panel, looks, strict=True)):
        values = band(each, column)
        steps = range(max(values, default=0) + 1)
        last = max(last, steps[-1])
        mean, std, count = (
            np.array([_number(values[step][part]) if step in values else np.nan for step in steps]) for part in range(3)
        )
        x, whole = np.array(steps), count == len(each.trainings)
        error = np.where(whole, std, np.nan) if len(each.trainings) > 1 else None
        curve = line(axes, x, np.where(whole, mean, np.nan), colour, dashes=dashes, error=error)
        curve.set_gid(f"{name}-curve-{number}")
        joined = np.convolve(~whole, np.ones(3, dtype=int), mode="same")[: len(x)] > 0  # and their neighbours
        axes.plot(x, np.where(joined, mean, np.nan), color=colour, linewidth=1.2, alpha=0.5, zorder=2.5)
        drawn.append(mean)
    for shade in axes.collections:
        if isinstance(shade, PolyCollection) and len(panel) > 3:
            shade.set_alpha(0.13)  # many bands lie on top of each other
    params = panel[0].params
    if of_reward:
        inline_legend(axes, [(f"reward: {shortened(params['reward'])}", INK)])
    if column in SHARES:
        share_axis(axes, "share")
    else:
        unit = UNITS.get(params.get("reward.kind", ""), "units of the reward")
        label = f"reward, {unit}" if column == "reward_mean" else MEANING.get(column, column)
        value_axis(axes, textwrap.fill(label, 28), *drawn)
    steps_axis(axes, np.arange(last + 1))


def _number(value: float | None) -> float:
    return np.nan if value is None or abs(value) > 1e100 else float(value)


def legend_of(panel: Sequence[Configuration]) -> list[list[str]]:
    """For each configuration, the lines that say what it is, how many seeds it has and how they ended."""
    rewards = {"reward"} if len({each.reward for each in panel}) == 1 else set()
    entries = []
    for each in panel:
        shown = {name: value for name, value in each.shown.items() if name not in rewards}
        name = "   ".join(f"{name} {shortened(value)}" for name, value in shown.items()) or "all"
        ends = f"n={len(each.trainings)}: {verdicts(each)}"
        entries.append([*textwrap.wrap(name, BOLD), *textwrap.wrap(ends, CHARACTERS)])
    return entries


def shortened(value: str) -> str:
    """Both ends of a long value: paths differ at the end."""
    return value if len(value) <= 40 else f"{value[:12]}…{value[-27:]}"


def room_of(legend: Sequence[Sequence[str]], beside: int) -> float:
    """The height of a legend in lines of text, with its entries in `beside` columns."""
    return max(sum(len(lines) + GAP for lines in legend[column::beside]) for column in range(beside)) + 0.5


def _legend(axes: Axes, legend: Sequence[Sequence[str]], looks: Sequence[Look], room: float, beside: int) -> None:
    """Write the legend below a panel, into axes that are `room` lines of text high."""
    for column in range(beside):
        place = 0.5
        for lines, (colour, dashes) in zip(legend[column::beside], looks[column::beside], strict=True):
            for number, text in enumerate(lines):
                mark = ("╍ " if dashes else "━ ") if number == 0 else "    "
                written = axes.text(
                    column / beside,
                    1 - (place + number) / room,
                    mark + text,
                    transform=axes.transAxes,
                    va="top",
                    fontsize=12,
                    color=GREY if number else colour,
                    fontweight="normal" if number else "bold",
                )
                written.set_in_layout(False)  # a long one must not squeeze the panels
            place += len(lines) + GAP
