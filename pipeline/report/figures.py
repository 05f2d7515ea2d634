"""The figures of training, each a pure function of the run's history (a row per step)."""

import itertools
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from pipeline.config.schema import LIKELIHOOD
from pipeline.paths import RUN_FILES
from pipeline.report.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    NARROW,
    ORANGE,
    PALE,
    PURPLE,
    RED,
    canvas,
    figure_function,
    footer,
    inline_legend,
    is_narrow,
    line,
    note,
    power_of_ten,
    share_axis,
    signed,
    start_line,
    steps_axis,
    value_axis,
)
from pipeline.rl.metrics import METRICS

UNITS = {
    "embedding": "minus L2 distance to the target",
    "length": "minus characters off the target",
    "words": "required words in the text",
}
GAP_FLOOR = 1e-8  # what a log scale shows for equal logprobs
GAP_ROUNDING = 1e-3  # float32 keeps the gap below this; a shifted objective is off by nats
Series = list[tuple[str, str, str]]  # column, its name in the panel, colour
PANELS: list[tuple[Series, bool]] = [  # and whether zero must be in sight
    ([("entropy", "entropy", BLUE)], True),
    ([("ref_kl_k1", "KL to reference, k1", BLUE), ("ref_kl_k3", "k3", ORANGE)], True),
    ([("ref_logprob", "logprob by reference", INK), ("policy_logprob", "policy", BLUE)], False),
    ([("distinct_completions", "distinct texts", BLUE), ("distinct_2", "2-grams", GREEN)], False),
    ([("repeated_3grams", "repeated 3-grams", RED), ("top_token_share", "top token", PURPLE)], False),
    ([("ended_share", "ended by EOS", GREEN), ("empty_share", "empty", RED)], False),
    ([("completion_tokens", "completion length", BLUE)], True),
    ([("grad_norm", "gradient norm before clipping", BLUE)], True),
]


def reward_label(run: dict[str, Any]) -> str:
    """The axis label of the trained reward with its unit."""
    return f"reward, {UNITS.get(run['params'].get('reward.kind', ''), 'units of the reward')}"


@figure_function
def reward(history: pd.DataFrame, held_out: dict[str, Any], run: dict[str, Any], narrow: bool = False) -> Figure:
    """Mean reward with error and spread, the baseline, and the held-out means before and after beside it."""
    size = (NARROW, 680) if narrow else (1400, 800)
    figure = canvas(*size, "Reward of the sampled completions", footer(run, RUN_FILES.history))
    axes, side = figure.subplots(1, 2, sharey=True, width_ratios=[4, 3] if narrow else [11, 2.2])
    legend(axes, _reward_lines(axes, history, run))
    _held_out_points(axes, side, held_out)
    value_axis(axes, reward_label(run), *_columns(history, "reward_mean", "baseline"))
    return figure


def _reward_lines(axes: Axes, history: pd.DataFrame, run: dict[str, Any], spread: bool = True) -> dict[str, Any]:
    """Draws mean, baseline and their bands; returns what the legend shows, by its label."""
    steps, mean, error, within, between, baseline = _columns(
        history, "step", "reward_mean", "reward_se", "reward_std_within", "reward_std_between", "baseline"
    )
    drawn = line(axes, steps, mean, BLUE, error=error)
    handles = [(drawn, axes.collections[0]), line(axes, steps, baseline, RED, dashes=True)]
    penalised = run["params"].get("recipe.kl") == "reward_k1"  # then the baseline is that of reward minus penalty
    labels = ["mean ± standard error", "baseline, less the KL penalty" if penalised else "baseline"]
    if spread:
        band = axes.fill_between(steps, mean - within, mean + within, color=GREY, alpha=0.13, linewidth=0, zorder=1)
        edges = [axes.plot(steps, mean + s * between, color=GREEN, linewidth=1.2, zorder=1)[0] for s in (-1, 1)]
        if len(steps) == 1:
            axes.errorbar(steps, mean, within, color=GREY, alpha=0.5, capsize=12, linestyle="none", zorder=1)
            axes.errorbar(steps, mean, between, color=GREEN, capsize=9, linestyle="none", zorder=1)
        handles += [band, edges[0]]
        labels += ["± std within prompts", "± std between prompts"]
    steps_axis(axes, steps)
    return dict(zip(labels, handles, strict=True))


