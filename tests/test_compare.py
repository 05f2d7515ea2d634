"""`reinforce compare`: made-up trainings whose table is worked out by hand or by pandas, DVC's record as git holds
it, and what the command refuses. tests/test_sweep.py compares real experiments."""

import dataclasses
import hashlib
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import matplotlib.collections
import numpy as np
import pandas as pd
import pytest
from ruamel.yaml import YAML
from scipy import stats

from pipeline.__main__ import build_parser
from pipeline.commands import compare
from pipeline.config.load import validate_params
from pipeline.config.schema import SELECTORS
from pipeline.errors import UserError
from pipeline.report import comparison, comparison_figure, style
from pipeline.report.comparison import configurations, differing, format_mean_std, natural, verdicts
from pipeline.runs.provenance import params_digests
from pipeline.tracking import mlflow_store, summaries
from pipeline.tracking.summaries import RunSummary
from tests.browser import CHROMIUM
from tests.project import ROOT, Project
from tests.seal import sha256

STEPS = 8
PARAMS = {
    "model": "pocket", "reward": "embedding", "recipe": "stable", "reward.kind": "embedding",
    "recipe.lr": "0.0001", "train.steps": "8",
}  # fmt: skip


def history(seed: int = 0, steps: int = STEPS, shift: float = 0.0) -> pd.DataFrame:
    drawn = np.random.default_rng(seed).normal(size=(3, steps))
    return pd.DataFrame({
        "reward_mean": -6 + shift + 0.1 * np.arange(steps) + 0.2 * drawn[0], "entropy": 3 + 0.1 * drawn[1],
        "distinct_completions": 0.9 + 0.01 * drawn[2], "lr": 1e-4,
    })  # fmt: skip


def made(seed: int = 0, table: pd.DataFrame | None = None, **changes: Any) -> RunSummary:
    """A training; `params` are changes of PARAMS, None takes one out."""
    table = history(seed) if table is None else table
    params = PARAMS | {"seed": str(seed)} | changes.pop("params", {})

    def curve(column: str) -> dict[int, float]:
        return {step: float(value) for step, value in enumerate(table[column]) if math.isfinite(value)}

    params = {key: value for key, value in params.items() if value is not None}
    default = RunSummary(
        name=f"s{seed}", params=params, config=json.dumps(sorted(set(params.items()) - {("seed", str(seed))})),
        code="c", data="d",
        made=seed, columns=frozenset(table.columns), curve=curve, gain=0.25 * seed,
        gain_interval=(0.25 * seed - 0.5, 0.25 * seed + 0.5), kinds=(), onset=None,
        measured="m",
    )  # fmt: skip
    return default._replace(**changes)


def rows_of(text: str) -> list[dict[str, str]]:
    return pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False).to_dict("records")


# --- configurations


def test_the_numbers_are_those_of_pandas() -> None:
    tables = {
        (recipe, seed): history(10 * seed + len(recipe)) for recipe in ("notebook", "stable") for seed in range(3)
    }
    found, _ = configurations(
        made(seed, table, params={"recipe": recipe}, gain=seed**2) for (recipe, seed), table in tables.items()
    )
    rows = rows_of(comparison.table_csv(found))
    assert [row["recipe"] for row in rows] == ["notebook", "stable"]
    for row in rows:
        of_recipe = [tables[row["recipe"], seed] for seed in range(3)]
        for name, column, factor in (
            ("training_reward", "reward_mean", 1), ("entropy", "entropy", 1), ("different", "distinct_completions", 100)
        ):  # fmt: skip
            ends = pd.Series([factor * table[column].tail(5).mean() for table in of_recipe])
            assert float(row[f"{name}_mean"]) == pytest.approx(ends.mean(), rel=1e-12)
            assert float(row[f"{name}_std"]) == pytest.approx(ends.std(), rel=1e-12)
        assert (float(row["held_out_gain_mean"]), float(row["held_out_gain_std"])) == pytest.approx(
            (5 / 3, 2.0816659995)
        )
        assert (row["seeds"], row["steps"], row["experiments"]) == ("0 1 2", "8", "s0 s1 s2")


def test_the_band_is_the_standard_deviation_over_seeds_of_each_step() -> None:
    tables = [history(seed) for seed in range(4)]
    found, _ = configurations(made(seed, table) for seed, table in enumerate(tables))
    rows = pd.read_csv(io.StringIO(comparison.curves_csv(found, "entropy")))
    together = pd.concat([table["entropy"] for table in tables], axis=1)
    assert rows["entropy_mean"].to_list() == pytest.approx(together.mean(axis=1).to_list(), rel=1e-12)
    assert rows["entropy_std"].to_list() == pytest.approx(together.std(axis=1).to_list(), rel=1e-12)
    assert rows["step"].to_list() == list(range(STEPS))

    (axes, *_) = comparison_figure.curves(found, "entropy", "a test").axes
    (band,) = [each for each in axes.collections if isinstance(each, matplotlib.collections.PolyCollection)]
    drawn = band.get_paths()[0].vertices
    for step, mean, std in zip(rows["step"], rows["entropy_mean"], rows["entropy_std"], strict=True):
        edges = drawn[drawn[:, 0] == step][:, 1]
        assert (edges.min(), edges.max()) == pytest.approx((mean - std, mean + std))
    assert axes.lines[0].get_ydata() == pytest.approx(rows["entropy_mean"].to_list())


def test_one_seed_has_no_deviation() -> None:
    found, _ = configurations([made(0)])
    (row,) = rows_of(comparison.table_csv(found))
    assert row["training_reward_std"] == row["held_out_gain_std"] == ""
    assert "n=1" in comparison.markdown(found)
    assert "±" not in comparison.markdown(found)
    assert "deviation" not in comparison.legend(found)
    assert " +0.00 (−0.5 to +0.5) " in comparison.markdown(found), "the interval over prompts is all there is"
    figure = comparison_figure.curves(found, "reward_mean", "a test")
    assert not figure.axes[0].collections
    assert "deviation" not in figure.get_suptitle() + "".join(text.get_text() for text in figure.texts)


