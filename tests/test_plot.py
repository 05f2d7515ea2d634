"""Figures, and what `plot` makes of a reports folder: those of a made-up healthy run and of a collapsed one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import font_manager, get_data_path, rcParams
from matplotlib.axes import Axes
from matplotlib.offsetbox import AnchoredOffsetbox
from matplotlib.text import Text

from pipeline.errors import UserError
from pipeline.report import cure_figure, cure_page, figures, inputs, page, style
from pipeline.stages import plot
from tests.reports import COLUMNS, EVALUATE, reports
from tests.seal import seal

ROOT = Path(__file__).parents[1]
NAMES = ["collapse", "evaluate", "overview", "reward", "variance"]


@pytest.mark.slow
@pytest.mark.parametrize("collapsed", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_makes_all_figures_with_the_same_bytes(tmp_path: Path, collapsed: bool) -> None:
    """Twice, in another folder, under another hash seed, and beside a user's own matplotlib settings."""
    made = []
    for name, seed in (("a", "1"), ("b", "2")):
        folder = reports(tmp_path / name / "reports", collapsed=collapsed)
        if name == "b":
            (tmp_path / name / "matplotlibrc").write_text("font.size: 33\nsavefig.dpi: 50\n")
        done = subprocess.run(
            [sys.executable, "-m", "pipeline.stages.plot"], cwd=tmp_path / name, capture_output=True, text=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        paths = [*sorted((folder / "figures").glob("*")), folder / "page/report.html"]
        made.append({path.name: path.read_bytes() for path in paths})
    assert made[0] == made[1]
    assert set(made[0]) == {*(f"{name}.png" for name in NAMES), "report.html"}
    for name, content in made[0].items():
        if name.endswith(".png"):
            width, height = (int.from_bytes(content[at : at + 4]) for at in (16, 20))
            assert (width, height) == ((1600, 700) if name == "overview.png" else (1400, 800))
            assert b"Software" not in content
            assert b"tIME" not in content
    text = made[0]["report.html"].decode()
    assert text.count("data:image/png;base64,") == 2 * len(NAMES)  # for wide and for narrow screens
    assert str(tmp_path) not in text
    assert not re.search(r"20\d\d-\d\d|\d\d:\d\d:\d\d|/work|/tmp|/home", re.sub(r"base64,[^\"]+", "", text))


@pytest.mark.parametrize(("steps", "collapsed"), [(1, False), (50, True)])
def test_every_axis_is_labelled_with_its_unit(tmp_path: Path, steps: int, collapsed: bool) -> None:
    data = inputs.load(reports(tmp_path / "reports", steps=steps, collapsed=collapsed, terms=True))
    before = dict(rcParams)
    units = re.compile(r"nats|%|tokens|norm|reward units|L2 distance|each reward")
    for name, figure in plot.draw(data).items():
        labelled = [axes for axes in figure.axes if axes.get_ylabel()]
        assert labelled or name == "evaluate"
        for axes in labelled:
            assert units.search(axes.get_ylabel()), (name, axes.get_ylabel())
        below = {axes.get_xlabel() for axes in figure.axes} - {""}
        wanted = {"evaluate": {"difference of means with 95% interval, units of each reward", "win rate, %"},
                  "reward": {"training step", "held-out, 95% interval"}}  # fmt: skip
        assert below == wanted.get(name, {"training step"})
        words = " ".join(text.get_text() for text in figure.texts)
        assert "recipe stable" in words
        assert "seed 3" in words
        assert "train key 0b5d4045" in words
        assert style.png(figure).startswith(b"\x89PNG")
    assert dict(rcParams) == before


@pytest.mark.parametrize("model", ["pocket", "a-model-with-a-name-of-more-than-forty-letters"])
def test_narrow_figures_fit_a_phone(tmp_path: Path, model: str) -> None:
    """350 pixels wide, their texts are at least 11 pixels high; none is cut off, and no two of them overlap."""
    data = inputs.load(reports(tmp_path / "reports", collapsed=True, terms=True))
    healthy = inputs.load(reports(tmp_path / "healthy"))
    data.run["params"]["model"] = model
    drawn = plot.draw(data, narrow=True) | {"overlay": cure_figure.overlay(data, healthy, narrow=True)}
    for name, figure in drawn.items():
        with style.styled():
            figure.draw_without_rendering()
        for text in figure.findobj(Text):
            assert isinstance(text, Text)
            assert text.get_fontsize() * style.DPI / 72 * 350 / style.NARROW > 10.5, (name, text.get_text())
        legends = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
        apart = [*figure.texts, *legends, *(box for box in figure.findobj(AnchoredOffsetbox))]
        apart += [text for axes in figure.axes if not axes.axison for text in axes.texts]
        boxes = [artist.get_window_extent() for artist in apart] + [axes.bbox for axes in figure.axes if axes.axison]
        for place, box in enumerate([*boxes, *(axes.get_tightbbox() for axes in figure.axes)]):
            assert -1 <= box.x0 < box.x1 <= style.NARROW + 1, (name, place)
            assert -1 <= box.y0 < box.y1 <= figure.get_figheight() * style.DPI + 1, (name, place)
            overlapping = [other for other in boxes[:place] if place < len(boxes) and box.padded(-1).overlaps(other)]
            assert not overlapping, (name, place)


def test_draws_the_values_and_leaves_gaps(tmp_path: Path) -> None:
    data = inputs.load(reports(tmp_path / "reports", collapsed=True))
    figure = figures.collapse(data.history, data.run)
    entropy = figure.axes[0].lines[0]
    np.testing.assert_array_equal(entropy.get_ydata(), data.history["entropy"])
    k3 = figure.axes[1].lines[3].get_ydata()
    assert np.isnan(k3[11])  # infinite
    assert figure.axes[1].get_yscale() == "symlog"
    gap = figure.axes[8]
    assert gap.get_yscale() == "log"
    assert gap.get_ylim()[0] < 1e-7 < 10 < gap.get_ylim()[1]


def test_the_terms_of_a_sum_are_drawn_with_gaps_and_their_moves_add_up(tmp_path: Path) -> None:
    data = inputs.load(reports(tmp_path / "reports", steps=9, terms=True))
    top, bottom = plot.draw(data)["terms"].axes
    near = top.lines[0].get_ydata()
    assert np.isnan(near[0])  # undefined where nothing differs
    assert near[1:].tolist() == [95.5] * 8
    moves = next(line.get_ydata() for line in bottom.lines if line.get_color() == style.INK)
    np.testing.assert_allclose(moves, 3 * 0.02 * np.arange(9))
    legend = top.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        "near, weight 0.02", "length, weight 0.02", "words_2, weight 0.02", "reward",
    ]  # fmt: skip


