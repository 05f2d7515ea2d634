"""One look for every figure: colours, axes, the footer, and PNG bytes that depend on the data alone."""

import contextlib
import functools
import io
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, PackerBase, TextArea, VPacker
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

P = ParamSpec("P")

# Okabe & Ito's palette, told apart by every common kind of colour vision.
BLUE, ORANGE, GREEN, RED, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
INK, GREY, PALE = "#222222", "#666666", "#DDDDDD"
STEPS_AXIS = "training steps"  # marks the axes that `steps_axis` made
DPI = 100  # 12 pt are 17 px: still readable when the figure is shown at half its size
NARROW = 500  # pixels: a figure for a phone, whose screen is some 350 wide; its text is then 12 px high
NARROW_DPI = 150  # phones have two or three dots to a pixel
LEGEND_CHARACTERS = 38  # of a line over a narrow figure's panel, in bold type
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, section 2.2
STYLE = {
    "font.family": ["DejaVu Sans"],  # the one that matplotlib ships
    "font.size": 13,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a name starts no formula
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlesize": 13.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-7, 7),
    "axes.xmargin": 0.02,
    "grid.color": "#ECECEC",
    "grid.linewidth": 1.0,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "lines.linewidth": 2.2,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "figure.facecolor": "white",
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
    "svg.hashsalt": "reinforce",  # else the ids in the SVG are random
}


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """The style above on matplotlib's own defaults: a user's matplotlibrc changes no byte, and nothing leaks out."""
    with matplotlib.style.context([STYLE], after_reset=True):
        yield