def test_the_table_has_the_numbers_of_each_seed() -> None:
    found, _ = configurations([made(0), made(1, gain_interval=None), made(2)])
    (row,) = rows_of(comparison.table_csv(found))
    assert (row["seeds"], row["held_out_gain_by_seed"]) == ("0 1 2", "0.0 0.25 0.5")
    assert (row["gain_low_by_seed"], row["gain_high_by_seed"]) == ("-0.5 - 0.0", "0.5 - 1.0")
    rewards = [float(value) for value in row["training_reward_by_seed"].split()]
    assert rewards == pytest.approx([history(seed)["reward_mean"][-5:].mean() for seed in range(3)])
    assert "deviation over seeds" in comparison.legend(found)
    figure = comparison_figure.curves(found, "reward_mean", "a test")
    assert "deviation over seeds" in figure.get_suptitle() + "".join(text.get_text() for text in figure.texts)


def test_runs_of_other_lengths_and_undefined_steps() -> None:
    """The last steps are each run's own; a step's mean is over the seeds that have come that far."""
    short, gap = history(1, steps=6), history(2)
    gap.loc[3, "reward_mean"] = math.nan
    gap.loc[7, "reward_mean"] = math.inf
    found, _ = configurations([made(1, short), made(2, gap)])
    (row,) = rows_of(comparison.table_csv(found))
    ends = [
        short["reward_mean"].iloc[1:6].mean(),
        gap["reward_mean"].iloc[4:7].mean(),
    ]  # four of the last five, less one
    assert float(row["training_reward_mean"]) == pytest.approx(np.mean([ends[0], ends[1]]))
    assert row["steps"] == "6 to 8"
    by_step = {int(each["step"]): each for each in rows_of(comparison.curves_csv(found, "reward_mean"))}
    assert (by_step[3]["seeds"], by_step[3]["reward_mean_std"]) == ("1", "")
    assert float(by_step[6]["reward_mean_mean"]) == pytest.approx(gap["reward_mean"][6])
    assert set(by_step) == set(range(7))
    style.png(comparison_figure.curves(found, "reward_mean", "a test"))


def test_only_what_differs_is_shown() -> None:
    """What a selected table holds differs with the selector; under one selector it is named."""
    assert differing([PARAMS, PARAMS]) == []
    notebook = PARAMS | {"recipe": "notebook", "recipe.lr": "0.0003"}
    assert differing([PARAMS, notebook]) == ["recipe"]
    assert differing([PARAMS, notebook, PARAMS | {"recipe.lr": "3e-05"}]) == ["recipe", "recipe.lr"]
    step = PARAMS | {"model.source": "models/local/step1000"}
    assert differing([step, PARAMS | {"model.source": "models/local/step2000"}]) == ["model.source"]
    assert differing([PARAMS, PARAMS | {"train.steps": "9"}]) == ["train.steps"]
    assert differing([PARAMS, PARAMS | {"reward.target": "Hi"}]) == ["reward.target"]  # absent from one


def test_configurations_come_in_the_order_of_their_values() -> None:
    revisions = ["step1000", "step16000", "step143000", "step512"]
    found, _ = configurations(made(0, params={"model.revision": revision}) for revision in revisions)
    assert [each.shown["model.revision"] for each in found] == ["step512", "step1000", "step16000", "step143000"]
    assert sorted(["0.0001", "3e-05", "10", "9"], key=natural) == ["3e-05", "0.0001", "9", "10"]


def test_a_training_counts_once() -> None:
    again = made(0, name="again", made=5.0, gain=9.0)
    found, left_out = configurations([made(0), again, made(1)])
    assert (len(found), left_out) == (1, 1)
    assert [training.name for training in found[0].trainings] == ["again", "s1"]


def test_seeds_of_other_code_are_not_mixed() -> None:
    """Of one configuration what the newest code made; another configuration keeps what it has."""
    old = [made(seed, code="old", made=1.0) for seed in range(3)]
    new = [made(seed, code="new", made=2.0, name=f"new{seed}") for seed in range(2)]
    other = made(0, code="old", made=1.0, params={"recipe": "notebook"})
    found, left_out = configurations([*old, *new, other])
    assert [[training.name for training in each.trainings] for each in found] == [["s0"], ["new0", "new1"]]
    assert left_out == 3
    found, _ = configurations([made(0, data="old", made=1.0), made(1, data="new", made=2.0)])
    assert [training.name for training in found[0].trainings] == ["s1"]


def test_verdicts_are_counted_in_the_words_of_the_report() -> None:
    def of(*ends: tuple[tuple[str, ...] | None, int | None]) -> str:
        found, _ = configurations(made(seed, kinds=kinds, onset=onset) for seed, (kinds, onset) in enumerate(ends))
        return verdicts(found[0])

    assert of(((), None), ((), None)) == "2 healthy"
    assert of((("empty",), 8), ((), None), (("empty",), 8)) == "1 healthy, 2 empty completions from step 8"
    assert of((("empty",), 9), (("empty",), 8)) == "2 empty completions from step 8–9"
    hacked = ("misaligned", "hacking", "empty")
    assert of((hacked, 0), (("misaligned", "empty"), 0)) == (
        "2 misaligned objective from step 0 (then 2 empty completions, 1 reward hacking)"
    )
    assert of((None, None)) == "1 not diagnosed"


@pytest.mark.parametrize(
    ("mean", "std", "text"),
    [(-5.5283, 0.0912, "−5.53 ± 0.09"), (21.4, 0.41, "21.4 ± 0.4"), (0.0, 0.0, "0.00 ± 0.00"), (0.123, None, "0.12"),
     (0.00123, 0.0004, "0.0012 ± 0.0004"), (12345.6, 12.3, "12346 ± 12"), (None, None, "")],
)  # fmt: skip
def test_numbers_as_text(mean: float | None, std: float | None, text: str) -> None:
    assert format_mean_std(comparison.Spread(mean, std, 2)) == text


def test_the_markdown_is_a_table_whatever_the_parameters_say() -> None:
    found, _ = configurations(made(0, params={"reward.target": target}) for target in ("a | b", "two\nlines", "c"))
    lines = comparison.markdown(found).splitlines()
    assert len(lines) == 5
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert len({len(line) for line in lines}) == 1


def test_a_number_that_some_seeds_lack_says_of_how_many_it_is() -> None:
    found, _ = configurations([made(0, gain=None), made(1), made(2)])
    assert "+0.38 ± 0.18 (n=2)" in comparison.markdown(found)


def test_the_end_is_that_of_the_summary() -> None:
    from pipeline.rl.state import SUMMARY_STEPS

    assert comparison.LAST_STEPS == SUMMARY_STEPS


# --- the figure


def sweep(size: int, rewards: tuple[str, ...] = ("embedding",)) -> list[comparison.Configuration]:
    return configurations(
        made(
            seed,
            history(seed, shift=place),
            params={"recipe": f"recipe-{place}", "reward": reward, "reward.kind": reward},
        )
        for place in range(size)
        for reward in rewards
        for seed in range(2)
    )[0]