def test_a_log_scale_is_for_explosions_only(tmp_path: Path) -> None:
    """A decay to zero stays linear; a reward or a gradient that jumps by orders of magnitude does not."""
    healthy = inputs.load(reports(tmp_path / "a/reports"))
    assert {axes.get_yscale() for axes in figures.collapse(healthy.history, healthy.run).axes[:8]} == {"linear"}
    jump = healthy.history.copy()
    jump.loc[30:, ["reward_mean", "baseline"]] = -1e7
    axes = figures.reward(jump, healthy.rewards["embedding"], healthy.run).axes[0]
    assert axes.get_yscale() == "symlog"
    low, high = axes.get_ylim()
    assert low < -1e7 < -5 < high
    assert all(low <= tick <= high for tick in axes.get_yticks())


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (1e-6, "10⁻⁶"), (-1e12, "−10¹²"), (10, "10¹")])
def test_powers_of_ten_need_no_mathtext(value: float, text: str) -> None:
    assert style.power_of_ten(value) == text


def test_the_legend_says_when_the_baseline_holds_the_kl_penalty(tmp_path: Path) -> None:
    data = inputs.load(reports(tmp_path / "reports", steps=2))
    for kl, label in (("none", "baseline"), ("reward_k1", "baseline, less the KL penalty")):
        run = {**data.run, "params": {**data.run["params"], "recipe.kl": kl}}
        axes = figures.reward(data.history, data.rewards["embedding"], run).axes[0]
        legend = axes.get_legend()
        assert legend is not None
        assert [text.get_text() for text in legend.get_texts()][1] == label