def figure_function(function: Callable[P, Figure]) -> Callable[P, Figure]:
    """Decorator: make the figure that a function returns in our style."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with styled():
            return function(*args, **kwargs)

    return wrapped


def canvas(width: int, height: int, title: str, footer: str) -> Figure:
    """An empty figure of width x height pixels, with its title above and its source below.

    Both are broken into lines that fit; a narrow figure has room for two notes below its title.
    """
    title, footer = textwrap.fill(title, width // 17), textwrap.fill(footer, int(width / 8.2))
    bottom, top = (38 + 17 * footer.count("\n")) / height, (52 + 29 * title.count("\n")) / height
    top += 36 / height if width <= NARROW else 0
    layout = ConstrainedLayoutEngine(rect=(0.006, bottom, 0.988, 1 - bottom - top), w_pad=0.08, h_pad=0.06)
    figure = Figure(figsize=(width / DPI, height / DPI), layout=layout)
    figure.text(18 / width, 1 - 14 / height, title, ha="left", va="top", fontsize=18, fontweight="bold")
    figure.text(18 / width, 12 / height, footer, ha="left", va="bottom", fontsize=11, color=GREY)
    return figure


def is_narrow(drawn: Figure | Axes) -> bool:
    figure = drawn.get_figure(root=True)
    return figure is not None and figure.get_figwidth() * DPI <= NARROW


def note(figure: Figure, text: str, row: int, **options: Any) -> None:
    """A note in the first or second row: right of the title, or below it where the figure is narrow."""
    height = figure.get_figheight() * DPI
    place: tuple[float, float, str] = (0.987, 1 - (14.4 if row == 0 else 35) / height, "right")
    if is_narrow(figure):
        above = 46 + 29 * figure.texts[0].get_text().count("\n") + 18 * row
        place = (18 / NARROW, 1 - above / height, "left")
    x, y, side = place
    with styled():
        figure.text(x, y, text, ha=side, va="top", **options)


def png(figure: Figure) -> bytes:
    """The figure as PNG. No software version and no date in it, so that equal data give equal bytes."""
    buffer = io.BytesIO()
    with styled():
        dpi = NARROW_DPI if is_narrow(figure) else DPI
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def svg(figure: Figure) -> str:
    """The figure as SVG, its letters as shapes: it looks the same in every browser. Equal data give equal text."""
    text = io.StringIO()
    with styled():
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return NOT_XML.sub("\ufffd", text.getvalue())  # a parameter may hold any character


def line(
    axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, *, dashes: bool = False, error: np.ndarray | None = None
) -> Line2D:
    """y over x with an optional band y ± error. Undefined values are gaps; a point alone between gaps gets a dot."""
    (drawn,) = axes.plot(x, y, color=colour, linestyle=(0, (3, 1.6)) if dashes else "-", zorder=3)
    defined = np.isfinite(y)
    padded = np.concatenate(([False], defined, [False]))
    alone = defined & ~padded[:-2] & ~padded[2:]
    axes.plot(x[alone], y[alone], color=colour, linestyle="none", marker="D" if dashes else "o", markersize=8, zorder=4)
    if error is not None:
        axes.fill_between(x, y - error, y + error, color=colour, alpha=0.28, linewidth=0, zorder=2)
        axes.errorbar(x[alone], y[alone], error[alone], color=colour, linestyle="none", capsize=5, zorder=3)
    return drawn


def inline_legend(axes: Axes, entries: Sequence[tuple[str, str]]) -> None:
    """A panel's title that is also its legend: the name of each line in its colour, behind a piece of the line.

    The names stand side by side, or one below the other if they are too long for a narrow figure.
    """
    dashes = ["━ ", "╍ "] if len(entries) > 1 else [""]
    texts = [mark + text for mark, (text, _) in zip(dashes, entries, strict=True)]
    stacked = is_narrow(axes) and sum(map(len, texts)) > LEGEND_CHARACTERS
    if stacked:
        texts = [textwrap.fill(text, LEGEND_CHARACTERS) for text in texts]
    parts: list[Artist] = [
        TextArea(text, textprops={"color": colour, "fontsize": 13, "fontweight": "bold"})
        for text, (_, colour) in zip(texts, entries, strict=True)
    ]
    box: PackerBase = (
        VPacker(children=parts, sep=4, pad=0, align="left")
        if stacked
        else HPacker(children=parts, sep=14, pad=0, align="baseline")
    )
    title = AnchoredOffsetbox(
        "lower left",
        child=box,
        frameon=False,
        pad=0,
        borderpad=0,
        bbox_to_anchor=(0, 1.03),
        bbox_transform=axes.transAxes,
    )
    title.set_in_layout(False)  # a long one must not squeeze its panel; a plain empty title keeps the room
    axes.add_artist(title)
    axes.set_title("\n".join(" " for line in "\n".join(texts).split("\n")) if stacked else " ")


def steps_axis(axes: Axes, steps: np.ndarray, label: bool = True) -> None:
    """Whole training steps; the limits hold one step as well as a thousand."""
    margin = max(0.5, 0.02 * float(steps[-1] - steps[0]))
    axes.set_xlim(steps[0] - margin, steps[-1] + margin)
    axes.set_gid(STEPS_AXIS)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    if label:
        axes.set_xlabel("training step")


def mark_onsets(figure: Figure, onsets: Sequence[int]) -> None:
    """Thin lines at the steps where findings of the verdict set in, through every panel over training steps."""
    panels = [axes for axes in figure.axes if axes.get_gid() == STEPS_AXIS]
    steps = sorted(set(onsets))
    if not steps or not panels:
        return
    for axes in panels:
        for step in steps:
            axes.axvline(step, color=INK, linewidth=1.1, alpha=0.75, zorder=1.5)
    text = f"vertical line: onset, step {steps[0]}"
    if len(steps) > 1:
        text = f"vertical lines: onsets, steps {', '.join(map(str, steps))}"
    note(figure, text, row=1, fontsize=12)


def share_axis(axes: Axes, label: str) -> None:
    """From 0 to 100 percent, always: shares compare between runs only on one scale."""
    axes.set_ylim(-0.04, 1.04)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}"))
    axes.set_ylabel(f"{label}, %")


def value_axis(axes: Axes, label: str, *values: np.ndarray, typical: float = 0.0) -> None:
    """Linear, and never a zoom into rounding noise; a signed log scale where a value explodes.

    A value explodes when it is 300 times as large as the first five were (or as `typical`, where they start at zero).
    """
    finite = [series[np.isfinite(series)] for series in values]
    first = np.abs(np.concatenate([series[:5] for series in finite]))
    start = max(float(np.median(first[first > 0])) if (first > 0).any() else 0.0, typical)
    everything = np.concatenate(finite)
    if start and everything.size and np.abs(everything).max() > 300 * start:
        _signed_log(axes, start, float(everything.min()), float(everything.max()))
        axes.set_ylabel(f"{label}, log scale")
        return
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axes.set_ylabel(label)
    low, high = axes.get_ylim()
    least = 0.02 * max(abs(low), abs(high), 1e-6)
    if high - low < least:
        axes.set_ylim((low + high - least) / 2, (low + high + least) / 2)


def _signed_log(axes: Axes, start: float, low: float, high: float) -> None:
    """Linear up to `start`, powers of ten beyond it, about four of them labelled on a side."""
    first, last = math.ceil(math.log10(start)), math.floor(math.log10(max(-low, high)))
    axes.set_yscale("symlog", linthresh=start, linscale=max(0.6, (last - first) / 8))
    bottom, top = (3 * low if low < -start else -0.15 * start), (3 * high if high > start else start)
    axes.set_ylim(bottom, top)
    powers = [10.0**power for power in range(last, first - 1, -max(1, math.ceil((last - first + 1) / 4)))]
    ticks = [0.0, *powers, *(-power for power in powers)]
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if bottom <= tick <= top]))
    axes.yaxis.set_major_formatter(FuncFormatter(power_of_ten))
    axes.yaxis.set_minor_locator(NullLocator())


def power_of_ten(value: float, _: int = 0) -> str:
    """A tick such as −10⁻⁶, without matplotlib's mathtext."""
    if value == 0:
        return "0"
    power = str(round(math.log10(abs(value)))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{'−' if value < 0 else ''}10{power}"


def start_line(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str) -> None:
    """The reference's value: the batch of step 0 is sampled before the first update."""
    if steps[0] == 0 and len(steps) > 1 and np.isfinite(values[0]):
        axes.axhline(values[0], color=colour, linewidth=1.3, linestyle=":", alpha=0.8, zorder=1)


def signed(value: float | None, digits: int = 3) -> str:
    """A number as text with a proper minus sign; what is undefined says so."""
    return "undefined" if value is None else f"{value:#.{digits}g}".removesuffix(".").replace("-", "−")


def footer(run: dict[str, Any], source: Path | str) -> str:
    """The text that leads from a figure back to its stage, parameters, seed and run."""
    params = run["params"]
    names = ("recipe", "reward", "model", "seed")
    chosen = "   ·   ".join(f"{name} {str(params[name])[:40]}" for name in names)
    return f"{chosen}   ·   train key {run['train_key'][:8]}   ·   from {source}"