@pytest.mark.parametrize(("size", "rewards"), [(1, 1), (2, 1), (8, 1), (2, 2), (8, 3), (16, 1)])
def test_every_configuration_has_a_line_of_its_own_and_an_entry_that_fits(size: int, rewards: int) -> None:
    found = sweep(size, ("embedding", "length", "words")[:rewards])
    figure = comparison_figure.curves(found, "reward_mean", "a test")
    content = style.png(figure)
    assert content == style.png(comparison_figure.curves(found, "reward_mean", "a test"))
    panels = [axes for axes in figure.axes if axes.get_gid() == style.STEPS_AXIS]
    assert len(panels) == rewards
    for axes in panels:
        looks = [
            (line.get_color(), str(line._unscaled_dash_pattern)) for line in axes.lines if line.get_linewidth() > 2
        ]
        assert len({look for look in looks if look[1]}) >= min(size, comparison_figure.LOOKS)
    width, height = figure.get_size_inches() * style.DPI
    boxes = [text.get_window_extent() for axes in figure.axes for text in axes.texts]
    assert len(boxes) == 2 * size * rewards
    for place, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.x1 <= width
        assert 0 <= box.y0 < box.y1 <= height
        assert not any(box.overlaps(other.padded(-1)) for other in boxes[place + 1 :])


def test_a_configuration_looks_alike_in_every_panel() -> None:
    """Also where one panel lacks the first of them."""
    (first, *others) = sweep(3, ("embedding", "length"))
    figure = comparison_figure.curves(
        [*others, first._replace(params=first.params | {"reward": "words"})], "reward_mean", "a test"
    )
    fewer, whole, _ = ([line.get_color() for line in axes.lines if line.get_linewidth() > 2 and len(line.get_xdata())]
                       for axes in figure.axes if axes.get_gid() == style.STEPS_AXIS)  # fmt: skip
    assert (len(fewer), len(whole)) == (2, 3)
    assert fewer == whole[1:]
    assert len(set(whole)) == 3


# --- the command

Say = Callable[..., str]


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """Runs the command on these trainings in an empty folder; gives what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(found: list[RunSummary], *arguments: str) -> str:
        monkeypatch.setattr(compare, "from_mlflow", lambda: found)
        compare.main(build_parser().parse_args(["compare", *arguments]))
        return capsys.readouterr().out

    return run


def test_what_is_written_and_printed(say: Say, tmp_path: Path) -> None:
    printed = say([made(0), made(1), made(1, name="older", made=-1)])
    assert sorted(path.name for path in (tmp_path / "reports/compare").iterdir()) == [
        "curves.csv", "curves.svg", "differences.csv", "table.csv", "table.md"
    ]  # fmt: skip
    table, _, legend = (tmp_path / "reports/compare/table.md").read_text().partition("\n\n")
    assert table in printed
    assert legend.strip() in printed
    assert "1 more left out" in printed
    picture = (tmp_path / "reports/compare/curves.svg").read_text()
    say([made(0), made(1), made(1, name="older", made=-1)])
    assert (tmp_path / "reports/compare/curves.svg").read_text() == picture


@pytest.mark.filterwarnings("ignore:Glyph")  # of a control character
def test_whatever_a_parameter_says_the_figure_can_be_opened(say: Say, tmp_path: Path) -> None:
    hostile = "a--><script>x</script>\x1b[31m&\ufffe $x$"
    say([made(0, params={"reward": hostile}), made(0, params={"recipe.lr": hostile})])
    tree = ElementTree.fromstring((tmp_path / "reports/compare/curves.svg").read_text())
    assert {element.tag.partition("}")[2] for element in tree.iter()} == {
        "svg",
        "defs",
        "style",
        "clipPath",
        "rect",
        "g",
        "path",
        "use",
    }


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium: apt-get install chromium")
def test_a_browser_shows_a_curve_of_each_experiment(say: Say, tmp_path: Path, chromium: Any) -> None:
    """Offline: as many as there are, in the figure and not on top of each other; two rewards have two panels."""
    drawn = """[...document.querySelectorAll("g[id*=-curve-] > path")].map(path => {
        const {left, right, top, bottom} = path.getBoundingClientRect();
        const inside = left > 0 && right < innerWidth && top > 0 && bottom < innerHeight;
        const colour = getComputedStyle(path).stroke;
        return {length: path.getTotalLength(), inside, colour, d: path.getAttribute("d")};
    })"""
    first, second = (
        made(0, history(0, shift=place), name=f"exp-{place}", params={"recipe.lr": lr})
        for place, lr in enumerate(("0.0001", "0.0003"))
    )
    other = made(0, history(1), name="exp-2", params={"reward": "length", "reward.kind": "length"})
    for found in ([first, second], [first], [first, second, other]):
        say(found, *(training.name for training in found))
        context = chromium.new_context(viewport={"width": 1400, "height": 1000}, offline=True)
        tab = context.new_page()
        asked: list[str] = []
        tab.on("request", lambda request, asked=asked: asked.append(request.url))
        address = (tmp_path / "reports/compare/curves.svg").as_uri()
        tab.goto(address)
        curves = tab.evaluate(drawn)
        context.close()
        assert asked == [address]
        assert len(curves) == len({curve["d"] for curve in curves}) == len(found)
        assert all(curve["length"] > 300 and curve["inside"] for curve in curves)
        assert len({curve["colour"] for curve in curves}) == min(2, len(found))


def test_another_folder_keeps_what_is_in_it(say: Say, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    say([made(0)], "--out", "mine")
    assert (tmp_path / "mine/notes.txt").read_text() == "keep"
    assert not (tmp_path / "reports").exists()


def test_configurations_of_other_code_stand_side_by_side_with_a_note(say: Say) -> None:
    assert "versions of the code" not in say([made(0), made(0, params={"recipe": "notebook"})])
    printed = say([made(0), made(0, code="other", params={"recipe": "notebook"})])
    assert "note: 2 versions of the code or of custom/ made these" in printed


def test_the_same_parameters_with_other_files_get_a_note(say: Say) -> None:
    notebook = {"recipe": "notebook"}
    assert "note:" not in say([made(0), made(0, params=notebook)])
    printed = say([made(0), made(0, params=notebook, data="other")])
    assert "note: prompts or checkpoints of the same parameters were not always the same files" in printed
    elsewhere = {"prompts": "mine", **notebook}
    assert "note:" not in say([made(0), made(0, params=elsewhere, data="other", measured="other")]), "as they should be"


def test_gains_that_were_measured_otherwise_are_not_averaged(say: Say) -> None:
    seeds = [made(seed, gain=float(seed), measured="few" if seed == 1 else "many") for seed in range(3)]
    found, left_out = configurations(seeds)
    gains = comparison.number(found[0], "held-out gain")
    assert (gains.mean, gains.seeds, left_out) == (1.0, 2, 0)
    assert len(found[0].trainings) == 3, "the training itself counts"
    assert "(n=2)" in comparison.markdown(found)
    two = [made(0, measured="few", made=9), made(1, measured="many", made=0)]
    for pair in (two, [two[0]._replace(made=0), two[1]._replace(made=9)]):  # whichever record says which was later
        assert [each.gain for each in configurations(pair)[0][0].trainings] == [0.0, None]
    other = made(0, params={"recipe": "notebook"}, measured="few")
    for several in (seeds, [made(0), other]):
        assert "note: held-out gains were measured on different prompts" in say(several)
    assert "note:" not in say([made(0), other._replace(measured="m")])
    printed = say([made(0), other])
    assert "note: held-out gains were measured on different prompts, or with other `evaluate` parameters" in printed
    assert "note:" not in say([made(0), made(0, params={"recipe": "notebook"}, measured=None, gain=None)])


def test_a_file_in_the_place_of_a_folder_is_one_line(say: Say) -> None:
    Path("taken").touch()
    for out in ("taken", "taken/below"):
        with pytest.raises(UserError, match=f"^{out}/table.md cannot be written: (File exists|Not a directory)"):
            say([made(0)], "--out", out)


def test_names_and_conditions_choose(say: Say) -> None:
    lr = [made(0, name=f"lr{value}", params={"recipe.lr": value}) for value in ("0.0001", "3e-05", "0.001")]
    seeds = [made(seed, params={"recipe": "notebook"}) for seed in range(3)]

    def experiments(*arguments: str) -> str:
        say(lr + seeds, *arguments)
        rows = rows_of(Path("reports/compare/table.csv").read_text())
        return " ".join(row["experiments"] for row in rows)

    assert experiments("lr0.001", "s2") == "s2 lr0.001"
    assert experiments("--where", "recipe.lr=3e-5,0.001") == "lr3e-05 lr0.001"
    assert experiments("--where", "recipes.stable.lr=3e-5,0.001") == "lr3e-05 lr0.001"
    assert experiments("--where", "recipe=notebook", "--where", "seed=1,2") == "s1 s2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--metric", "reward_men"],
            r"^--metric 'reward_men': history.csv has no such column; did you mean 'reward_mean'\?$",
        ),
        (
            ["--where", "recip=stable"],
            r"^--where 'recip=stable': no run has a parameter 'recip'; did you mean 'recipe'\?$",
        ),
        (["--where", "recipe"], "should be KEY=VALUE"),
        (["--where", "lr=0.0003"], r"no run has a parameter 'lr'; did you mean 'recipe.lr'\?$"),
        (["--where", "recipes.mine.lr=0.0003"], r"no run is left"),
        (["--metric", "reward"], r"no such column; did you mean 'reward_mean'\?$"),
        (["--where", "recipe=mine"], "no run is left; the values of recipe are stable"),
        (["s00"], r"^there is no finished experiment 's00'; did you mean 's0'\?$"),
    ],
)
def test_what_is_not_there_is_named_with_what_is_near(say: Say, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        say([made(0)], *arguments)
    assert not Path("reports").exists()


# --- differences of held-out gains


def seeds_of(recipe: str, gains: dict[int, float | None], **changes: Any) -> list[RunSummary]:
    """A configuration's trainings by the gain of each seed."""
    params = {"recipe": recipe} | changes.pop("params", {})
    return [made(seed, gain=gain, params=params, **changes) for seed, gain in gains.items()]


