"""The figure of a comparison: learning curves of many configurations with bands, one panel a reward."""

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.report.comparison import Configuration, band, verdicts
from pipeline.report.figures import UNITS
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
    key,
    line,
    share_axis,
    steps_axis,
    value_axis,
)  # fmt: skip
from pipeline.report.words import MEANING, SHARES

COLOURS = (BLUE, RED, GREEN, ORANGE, PURPLE, INK, "#56B4E9")  # the last one is of Okabe & Ito's palette too
ACROSS = 2  # panels beside each other
PANEL, ROW = 380, 20  # pixels: a panel, a line of text below it
CHARACTERS = 150  # of a legend's line over the whole width; half of it in two panels


@figure_function
def curves(found: Sequence[Configuration], column: str, source: str) -> Figure:
    """Mean ± std over seeds of a column of history.csv, with each configuration's verdicts below its panel."""
    rewards = list(dict.fromkeys(each.reward for each in found))
    across = min(ACROSS, len(rewards))
    panels = [[each for each in found if each.reward == reward] for reward in rewards]
    rows = [panels[start : start + across] for start in range(0, len(panels), across)]
    texts = [[legend_of(panel, CHARACTERS // across) for panel in row] for row in rows]
    lengths = [max(sum(map(len, entries)) for entries in row) for row in texts]
    heights = [height for length in lengths for height in (PANEL, ROW * (length + 1))]
    title = f"{MEANING.get(column, column)}: mean ± std over seeds"
    figure = canvas(1400, 130 + sum(heights), title[0].upper() + title[1:], f"{seeds_of(found)}   ·   from {source}")
    grid = figure.subplots(len(heights), across, squeeze=False, height_ratios=heights)
    for axes in grid.flat:
        axes.axis("off")
    for place, row in enumerate(rows):
        for panel, entries, axes, below in zip(row, texts[place], grid[2 * place], grid[2 * place + 1], strict=False):
            axes.axis("on")
            _panel(axes, panel, column, of_reward=len(rewards) > 1)
            _legend(below, entries, lengths[place] + 1)
    return figure


def look(place: int) -> tuple[str, bool]:
    """Colour, and whether dashed, of the place-th configuration of a panel."""
    return COLOURS[place % len(COLOURS)], place // len(COLOURS) % 2 == 1


def seeds_of(found: Sequence[Configuration]) -> str:
    counts = sorted({len(each.trainings) for each in found})
    many = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    pale = "   ·   pale: fewer seeds have come that far" if any(uneven(each) for each in found) else ""
    return f"{many} seed{'s' if counts[-1] > 1 else ''} a configuration{pale}"


def uneven(configuration: Configuration) -> bool:
    return len({max(training.curve("lr"), default=-1) for training in configuration.trainings}) > 1


def _panel(axes: Axes, panel: Sequence[Configuration], column: str, of_reward: bool) -> None:
    drawn, last = [], 0
    for place, each in enumerate(panel):
        values, (colour, dashes) = band(each, column), look(place)
        steps = range(max(values, default=0) + 1)
        last = max(last, steps[-1])
        mean, std, count = (
            np.array([_number(values[step][part]) if step in values else np.nan for step in steps]) for part in range(3)
        )
        whole = count == len(each.trainings)
        error = np.where(whole, std, np.nan) if len(each.trainings) > 1 else None
        x = np.array(steps)
        line(axes, x, np.where(whole, mean, np.nan), colour, dashes=dashes, error=error)
        beside = np.convolve(~whole, np.ones(3, dtype=int), mode="same") > 0  # with the points that it joins
        axes.plot(x, np.where(beside, mean, np.nan), color=colour, linewidth=1.2, alpha=0.5, zorder=2.5)
        drawn.append(mean)
    params = panel[0].params
    if of_reward:
        key(axes, [(f"reward: {params['reward']}", INK)])
    if column in SHARES:
        share_axis(axes, "share")
    else:
        unit = UNITS.get(params.get("reward.kind", ""), "units of the reward")
        label = f"reward, {unit}" if column == "reward_mean" else MEANING.get(column, column)
        value_axis(axes, textwrap.fill(label, 42), *drawn)
    steps_axis(axes, np.arange(last + 1))


def _number(value: float | None) -> float:
    return np.nan if value is None or abs(value) > 1e100 else float(value)


def legend_of(panel: Sequence[Configuration], width: int) -> list[list[str]]:
    """Of each configuration the lines that say what it is, how many seeds it has and how they ended."""
    rewards = {"reward"} if len({each.reward for each in panel}) == 1 else set()
    entries = []
    for each in panel:
        shown = {name: value for name, value in each.shown.items() if name not in rewards}
        count = len(each.trainings)
        name = "   ".join(f"{name} {shortened(value)}" for name, value in shown.items()) or "all"
        words = f"{name}   (n={count})"
        entries.append([*textwrap.wrap(words, width), *textwrap.wrap(verdicts(each), width)])
    return entries


def shortened(value: str) -> str:
    """Both ends of a long value: paths differ at the end."""
    return value if len(value) <= 40 else f"{value[:12]}…{value[-27:]}"


def _legend(axes: Axes, entries: Sequence[Sequence[str]], room: int) -> None:
    """Below a panel; its lines stand `room` to the height of the axes."""
    place = 0
    for number, lines in enumerate(entries):
        colour, dashes = look(number)
        for text in lines:
            first = text is lines[0]
            mark = ("╍ " if dashes else "━ ") if first else "    "
            axes.text(
                0, 1 - place / room, mark + text, transform=axes.transAxes, va="top", fontsize=12,
                color=colour if first else GREY, fontweight="bold" if first else "normal",
            )  # fmt: skip
            place += 1