def test_constant_and_undefined_columns_still_plot(tmp_path: Path) -> None:
    data = inputs.load(reports(tmp_path / "reports"))
    constant = data.history.copy()
    constant[[name for name in COLUMNS if name != "step"]] = -5.0
    constant.loc[1, "reward_mean"] += 1e-12
    undefined = data.history.copy()
    undefined[[name for name in COLUMNS if name != "step"]] = np.nan
    for table in (constant, undefined):
        drawn = plot.draw(data._replace(history=table))
        for figure in (drawn["reward"], drawn["variance"], drawn["collapse"]):
            assert style.png(figure).startswith(b"\x89PNG")
    low, high = figures.reward(constant, data.rewards["embedding"], data.run).axes[0].get_ylim()
    assert high - low > 0.05


def test_uses_the_font_that_matplotlib_ships() -> None:
    with style.styled():
        assert font_manager.findfont("DejaVu Sans").startswith(get_data_path())


def evaluated(folder: Path, **parts: Any) -> inputs.Inputs:
    """A collapsed run whose rewards' evaluations are changed in these parts."""
    path = reports(folder, collapsed=True) / "evaluate/metrics.json"
    metrics = json.loads(path.read_text())
    for name in ("embedding", "length", "words"):
        for part, change in parts.items():
            metrics[name][part] = metrics[name][part] | change if isinstance(change, dict) else change
    path.write_text(json.dumps(metrics))
    seal(folder)
    return inputs.load(folder)


def test_undefined_evaluation_values_are_shown_as_such(tmp_path: Path) -> None:
    nothing = dict.fromkeys(("mean", "low", "high"))
    data = evaluated(tmp_path / "reports", checkpoint=nothing, policy=nothing, difference=nothing, win_rate=None)
    made = {name: style.png(figure) for name, figure in plot.draw(data).items() if name in ("reward", "evaluate")}
    assert "undefined" in page.render(data, made, made)


def test_one_held_out_prompt_has_no_interval_anywhere(tmp_path: Path) -> None:
    no_interval = {"low": None, "high": None}
    data = evaluated(tmp_path / "reports", checkpoint=no_interval, policy=no_interval, difference=no_interval)
    drawn = plot.draw(data)
    for name in ("reward", "evaluate"):
        texts = [text.get_text() for text in drawn[name].findobj(Text)]
        assert not [text for text in texts if "interval" in text]
        assert any("one prompt" in text for text in texts)
    left = drawn["evaluate"].axes[0]
    assert [list(line.get_xdata()) for line in left.lines] == [[0, 0], pytest.approx([-5.4])]
    assert "undefined" not in [text.get_text() for text in left.texts]
    pages = [page.render(data, *2 * [dict.fromkeys(drawn, b"")]), cure_page.render(data, data, b"", b"", "cure-1")]
    for made in pages:
        assert "interval" not in re.sub("<(script|style).*?</(script|style)>", "", made, flags=re.DOTALL)
        assert "one held-out prompt" in made


@pytest.mark.parametrize("collapsed", [False, True])
def test_the_onset_is_marked_in_every_panel_over_training_steps(tmp_path: Path, collapsed: bool) -> None:
    """A line from bottom to top at each finding's onset, and its name; none in a healthy run or a held-out panel."""

    def onsets(axes: Axes) -> list[float]:
        upright = [line for line in axes.lines if list(line.get_ydata()) == [0, 1] and line.get_color() == style.INK]
        return [line.get_xdata()[0] for line in upright]

    data = inputs.load(reports(tmp_path / "reports", collapsed=collapsed))
    for name, figure in plot.draw(data).items():
        marked = {"overview": 4, "reward": 1, "variance": 2, "collapse": 9, "evaluate": 0}[name] if collapsed else 0
        assert [found for axes in figure.axes for found in onsets(axes)] == [1, 4] * marked
        assert ("onsets, steps 1, 4" in " ".join(text.get_text() for text in figure.texts)) == bool(marked)