def differences() -> list[dict[str, str]]:
    return rows_of(Path("reports/compare/differences.csv").read_text())


STABLE = {0: 1.0, 1: 1.5, 2: 0.75}
NOTEBOOK = {0: -0.5, 1: 0.25, 2: -0.75}


def test_two_configurations_are_compared_without_being_asked(say: Say) -> None:
    printed = say(seeds_of("stable", STABLE) + seeds_of("notebook", NOTEBOOK))
    truth = stats.ttest_rel(list(STABLE.values()), list(NOTEBOOK.values())).confidence_interval(0.95)
    (row,) = differences()
    assert (float(row["low"]), float(row["high"])) == pytest.approx(tuple(truth), rel=1e-12)
    assert row | {"low": "", "high": ""} == {
        "recipe": "stable", "against": "recipe=notebook", "difference": repr(17 / 12), "low": "", "high": "",
        "level": "0.95", "paired": "yes", "seeds": "0 1 2", "against_seeds": "0 1 2", "gain_is": "higher",
    }  # fmt: skip
    cells = "recipe=stable | recipe=notebook | +1.42 | +1.06 to +1.78 | 3 paired | higher"
    assert cells in re.sub(" +", " ", printed)
    assert (f"{truth.low:+.2f}", f"{truth.high:+.2f}") == ("+1.06", "+1.78")
    assert "; interval: 95%, over seeds (Student's t)\n" in printed
    below = Path("reports/compare/table.md").read_text().partition("\n\n")[2]
    assert below in printed
    assert cells in re.sub(" +", " ", below)


def test_all_against_one_have_wider_intervals_and_say_so(say: Say) -> None:
    other = {0: 1.5, 1: 1.25, 2: 1.5, 3: 9.0}
    found = seeds_of("stable", STABLE) + seeds_of("notebook", NOTEBOOK) + seeds_of("other", other)
    assert differences_of(say, found) == []
    printed = say(found, "--against", "recipe=stable")
    said = "interval: 97.5%, over seeds (Student's t), so that all 2 intervals hold together with 95% (Bonferroni)\n"
    assert said in printed
    for row, gains in zip(differences(), (NOTEBOOK, other), strict=True):
        shared = [gains[seed] for seed in STABLE]
        truth = stats.ttest_rel(shared, list(STABLE.values())).confidence_interval(0.975)
        assert (float(row["low"]), float(row["high"])) == pytest.approx(tuple(truth), rel=1e-12)
        assert (row["level"], row["against"]) == ("0.975", "recipe=stable")
    assert [row["gain_is"] for row in differences()] == ["lower", "cannot tell"]
    assert "| 3 paired (of 4 and 3) |" in printed


