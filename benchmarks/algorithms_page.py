"""The tables and the figure of docs/ALGORITHMS.md, from the runs of docs/algorithms.jsonl."""

import math
import statistics
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from benchmarks.algorithms import RATES, RECIPES, SEEDS, TASKS, chosen_rate
from pipeline.report.style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, canvas, figure_function, line, png
from pipeline.report.table import markdown_table
from pipeline.runs.gain_differences import ALPHA, answer, difference

PAGE, FIGURE = Path("docs/ALGORITHMS.md"), Path("docs/figures/algorithms.png")
BEGIN, END = "<!-- tables: python -m benchmarks.algorithms page -->\n", "<!-- end of the tables -->\n"
AGAINST = "rloo"
COLOURS = dict(zip(RECIPES, (INK, GREY, ORANGE, BLUE, GREEN, RED, PURPLE, "#56B4E9"), strict=True))
ENOUGH = {"arithmetic": 0.95, "length": -1.0}  # mean training reward: solved share, characters off 40
WINDOW = 10  # steps behind a mean of the training reward

Row = dict[str, Any]


class Mean(NamedTuple):
    """Over seeds: mean and half of its 95% interval (Student's t); NaN of one seed."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:.3g}" + ("" if math.isnan(self.half) else f" ± {self.half:.2g}")


def mean_over_seeds(values: Sequence[float]) -> Mean:
    from scipy.special import stdtrit

    if len(values) < 2:
        return Mean(statistics.fmean(values), math.nan)
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Mean(statistics.fmean(values), float(stdtrit(len(values) - 1, 0.975)) * error)


def reported(rows: Sequence[Row], task: str, recipe: str) -> list[Row]:
    """The runs on SEEDS with the chosen rate, by seed."""
    rate = chosen_rate(rows, task, recipe)
    wanted = [row for row in rows if (row["group"], row["task"], row["recipe"]) == ("report", task, recipe)]
    return sorted((row for row in wanted if row["lr"] == rate and row["seed"] in SEEDS), key=lambda row: row["seed"])


def seconds_of(rows: Sequence[Row], task: str) -> dict[str, float]:
    """Seconds a step, of the recipes that were timed."""
    return {row["recipe"]: row["seconds"] for row in rows if (row["group"], row["task"]) == ("time", task)}


def gains(runs: Sequence[Row]) -> dict[str, float]:
    """Held-out reward after the last update minus before the first, by seed."""
    return {str(row["seed"]): row["heldout"][-1][1] - row["heldout"][0][1] for row in runs}


def samples_until(row: Row, level: float) -> float:
    """Samples drawn when the mean training reward of WINDOW steps first reaches `level`; infinite if it never does."""
    drawn = list(accumulate(row["samples"]))
    for step in range(WINDOW - 1, len(drawn)):
        if statistics.fmean(row["reward"][step - WINDOW + 1 : step + 1]) >= level:
            return drawn[step]
    return math.inf


def reach(runs: Sequence[Row], level: float) -> str:
    """How many runs reach the level in training, and the median of their thousand samples until then."""
    found = [drawn for row in runs if (drawn := samples_until(row, level)) < math.inf]
    return f"{len(found)} of {len(runs)}" + (f", {statistics.median(found) / 1000:.3g}" if found else "")


def algorithms_table(rows: Sequence[Row], task: str) -> str:
    """A row an algorithm: what it reached."""
    seconds = seconds_of(rows, task)
    titles = [
        "recipe",
        "lr",
        "seeds",
        "held-out gain",
        "training reward at the end",
        "samples a step",
        "seconds a step",
    ]
    cells = [[*titles, f"runs that reach {ENOUGH[task]:g} in training, after thousand samples"]]
    for recipe in RECIPES:
        if not (runs := reported(rows, task, recipe)):
            continue
        ends = mean_over_seeds([statistics.fmean(row["reward"][-WINDOW:]) for row in runs])
        drawn = statistics.fmean(statistics.fmean(row["samples"]) for row in runs)
        time = f"{seconds[recipe]:.2f}" if recipe in seconds else "not measured"
        gained = str(mean_over_seeds(list(gains(runs).values())))
        told = [f"`{recipe}`", f"{runs[0]['lr']:g}", str(len(runs)), gained, str(ends), f"{drawn:.0f}", time]
        cells.append([*told, reach(runs, ENOUGH[task])])
    return markdown_table(cells)


def differences_table(rows: Sequence[Row], task: str) -> str:
    """Of each algorithm to AGAINST, paired by seed; all intervals hold together (Bonferroni)."""
    base = gains(reported(rows, task, AGAINST))
    others = {recipe: gains(reported(rows, task, recipe)) for recipe in RECIPES if recipe != AGAINST}
    found = {recipe: difference(gained, base) for recipe, gained in others.items() if gained and base}
    count = max(1, sum(each.error is not None for each in found.values()))
    cells = [["recipe", f"held-out gain minus that of `{AGAINST}`", f"{100 * (1 - ALPHA / count):.4g}% interval", "is"]]
    for recipe, each in found.items():
        limits = each.interval(count)
        between = f"{limits[0]:+.3g} to {limits[1]:+.3g}" if limits else ""
        cells.append([f"`{recipe}`", f"{each.mean:+.3g}", between, answer(limits)])
    return markdown_table(cells)


def rates_table(rows: Sequence[Row], task: str) -> str:
    """Held-out reward at the end of the tuning runs, mean over their seeds: the best one is chosen."""
    cells = [["recipe", *(f"{rate:g}" for rate in RATES[task])]]
    for recipe in RECIPES:
        ends = [[row["heldout"][-1][1] for row in rows if row["group"] == "tuning" and row["task"] == task
                 and (row["recipe"], row["lr"]) == (recipe, rate)] for rate in RATES[task]]  # fmt: skip
        if any(ends):
            cells.append([f"`{recipe}`", *(f"{statistics.fmean(each):.3g}" if each else "" for each in ends)])
    return markdown_table(cells)


@figure_function
def curves(rows: Sequence[Row], command: str) -> Figure:
    """Held-out reward against samples, and against wall time where it was measured."""
    figure = canvas(1400, 1000, "Held-out reward of each algorithm, mean over seeds with its 95% interval", command)
    for panels, task in zip(figure.subplots(len(TASKS), 2), TASKS, strict=True):
        seconds = seconds_of(rows, task)
        for axes, label in zip(panels, ("thousand samples", "seconds on an idle core"), strict=True):
            for recipe in RECIPES:
                runs = reported(rows, task, recipe)
                if not runs or (axes is panels[1] and recipe not in seconds):
                    continue
                steps = [step for step, _ in runs[0]["heldout"]]
                means = [mean_over_seeds([dict(row["heldout"])[step] for row in runs]) for step in steps]
                drawn = [statistics.fmean(sum(row["samples"][:step]) / 1000 for row in runs) for step in steps]
                x = drawn if axes is panels[0] else [step * seconds[recipe] for step in steps]
                y, error = (np.array([getattr(each, name) for each in means]) for name in ("mean", "half"))
                drawn_line = line(axes, np.array(x), y, COLOURS[recipe], error=error)
                drawn_line.set_label(recipe)
            axes.set_title(task)
            axes.set_xlabel(label)
            axes.set_ylabel("held-out reward" if task != "arithmetic" else "share of held-out problems solved")
        panels[0].legend(fontsize=11)
    return figure


def write_page(rows: Sequence[Row]) -> None:
    """Replaces what stands between BEGIN and END in the page; draws the figure once there are runs of each task."""
    parts, made = [], {task: sum(len(reported(rows, task, recipe)) for recipe in RECIPES) for task in TASKS}
    for task, count in made.items():
        parts.append(f"### `{task}`: {count} of {len(RECIPES) * len(SEEDS)} runs\n")
        if count:
            parts += [table(rows, task) for table in (algorithms_table, differences_table, rates_table)]
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(before + BEGIN + "\n" + "\n".join(parts) + "\n" + END + after, encoding="utf-8")
    if all(made.values()):
        FIGURE.write_bytes(png(curves(rows, "python -m benchmarks.algorithms page, from docs/algorithms.jsonl")))