SAMPLE = (
    '{"step": 0, "prompt": "a", "completion": "b", "reward": 0, "advantage": 0, "tokens": [1, 2],'
    ' "pieces": %s, "token_logprobs": [-1, null], "ended": false}\n'
)
BROKEN = {
    "train/history.csv": ["", "step,reward_mean\n0,1\n", "a,b\n1,2,3\n1\n"],
    "train/run.json": ["{", "[]", '{"train_key": 1}'],
    "train/samples.jsonl": ["{}\n", "nope\n", SAMPLE % '["a"]', SAMPLE % '["a", 3]'],
    "train/samples/kept.json": ["{", '{"keep_samples": "most", "completions": 3}'],
    "evaluate/metrics.json": ["{}", '{"embedding": {"checkpoint": 1}}'],
    "evaluate/completions.jsonl": ['{"prompt": 3}\n', "[1\n"],
    "train/heldout.jsonl": ['{"step": "a"}\n'],
    "train/terms.jsonl": ['{"step": 0}\n', "nope\n"],
    "evaluate/curve.jsonl": ["{}\n"],
    "prepare.json": ["3"],
    "diagnosis.json": ["{", '{"verdict": "healthy"}'],
}
STAGES = {"prepare.json": "prepare", "diagnosis.json": "diagnose"}  # the folders are named as theirs


@pytest.mark.parametrize("name", BROKEN)
def test_a_missing_or_broken_file_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = reports(tmp_path / "reports", steps=2) / name
    monkeypatch.chdir(tmp_path)
    for content in (None, *BROKEN[name]):
        path.unlink() if content is None else path.write_text(content)
        with pytest.raises(UserError) as raised:
            plot.main()
        message = str(raised.value)
        assert message.startswith(f"reports/{name}"), message
        assert f"run `dvc repro {STAGES.get(name, name.split('/')[0])}`" in message
        assert "\n" not in message.strip()
        assert not (tmp_path / "reports/page/report.html").exists()
        assert not (tmp_path / "reports/figures").exists()


def test_a_sample_without_a_finite_advantage_is_still_shown(tmp_path: Path) -> None:
    """What `train` writes of a diverged step."""
    path = reports(tmp_path / "reports", steps=3) / "train/samples.jsonl"
    rows = [json.loads(line) | {"advantage": None} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seal(tmp_path / "reports")
    assert len(inputs.load(tmp_path / "reports").samples) == len(rows)


def test_a_number_that_is_none_names_its_line(tmp_path: Path) -> None:
    path = reports(tmp_path / "reports", steps=3) / "train/history.csv"
    table = pd.read_csv(path).astype({"entropy": object})
    table.loc[1, "entropy"] = "high"
    table.to_csv(path, index=False)
    with pytest.raises(UserError, match=r"history.csv: not what the stage writes: line 3: .*'high'"):
        inputs.load(tmp_path / "reports")


def test_imports_neither_torch_nor_mlflow() -> None:
    code = (
        "import sys, pipeline.stages.plot; heavy = {'torch', 'mlflow', 'transformers', 'matplotlib.pyplot'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_metric_has_an_entry() -> None:
    """docs/METRICS.md: a table row per key with formula, unit, healthy range, source and the names elsewhere."""
    table = (ROOT / "docs/METRICS.md").read_text(encoding="utf-8")
    for name in [*COLUMNS, *EVALUATE]:
        (row,) = re.findall(rf"^\| `{name}` \|.*$", table, re.MULTILINE)
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
        assert len(cells) in (5, 8), row
        assert all(cells), row