def differences_of(say: Say, found: list[RunSummary], *arguments: str) -> list[dict[str, str]]:
    say(found, *arguments)
    return differences()


def test_without_shared_seeds_the_interval_is_welch_s(say: Say) -> None:
    (row,) = differences_of(say, seeds_of("stable", STABLE) + seeds_of("notebook", {5: 0.5, 6: 1.25}))
    truth = stats.ttest_ind(list(STABLE.values()), [0.5, 1.25], equal_var=False).confidence_interval(0.95)
    assert (float(row["low"]), float(row["high"])) == pytest.approx(tuple(truth), rel=1e-12)
    assert (row["paired"], row["seeds"], row["against_seeds"], row["gain_is"]) == ("no", "0 1 2", "5 6", "cannot tell")


def test_too_few_seeds_have_no_interval_and_widen_no_other(say: Say) -> None:
    found = seeds_of("stable", STABLE) + seeds_of("notebook", NOTEBOOK) + seeds_of("one", {0: 3.0, 1: None})
    printed = say(found, "--against", "recipe=stable")
    notebook, one = differences()
    assert (one["difference"], one["low"], one["high"], one["level"]) == ("2.0", "", "", "")
    assert one["gain_is"] == "too few seeds: an interval needs two"
    assert notebook["level"] == "0.95"
    assert "Bonferroni" not in printed
    assert "| 1 paired (of 1 and 3) |" in printed
    printed = say([made(0), made(0, params={"recipe": "notebook"})])
    assert "interval:" not in printed
    assert "too few seeds: an interval needs two" in printed


def test_the_newest_training_of_a_seed_is_compared(say: Say) -> None:
    """As in the table."""
    old = seeds_of("stable", {1: 50.0}, made=-1.0)
    rows = differences_of(say, old + seeds_of("stable", STABLE) + seeds_of("notebook", NOTEBOOK))
    assert rows == differences_of(say, seeds_of("stable", STABLE) + seeds_of("notebook", NOTEBOOK))


@pytest.mark.parametrize(
    ("params", "changes"),
    [
        ({"reward": "length", "reward.kind": "length"}, {}),
        ({"reward.target": "another"}, {}),
        ({"encoder": "another"}, {}),
        ({"encoder.revision": "another"}, {}),
        ({"classifiers.mood.revision": "another"}, {}),
        ({"model.revision": "another"}, {}),
        ({}, {"measured": "on other prompts"}),
    ],
)
def test_gains_of_another_kind_are_not_compared(say: Say, params: dict[str, str], changes: dict[str, str]) -> None:
    found = seeds_of("stable", STABLE) + seeds_of("notebook", NOTEBOOK, params=params, **changes)
    assert differences_of(say, found) == []
    printed = say(found, "--against", "recipe=stable")
    assert differences() == []
    assert re.search("\nnote: nothing is comparable with: .*recipe=stable", printed)
    assert (
        "note: not compared, as nothing of the same reward, encoder, classifiers, model and held-out prompts" in printed
    )


def test_each_reward_has_a_configuration_to_compare_with(say: Say) -> None:
    found = []
    for params in ({}, {"reward": "length"}):
        for recipe, gains in (("other", {5: 9.0}), ("stable", STABLE), ("notebook", NOTEBOOK)):
            found += seeds_of(recipe, gains, params=params)
    rows = differences_of(say, found, "--against", "recipe=stable")
    assert [(row["reward"], row["recipe"], row["against"]) for row in rows] == [
        (reward, recipe, f"reward={reward}  recipe=stable")
        for reward in ("embedding", "length")
        for recipe in ("notebook", "other")
    ]
    assert [row["level"] for row in rows] == ["0.975", "", "0.975", ""], "what is printed together holds together"
    of_two = [training for training in found if training.params["recipe"] != "other"]
    rows = differences_of(say, of_two)
    assert [(row["against"], row["gain_is"]) for row in rows] == [
        (f"reward={reward}  recipe=notebook", "higher") for reward in ("embedding", "length")
    ]


def test_models_are_compared_where_they_are_named(say: Say) -> None:
    """How a model's pretraining step changes its gain."""
    found = seeds_of("stable", STABLE, params={"model.revision": "step1"})
    found += seeds_of("stable", NOTEBOOK, params={"model.revision": "step2"})
    (row,) = differences_of(say, found, "--against", "model.revision=step1")
    assert (row["model.revision"], row["gain_is"]) == ("step2", "lower")


def test_rewards_that_the_record_has_cut_are_not_taken_for_the_same(say: Say) -> None:
    long = {"reward.words": "w" * mlflow_store.PARAM_CHARACTERS}
    one = seeds_of("stable", STABLE, params=long, config="one")
    assert differences_of(say, one + seeds_of("notebook", NOTEBOOK, params=long, config="two")) == []


