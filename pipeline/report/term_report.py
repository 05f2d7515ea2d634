"""The terms of a sum in the report: a figure of what each adds to the signal and to the reward, and a table."""

import itertools
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pipeline.paths import RUN_FILES
from pipeline.report.figures import legend
from pipeline.report.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    NARROW,
    ORANGE,
    PURPLE,
    RED,
    canvas,
    figure_function,
    footer,
    line,
    signed,
    steps_axis,
    value_axis,
)
from pipeline.runs.results import by_term

COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, GREY)
ENDS = 5  # steps at either end of a run, whose mean the table has


@figure_function
def terms(rows: list[dict[str, Any]], run: dict[str, Any], narrow: bool = False) -> Figure:
    """Each term's share of the signal, and how far its weighted mean has moved since the first step; these moves add up
    to the reward's move."""
    size = (NARROW, 820 + 28 * len(by_term(rows))) if narrow else (1400, 800)
    figure = canvas(*size, "Terms of the reward: what each adds", footer(run, RUN_FILES.terms))
    top, bottom = figure.subplots(2, 1, sharex=True)
    handles, moves, shares = {}, [], []
    for (name, own), colour in zip(by_term(rows).items(), itertools.cycle(COLOURS), strict=False):
        steps, share, mean = (column(own, key) for key in ("step", "share", "mean_weighted"))
        handles[f"{name}, weight {own[-1]['weight']:g}"] = line(top, steps, 100 * share, colour)
        shares.append(100 * share)
        moves.append(mean - mean[0])
        line(bottom, steps, moves[-1], colour)
    moves.append(np.sum(moves, axis=0))
    handles["reward"] = line(bottom, steps, moves[-1], INK, dashes=True)
    for panel, levels in ((top, (0, 100)), (bottom, (0,))):
        for level in levels:
            panel.axhline(level, color=GREY, linewidth=1.2, zorder=1)
        steps_axis(panel, steps, label=panel is bottom)
    legend(top, handles, most=4)
    value_axis(top, "share of the signal, %", *shares)
    value_axis(bottom, f"weighted mean since step {steps[0]:.0f},\nreward units", *moves)
    return figure


def column(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    """A column as floats; an undefined value is a gap."""
    return np.array([row[name] for row in rows], dtype=float)


def term_table(rows: list[dict[str, Any]], heldout: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per term: means over the first and the last ENDS steps; heldout: what metrics.json says of the term."""

    def ends(own: list[dict[str, Any]], name: str) -> tuple[float | None, float | None]:
        return mean(own[:ENDS], name), mean(own[-ENDS:], name)

    def mean(own: list[dict[str, Any]], name: str) -> float | None:
        values = [row[name] for row in own if row[name] is not None]
        return sum(values) / len(values) if values else None

    return [
        {
            "name": name, "weight": own[-1]["weight"], "heldout": heldout.get(name),
            **{key: ends(own, key) for key in ("share", "mean", "mean_weighted", "std_within", "std_within_weighted")},
        }
        for name, own in by_term(rows).items()
    ]  # fmt: skip


def reward_words(sample: dict[str, Any]) -> str:
    """The reward of a completion; of a sum with what each term adds: −7.95 (embedding −7.10, length −0.85)."""
    added = ", ".join(
        f"{name} {'nothing' if value is None else signed(value)}" for name, value in sample.get("terms", {}).items()
    )
    return signed(sample["reward"]) + (f" ({added})" if added else "")