def legend(axes: Axes, handles: dict[str, Any], most: int = 10) -> None:
    """Draw the legend above the axes, where it hides nothing: `most` entries per row, or one if the figure is
    narrow."""
    columns, lines = (1, len(handles) + 1) if is_narrow(axes) else (min(most, len(handles)), -(-len(handles) // most))
    axes.set_title("\n".join(" " * lines))  # blank lines keep the room; the legend itself must not squeeze the axes
    legend = axes.legend(
        list(handles.values()),
        list(handles),
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=columns,
        borderaxespad=0.2,
        borderpad=0.2,
        handlelength=1.6,
        columnspacing=1.6,
    )
    legend.set_in_layout(False)


def _held_out_points(axes: Axes, side: Axes, held_out: dict[str, Any]) -> None:
    """Draw both held-out means with their intervals in a narrow panel, and the reference's as a line through the
    run."""
    for place, (who, colour) in enumerate((("checkpoint", INK), ("policy", BLUE))):
        mean, low, high = (held_out[who][name] for name in ("mean", "low", "high"))
        if mean is None:
            continue
        if low is not None and high is not None:
            side.plot([place, place], [low, high], color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt")
        side.plot(place, mean, "s" if place == 0 else "o", color=colour, markersize=9)
        above = mean if high is None else max(mean, high)
        side.annotate(signed(mean), (place, above), (0, 9), textcoords="offset points", ha="center", color=colour)
    if held_out["checkpoint"]["mean"] is not None:
        for panel in (axes, side):
            _reference_line(panel, held_out["checkpoint"]["mean"])
    side.set_xlim(-0.6, 1.6)
    side.set_xticks([0, 1], ["reference", "trained"], color=INK)
    one_prompt = held_out["policy"]["mean"] is not None and held_out["policy"]["low"] is None
    words = "held-out, one prompt" if one_prompt else "held-out, 95% interval"
    side.set_xlabel(words.replace(", ", ",\n") if is_narrow(side) else words, fontsize=12)
    side.grid(axis="x", visible=False)
    side.tick_params(left=False)
    side.spines.left.set_visible(False)


def _reference_line(axes: Axes, mean: float) -> Line2D:
    return axes.axhline(mean, color=INK, linewidth=1.4, linestyle=(0, (6, 4)), zorder=1)


@figure_function
def variance(history: pd.DataFrame, run: dict[str, Any], narrow: bool = False) -> Figure:
    """Reward variance within and between prompts, and how many prompts give no signal at all."""
    size = (NARROW, 800) if narrow else (1400, 800)
    figure = canvas(*size, "Reward variance: what there is to learn from", footer(run, RUN_FILES.history))
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    steps, within, between, starved = _columns(
        history, "step", "reward_std_within", "reward_std_between", "zero_spread_share"
    )
    line(top, steps, within**2, BLUE)
    line(top, steps, between**2, GREEN, dashes=True)
    inline_legend(top, [("within prompts (mean over prompts)", BLUE), ("between prompts (of their means)", GREEN)])
    _from_zero(top)
    value_axis(top, "reward variance, (reward units)²", within**2, between**2)
    line(bottom, steps, starved, RED)
    inline_legend(bottom, [("prompts whose samples all have the same reward", RED)])
    share_axis(bottom, "share of prompts")
    for panel in (top, bottom):
        steps_axis(panel, steps, label=panel is bottom)
    return figure


@figure_function
def collapse(history: pd.DataFrame, run: dict[str, Any], narrow: bool = False) -> Figure:
    """Small multiples: each panel shows one way in which a policy can fall apart."""
    title = "Collapse diagnostics  (dotted: step 0, the reference model)"
    figure = canvas(*((NARROW, 2000) if narrow else (1400, 800)), title, footer(run, RUN_FILES.history))
    across = 1 if narrow else 3
    panels = figure.subplots(9 // across, across, sharex=True).ravel()
    for panel, (series, zero) in zip(panels, PANELS, strict=False):
        _panel(panel, history, series, zero)
    _gap_panel(panels[8], history)
    steps = _columns(history, "step")[0]
    for panel in panels:
        steps_axis(panel, steps, label=panel in panels[-across:])
        for step in steps[_columns(history, "nonfinite")[0] == 1]:
            panel.axvline(step, color=RED, linewidth=1.2, alpha=0.6, zorder=1)
    if history["nonfinite"].eq(1).any():
        note(figure, "red line: not finite, update not applied", row=0, color=RED)
    return figure


def unit_axis(axes: Axes, column: str, *values: np.ndarray) -> None:
    """The axis of a metric: shares on 0 to 100 percent, others in their unit."""
    unit = "L2 norm" if column == "grad_norm" else METRICS[column].unit.replace(" per ", " / ")
    if unit == "share":
        share_axis(axes, unit)
    else:
        value_axis(axes, unit, *values, typical=1.0 if unit.startswith("nats") else 0.0)


def _panel(axes: Axes, history: pd.DataFrame, series: Series, zero: bool = False) -> None:
    """One small multiple: one or two columns on a common axis."""
    steps = _columns(history, "step")[0]
    values = _columns(history, *(column for column, _, _ in series))
    for place, (y, (_, _, colour)) in enumerate(zip(values, series, strict=True)):
        line(axes, steps, y, colour, dashes=place > 0)
        start_line(axes, steps, y, colour)
    inline_legend(axes, [(name, colour) for _, name, colour in series])
    if zero:
        _from_zero(axes)
    unit_axis(axes, series[0][0], *values)


def _gap_panel(axes: Axes, history: pd.DataFrame) -> None:
    """|sampled - scored| logprob: rounding where the loss scores the sampled tokens, nats where it scores others."""
    steps, gap = _columns(history, "step", "logprob_gap")
    gap = np.where(np.isfinite(gap), np.maximum(gap, GAP_FLOOR), np.nan)
    line(axes, steps, gap, RED)
    axes.axhspan(GAP_FLOOR / 10, GAP_ROUNDING, color=PALE, alpha=0.5, linewidth=0, zorder=0)
    axes.text(0.985, 0.05, "rounding", transform=axes.transAxes, ha="right", va="bottom", color=GREY, fontsize=12)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(power_of_ten))
    axes.yaxis.set_minor_locator(NullLocator())
    largest = float(np.nanmax(gap)) if np.isfinite(gap).any() else 1.0
    axes.set_ylim(GAP_FLOOR / 3, max(30.0, 3 * largest))
    axes.set_ylabel("nats, log scale")
    inline_legend(axes, [("max |sampled − scored| logprob", RED)])


@figure_function
def overview(history: pd.DataFrame, held_out: dict[str, Any], run: dict[str, Any], narrow: bool = False) -> Figure:
    """The run in one picture: reward and baseline beside the metrics that collapse first, or above them."""
    params = run["params"]
    title = f"REINFORCE on {params['model']}: reward and signs of collapse"
    figure = canvas(*((NARROW, 1160) if narrow else (1600, 700)), title, footer(run, RUN_FILES.history))
    grid = figure.add_gridspec(6, 1) if narrow else figure.add_gridspec(3, 2, width_ratios=[3, 2])
    left = figure.add_subplot(grid[:3, 0])
    handles = _reward_lines(left, history, run, spread=False)
    start = held_out["checkpoint"]["mean"]
    if start is not None:
        handles["reference, held-out"] = _reference_line(left, start)
    legend(left, handles)
    value_axis(left, reward_label(run), *_columns(history, "reward_mean", "baseline"))
    right = [figure.add_subplot(grid[3 + row, 0] if narrow else grid[row, 1]) for row in range(3)]
    _panel(right[0], history, [("entropy", "entropy", BLUE)], zero=True)
    _panel(right[1], history, [("ref_kl_k1", "KL to the reference (k1)", BLUE)], zero=True)
    _panel(right[2], history, [("distinct_completions", METRICS["distinct_completions"].label, BLUE)])
    for panel in right:
        steps_axis(panel, _columns(history, "step")[0], label=panel is right[2])
        panel.tick_params(labelbottom=panel is right[2])
    return figure


@figure_function
def curve(
    rows: list[dict[str, Any]], trained: str, independent: str, best: int | None, run: dict[str, Any],
    narrow: bool = False,
) -> Figure:  # fmt: skip
    """Held-out rewards over the distance from the reference, sqrt(KL), as Gao et al. 2022 (arXiv 2210.10760) draw them,
    each in units of its spread; beside it the reference's likelihood."""
    title = "Held-out rewards over the distance from the reference"
    figure = canvas(*((NARROW, 1100) if narrow else (1400, 760)), title, footer(run, RUN_FILES.curve))
    if narrow:
        left, right = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    else:
        left, right = figure.subplots(1, 2, sharex=True, width_ratios=[11, 5])
    names = sorted({row["reward"] for row in rows} - {LIKELIHOOD}, key=lambda n: (n != trained, n != independent, n))
    colours = itertools.cycle([ORANGE, GREEN, RED, PURPLE, GREY])
    handles, flat = {}, []
    for name in names:
        own = [row for row in rows if row["reward"] == name]
        if not own[0]["spread"]:
            flat.append(name)
            continue
        bold, colour = name == trained, BLUE if name == trained else next(colours)
        band = _path(left, own, "gain", own[0]["spread"], colour, bold)
        words = " (trained)" if bold else " (independent)" if name == independent else ""
        handles[f"{name}{words}"] = band
        if bold:
            _name_steps(left, own, best)
    left.axhline(0, color=INK, linewidth=1.2, zorder=1)
    legend(left, handles, most=3)
    left.set_ylabel("gain over step 0, in spreads of the reward")
    _path(right, [row for row in rows if row["reward"] == LIKELIHOOD], None, 1.0, INK, True)
    words = " (independent)" if independent == "reference" else ""
    inline_legend(right, [(f"reference's log-likelihood{words}", INK)])
    right.set_ylabel("nats / token")
    for panel in (right,) if narrow else (left, right):
        panel.set_xlabel("√KL to the reference, √nats a completion")
    left.set_xlim(left=min(0.0, left.get_xlim()[0]))
    if flat:
        note(figure, f"not drawn, no spread at any step: {', '.join(flat)}", row=0, fontsize=12, color=GREY)
    return figure


def _path(
    axes: Axes, rows: list[dict[str, Any]], key: str | None, unit: float, colour: str, bold: bool
) -> tuple[Line2D, Any]:
    """A measure from step to step, with its 95% interval; what is undefined is a gap."""
    x = np.array([row["sqrt_kl"] for row in rows], dtype=float)
    y, low, high = (
        np.array([(row[key] if key else row)[name] for row in rows], dtype=float) / unit
        for name in ("mean", "low", "high")
    )
    (drawn,) = axes.plot(
        x, y, "o-", color=colour, linewidth=3.4 if bold else 1.6, markersize=7 if bold else 4, zorder=3
    )
    # rounding may put a mean outside an interval that has no width
    bars = axes.errorbar(
        x, y, np.maximum((y - low, high - y), 0), color=colour, alpha=0.55 if bold else 0.4, linestyle="none",
        elinewidth=2.4 if bold else 1.2, zorder=2 if bold else 1.5,
    )  # fmt: skip
    return drawn, bars


def _name_steps(axes: Axes, rows: list[dict[str, Any]], best: int | None) -> None:
    """The step beside some of the points, the last one among them; a ring around the one of data/best."""
    shown = rows[::-1][:: -(-len(rows) // 8)]
    for row in rows:
        x, gain = row["sqrt_kl"], row["gain"]["mean"]
        if x is None or gain is None:
            continue
        place, chosen = (x, gain / row["spread"]), row["step"] == best
        if chosen:
            axes.plot(*place, "o", color=BLUE, markersize=16, fillstyle="none", markeredgewidth=1.8, zorder=4)
        if chosen or row in shown:
            options: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "color": BLUE, "fontsize": 12}
            axes.annotate(f"{row['step']}", place, (-8, 7), fontweight="bold" if chosen else "normal", **options)


def _from_zero(axes: Axes) -> None:
    """Keep zero in sight, with a little room below it, so that a line at zero does not lie on the axis."""
    low, high = axes.get_ylim()
    high = max(high, 0.0) or 1.0
    axes.set_ylim(min(low, -0.04 * high), 1.05 * high)


def _columns(history: pd.DataFrame, *names: str) -> list[np.ndarray]:
    """Columns as floats; infinities have no place on an axis and become gaps, as undefined values do."""
    columns = [history[name].to_numpy(dtype=float) for name in names]
    return [np.where(np.abs(column) < 1e100, column, np.nan) for column in columns]