def test_what_has_no_gain_is_named(say: Say) -> None:
    found = seeds_of("stable", STABLE) + seeds_of("notebook", dict.fromkeys(range(3)))
    printed = say(found, "--against", "recipe=stable")
    assert "note: nothing is comparable with: recipe=stable\n" in printed
    assert "note: not compared, without a held-out gain: recipe=notebook\n" in printed


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        (["recipe=mine"], "^--against 'recipe=mine': no configuration is left; the values of recipe are notebook, "
         "stable$"),
        (["recip=stable"], r"no configuration has a parameter 'recip'; did you mean 'recipe'\?$"),
        (["seed=0"], "no configuration has a parameter 'seed'"),
        (["stable"], "^--against 'stable': should be KEY=VALUE, such as recipe=stable$"),
        (["recipe=notebook", "recipe.lr=0.0001"], "no configuration is left; the values of recipe.lr are 0.0001, "
         "0.0003$"),
        (["recipe=stable"], "^--against 'recipe=stable': should fit one of the configurations that are comparable, "
         "not 2: recipe=stable recipe.lr=0.0001; recipe=stable recipe.lr=0.0003; give --against again to choose$"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_with_is_one_line(say: Say, conditions: list[str], message: str) -> None:
    found = seeds_of("stable", STABLE) + seeds_of("stable", STABLE, params={"recipe.lr": "0.0003"})
    found += seeds_of("notebook", NOTEBOOK, params={"recipe.lr": "0.0003"})
    with pytest.raises(UserError, match=message):
        say(found, *(part for condition in conditions for part in ("--against", condition)))
    assert not Path("reports").exists()
    rows = differences_of(say, found, "--against", "recipe=stable", "--against", "recipes.stable.lr=3e-4")
    assert [row["against"] for row in rows] == ["recipe=stable  recipe.lr=0.0003"] * 2


def test_without_experiments_it_says_how_to_make_some(project: Project) -> None:
    line = project.refuse("compare")
    assert line.startswith(f"error: no finished run in MLflow's store sqlite:///{project.root}/mlflow.db: queue some")
    assert "dvc exp run --queue" in line
    assert not (project.root / "mlflow.db").exists()
    assert not (project.root / "reports").exists()


# --- DVC's record, written here as DVC writes it


def md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


@dataclasses.dataclass
class Commits:
    """A git repository with experiments as DVC keeps them: commits under refs/exps/<their start>/<name>."""

    root: Path

    def git(self, *arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *arguments]
        return subprocess.run(command, cwd=self.root, capture_output=True, text=True, check=True).stdout.strip()

    def commit(
        self, seed: int, policy: str = "", stale: tuple[str, ...] = (), saved: bool = False, evaluated: int = 0,
        words: list[str] | None = None, locked_seed: int | None = None, old: bool = False, **made: str,
    ) -> None:  # fmt: skip
        """A commit with the results of a run; `stale`: stages whose results are of another policy, which dvc.lock hides
        where it was `saved`; `evaluated`: on how many prompts; `words`: a reward of these; `locked_seed`: what dvc.lock
        says instead; `old`: from before summary.json had digests; `made`: other code and data, by path."""
        tree = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")
        tree["seed"] = seed
        del tree["prompt_sets"]["pocket"]["deduplicate"]  # false where the file leaves it out
        if words:
            tree["reward"], tree["rewards"]["many"] = "many", {"kind": "words", "words": words}
        policy = policy or f"policy of seed {seed}"
        rows = "step," + history(seed).to_csv(index_label="step").partition(",")[2]
        diagnosis = {"verdict": "empty", "onset": 3, "findings": [{"kind": "empty"}]}
        metrics = json.dumps(
            {tree["reward"]: {"difference": {"mean": 0.5 + seed, "low": 0.25 + seed, "high": 0.75 + seed}}}
        )
        files = {"reports/train/history.csv": rows, "reports/evaluate/metrics.json": metrics}
        files["reports/train/summary.json"] = json.dumps({"steps": STEPS})
        if not old:
            diagnosis["history"] = sha256(b"another" if "diagnose" in stale else rows.encode())
            weights = {"model.safetensors": "another" if "evaluate" in stale else policy}
            measured = {"policy": weights, "prompts": made.get("data/prompts", "first"),
                "params": {"prompts": evaluated},
                        "metrics.json": sha256(metrics.encode()), "completions.jsonl": ""}  # fmt: skip
            files["reports/evaluate/measured.json"] = json.dumps([measured])
            files["reports/train/summary.json"] = json.dumps({"digests": [self.digests(tree, rows, policy, made)]})
        files["reports/diagnosis.json"] = json.dumps(diagnosis)
        for name, text in files.items():
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_text(text)
        own = {name: tree[name] for name in ("model", "prompts", "reward", "encoder", "recipe", "train")} | {
            "seed": seed if locked_seed is None else locked_seed
        }
        for table, name in (("models", "model"), ("prompt_sets", "prompts"), ("rewards", "reward"),
                            ("encoders", "encoder"), ("recipes", "recipe")):  # fmt: skip
            own[f"{table}.{tree[name]}"] = tree[table][tree[name]]
        outs = {"data/policy": policy, "reports/train/history.csv": files["reports/train/history.csv"]}
        outs |= {path: text for path, text in files.items() if path == "reports/train/summary.json"}
        deps = dict.fromkeys(("custom", "data/checkpoint", "data/prompts", "pipeline/stages/train.py"), "first") | made
        uses = {"evaluate": "data/policy", "diagnose": "reports/train/history.csv"}
        results = {"evaluate": "reports/evaluate/metrics.json", "diagnose": "reports/diagnosis.json"}

        def entries(texts: dict[str, str]) -> list[dict[str, str]]:
            return [{"path": path, "hash": "md5", "md5": md5(text)} for path, text in texts.items()]

        stages: dict[str, Any] = {
            stage: {
                "deps": entries({used: "of another run" if stage in stale and not saved else outs[used]}),
                "outs": entries({results[stage]: files[results[stage]]}),
            }
            for stage, used in uses.items()
        }
        stages["evaluate"]["deps"] += entries({"data/prompts": deps["data/prompts"]})
        stages["evaluate"]["params"] = {"params.yaml": {"evaluate": {"prompts": evaluated}}}
        stages["train"] = {
            "deps": entries(deps), "params": {"params.yaml": own}, "outs": entries(outs)
        }  # fmt: skip
        with (self.root / "dvc.lock").open("w") as file:
            YAML().dump({"schema": "2.0", "stages": stages}, file)
        self.git("add", "-A")
        self.git("commit", "-qm", f"seed {seed}")

    def digests(self, tree: dict[str, Any], rows: str, policy: str, made: dict[str, str]) -> dict[str, str]:
        """As train.py writes them, from params.yaml."""
        params = validate_params(tree)
        chosen = {name: tree[name] for name in (*SELECTORS, "seed")}
        tables = {name: params.selected(name) for name in SELECTORS} | {"train": params.train}
        own = {name: made.get(path, "first") for name,
            path in (("code", "pipeline/stages/train.py"), ("custom", "custom"),
               ("prompts", "data/prompts"), ("checkpoint", "data/checkpoint"))}  # fmt: skip
        weights = sha256(json.dumps({"model.safetensors": policy}).encode())
        digests = {"train_key": "ab" * 32, "history.csv": sha256(rows.encode()), "policy": weights}
        return digests | own | params_digests(chosen, tables)

    def experiment(self, name: str, seed: int, **options: Any) -> None:
        head = self.git("rev-parse", "HEAD")
        self.commit(seed, **options)
        self.git("update-ref", f"refs/exps/{head[:2]}/{head[2:]}/{name}", "HEAD")
        self.git("reset", "-q", "--hard", head)


@pytest.fixture
def commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commits:
    made = Commits(tmp_path / "project")
    made.root.mkdir()
    made.git("init", "-q")
    made.commit(0)
    monkeypatch.chdir(made.root)
    return made


def test_the_commit_and_its_experiments_are_read_from_git(commits: Commits) -> None:
    for seed in (1, 2):
        commits.experiment(f"run-{seed}", seed)
    found = {training.name: training for training in summaries.from_dvc(every_commit=False)}
    assert {name: training.params["seed"] for name, training in found.items()} == {
        "HEAD": "0",
        "run-1": "1",
        "run-2": "2",
    }
    table = history(2)
    assert found["run-2"].curve("reward_mean") == pytest.approx(table["reward_mean"].to_dict())
    assert (found["run-2"].gain, found["run-2"].kinds, found["run-2"].onset) == (2.5, ("empty",), 3)
    assert found["run-2"].gain_interval == (2.25, 2.75)
    # as train.py records them: text as it is, everything else as JSON
    params = found["HEAD"].params
    assert (params["recipe.lr"], params["recipe.adam_eps"], params["prompts.deduplicate"]) == (
        "0.0001",
        "1e-08",
        "false",
    )
    assert not [key for key in params if key.startswith("evaluate")]
    commits.commit(5)
    assert [training.params["seed"] for training in summaries.from_dvc(every_commit=False)] == ["5"]
    assert sorted(training.params["seed"] for training in summaries.from_dvc(every_commit=True)) == ["1", "2", "5"]


def test_results_of_another_training_are_not_taken_for_its_own(commits: Commits) -> None:
    """`dvc exp run train` leaves the diagnosis and evaluation of the commit that it started from; `dvc exp save` and
    `dvc commit` then record them as those of this run."""
    for name, options in (("train-only", {}), ("saved", {"saved": True}), ("old", {"old": True})):
        commits.experiment(name, 1, stale=("evaluate", "diagnose"), **options)  # type: ignore[arg-type]
    commits.experiment("evaluated", 1, stale=("diagnose",), saved=True)
    commits.experiment("old-whole", 1, old=True)
    found = {training.name: training for training in summaries.from_dvc(every_commit=False)}
    for name in ("train-only", "saved", "old"):
        assert (found[name].gain, found[name].kinds, found[name].measured) == (None, None, None), name
    assert (found["evaluated"].gain, found["evaluated"].kinds) == (1.5, None)
    assert (found["old-whole"].gain, found["old-whole"].kinds) == (1.5, ("empty",))
    assert found["old-whole"].config == found["saved"].config, "digests or not, a configuration is the same"
    assert found["HEAD"].gain == 0.5


def test_metrics_that_are_not_those_that_were_measured_are_left_out(commits: Commits) -> None:
    path = commits.root / "reports/evaluate/metrics.json"
    path.write_text(path.read_text().replace("0.5", "9.5"))
    commits.git("commit", "-qam", "another gain")
    assert [training.gain for training in summaries.from_dvc(every_commit=False)] == [None]


def test_a_verdict_on_another_curve_is_left_out(commits: Commits) -> None:
    """The history may be the same to the byte. What a commit does not say is no reason: older ones say less."""
    path = commits.root / "reports/diagnosis.json"
    for digests, kinds in (({"measured.json": "of a file"}, ("empty",)), ({"heldout.jsonl": "another"}, None)):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"digests": [digests]}))
        commits.git("commit", "-qam", "a diagnosis")
        assert [training.kinds for training in summaries.from_dvc(every_commit=False)] == [kinds]


def test_a_lock_of_other_parameters_than_those_of_the_run_is_left_out(
    commits: Commits, capsys: pytest.CaptureFixture[str]
) -> None:
    """`dvc commit -f` after an edit of params.yaml records what is there now."""
    commits.experiment("committed", 1, locked_seed=7)
    assert [training.name for training in summaries.from_dvc(every_commit=False)] == ["HEAD"]
    assert "note: committed: its dvc.lock names other parameters than `train` ran with" in capsys.readouterr().err


WORDS = [f"word{number:03}" for number in range(150)]


def test_configurations_that_differ_where_nothing_shows_it_are_two(commits: Commits) -> None:
    """Two rewards that differ behind the 1000th character of their words: not seeds of one, in both records."""
    for seed, more in enumerate((["red"], ["the", "a"], ["the", "a"]), start=1):
        commits.experiment(f"run-{seed}", seed, words=WORDS + more)
    of_git = [each for each in summaries.from_dvc(every_commit=False) if each.name != "HEAD"]
    for found in (of_git, [each._replace(params=of_git[0].params | {"seed": each.params["seed"]}) for each in of_git]):
        of_two, left_out = configurations(found)
        assert sorted([each.name for each in one.trainings] for one in of_two) == [["run-1"], ["run-2", "run-3"]]
        assert left_out == 0
        assert len(set(comparison.markdown(of_two).splitlines())) == 4
        assert len({tuple(one.shown.values()) for one in of_two}) == 2, "also by what the table shows"
        assert max(len(cell) for one in of_two for cell in one.shown.values()) <= comparison.CELL
    assert max(len(value) for value in of_git[0].params.values()) == mlflow_store.PARAM_CHARACTERS


def test_a_configuration_is_one_whatever_is_only_written_otherwise(commits: Commits) -> None:
    """Digests are of values: an integer for a float, a default that is left out."""
    tree = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")
    tree["recipes"]["stable"]["kl_coef"] = 1
    one = commits.digests(tree, "", "", {})
    tree["recipes"]["stable"]["kl_coef"] = 1.0
    tree["prompt_sets"]["pocket"].pop("deduplicate", None)
    assert commits.digests(tree, "", "", {})["config"] == one["config"]
    tree["seed"] = 5
    other = commits.digests(tree, "", "", {})
    assert other["config"] == one["config"]
    assert other["written_params"] != one["written_params"]


def mlflow_run(name: str, seed: int = 0, tags: dict[str, str] | None = None, **params: str) -> Any:
    return SimpleNamespace(
        info=SimpleNamespace(run_id=name, run_name=name, start_time=seed), inputs=None,
        data=SimpleNamespace(params={"seed": str(seed), **params}, tags=tags or {}, metrics={}),
    )  # fmt: skip


def test_mlflow_s_runs_differ_by_tag_and_older_ones_by_whole_params() -> None:
    long, tagged = "w" * mlflow_store.PARAM_CHARACTERS, {"config": "c1", "prompts": "p", "checkpoint": "q"}
    runs = [
        mlflow_run("one", 0, tagged, words=long), mlflow_run("two", 1, tagged | {"config": "c2"}, words=long),
        mlflow_run("new", 0, tagged | {"config": "c3"}, words="a"), mlflow_run("old", 1, words="a"),
        mlflow_run("older", 2, words="b"), mlflow_run("oldest", 3, words="b"),
        mlflow_run("cut", 0, words=long), mlflow_run("cut-too", 1, words=long),
    ]  # fmt: skip
    found = summaries._with_config([summaries._of_run(None, run) for run in runs])  # type: ignore[arg-type]
    config = {training.name: training.config for training in found}
    assert [config[name] for name in ("one", "two", "new", "old")] == ["c1", "c2", "c3", "c3"]
    assert config["older"] == config["oldest"] != "c3"
    assert len(set(config.values())) == 6, "of params that were cut nothing is known: each is alone"
    assert found[0].data != found[3].data


def test_both_records_tell_apart_what_other_code_or_data_made(commits: Commits) -> None:
    """Custom rewards are code: a seed that was trained after they changed is no seed of the same experiment."""
    commits.experiment("same", 1)
    for what in ("pipeline/stages/train.py", "custom", "data/prompts", "data/checkpoint"):
        commits.experiment(what.rpartition("/")[2], 1, **{what: "other"})
    found = {training.name: training for training in summaries.from_dvc(every_commit=False)}
    plain = found["HEAD"]
    assert (found["same"].code, found["same"].data) == (plain.code, plain.data)
    for what in ("train.py", "custom"):
        assert (found[what].code != plain.code, found[what].data) == (True, plain.data)
    for what in ("prompts", "checkpoint"):
        assert (found[what].code, found[what].data != plain.data) == (plain.code, True)

    assert found["same"].measured == plain.measured != found["prompts"].measured
    commits.experiment("few", 1, evaluated=5)
    few = next(each for each in summaries.from_dvc(every_commit=False) if each.name == "few")
    assert few.measured != plain.measured

    def of_mlflow(custom: str, prompts: str = "p") -> RunSummary:
        inputs = [SimpleNamespace(dataset=SimpleNamespace(digest=prompts))]
        run: Any = SimpleNamespace(
            info=SimpleNamespace(run_id="r", run_name="r", start_time=0), inputs=SimpleNamespace(dataset_inputs=inputs),
            data=SimpleNamespace(params={"seed": "0"}, tags={"code": "c", "custom": custom, "measured": prompts},
            metrics={}),
        )  # fmt: skip
        return summaries._of_run(None, run)  # type: ignore[arg-type]  # asked for no curve

    assert of_mlflow("c").code != of_mlflow("other").code
    assert of_mlflow("c", "q").data != of_mlflow("c").data
    assert of_mlflow("c", "q").measured != of_mlflow("c").measured


def test_a_commit_that_does_not_hold_its_training_is_left_out(
    commits: Commits, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    (commits.root / "reports/train/history.csv").write_text("step,lr\n0,1\n")
    commits.git("commit", "-qam", "edited by hand")
    assert summaries.from_dvc(every_commit=False) == []
    assert "HEAD: its commit does not hold what its dvc.lock says of `train`" in capsys.readouterr().err
    (commits.root / "dvc.lock").unlink()
    commits.git("commit", "-qam", "before the first run")
    assert summaries.from_dvc(every_commit=False) == []


def test_outside_git_dvc_has_no_record(project: Project) -> None:
    done = project.run("compare", "--from", "dvc")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: DVC's experiments are kept in git: `git rev-parse` failed: fatal: not a git")
    assert "or any of the parent directories" in done.stderr


def refusals() -> dict[str, tuple[dict[str, str], str, str]]:
    """What is wrong: (environment, line of .git/config, what git says of it)."""
    return {
        "of another user": ({"GIT_TEST_ASSUME_DIFFERENT_OWNER": "1"}, "", "git config --global --add safe.directory"),
        "broken configuration": ({}, "[core\n", "bad config line"),
        "no git": ({"PATH": "/nowhere"}, "", "git cannot be run: No such file or directory"),
        "in a language": ({"LANGUAGE": "de", "LC_ALL": "de_DE.UTF-8"}, "[core\n", ".git/config"),
    }


@pytest.mark.parametrize("name", refusals())
def test_what_git_refuses_is_said_in_its_own_words(
    commits: Commits, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    variables, line, said = refusals()[name]
    with (commits.root / ".git/config").open("a") as config:
        config.write(line)
    for variable, text in variables.items():
        monkeypatch.setenv(variable, text)
    with pytest.raises(UserError, match=rf"^DVC's experiments are kept in git: .*{re.escape(said)}") as refused:
        summaries.from_dvc(every_commit=False)
    assert "no commit yet" not in str(refused.value)


def test_a_repository_without_a_commit_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    with pytest.raises(UserError, match="no commit yet, and experiments start from one: `git commit` first"):
        summaries.from_dvc(every_commit=False)
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *identity, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    assert summaries.from_dvc(every_commit=False) == []


def test_no_setting_of_the_user_changes_what_is_read(commits: Commits, monkeypatch: pytest.MonkeyPatch) -> None:
    commits.experiment("größer", 1)
    before = [training._replace(curve=len) for training in summaries.from_dvc(every_commit=False)]  # type: ignore[arg-type]
    for key, value in (("log.showSignature", "true"), ("color.ui", "always"), ("core.quotePath", "true"),
                       ("log.date", "relative"), ("core.pager", "false"), ("log.decorate", "full")):  # fmt: skip
        commits.git("config", key, value)
    for variable, value in (
        ("GIT_PAGER", "false"),
        ("GIT_TRACE", "1"),
        ("GIT_LITERAL_PATHSPECS", "1"),
        ("LC_ALL", "C"),
    ):
        monkeypatch.setenv(variable, value)
    found = summaries.from_dvc(every_commit=False)
    assert {training.name for training in found} == {"HEAD", "größer"}
    assert [training._replace(curve=len) for training in found] == before  # type: ignore[arg-type]


def test_without_mlflow_its_record_cannot_be_read_and_dvcs_can(commits: Commits, tmp_path: Path) -> None:
    (tmp_path / "without").mkdir()
    (tmp_path / "without/sitecustomize.py").write_text("import sys\nsys.modules['mlflow'] = None\n")
    (commits.root / "mlflow.db").touch()
    for name in ("params.yaml", "dvc.yaml"):  # the project's root
        (commits.root / name).touch()
    (commits.root / "pipeline").symlink_to(ROOT / "pipeline")
    environment = {"PYTHONPATH": f"{tmp_path / 'without'}:{ROOT}", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipeline", "compare", *arguments]
        return subprocess.run(command, cwd=commits.root, env=environment, capture_output=True, text=True)

    refused = run()
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert refused.stderr.startswith("error: mlflow is not installed")
    assert "1 empty completions from step 3" in run("--from", "dvc").stdout
