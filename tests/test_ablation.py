"""The ablation's bookkeeping and its verdicts, on made-up runs whose verdict docs/COLLAPSE.md's rule gives at once."""

import copy
import functools
import math
from typing import Any

import pandas as pd
import pytest
from ruamel.yaml import YAML

from benchmarks import ablation
from benchmarks.ablation import EXPERIMENTS, Experiment, collapsed, identify, onset, verdict
from tests.project import ROOT

COMMITTED: dict[str, Any] = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")
FINE = {"low": 0.1, "high": 0.3}


def with_overrides(experiment: Experiment) -> dict[str, Any]:
    """params.yaml as `dvc exp run -S` writes it."""
    tree = copy.deepcopy(COMMITTED)
    for key, text in experiment.overrides().items():
        *tables, name = key.split(".")
        functools.reduce(dict.__getitem__, tables, tree)[name] = YAML(typ="safe", pure=True).load(text)
    return tree


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda e: f"{e.setting} {e.start} {' '.join(e.variant)}")
def test_every_experiment_is_recognised_as_itself(experiment: Experiment) -> None:
    tree = with_overrides(experiment)
    assert tree != COMMITTED
    assert identify(tree, COMMITTED) == experiment


def test_a_run_with_other_changes_is_no_experiment() -> None:
    tree = with_overrides(EXPERIMENTS[0])
    assert identify(tree | {"reward": "length"}, COMMITTED) is None
    tree["train"]["max_tokens"] += 1
    assert identify(tree, COMMITTED) is None
    assert identify(COMMITTED, COMMITTED) is None


def history(**ends: float) -> pd.DataFrame:
    """Ten steps that turn from healthy to these values at step 6."""
    healthy = {"entropy": 3.0, "distinct_completions": 0.95, "empty_share": 0.02}
    return pd.DataFrame([healthy | (ends if step >= 6 else {}) for step in range(10)])


@pytest.mark.parametrize(("ends", "sign"), [
    ({}, []), ({"entropy": 0.29}, ["entropy"]), ({"entropy": 0.31}, []), ({"entropy": math.nan}, ["entropy"]),
    ({"distinct_completions": 0.09}, ["distinct"]), ({"empty_share": 0.6}, ["empty"]),
])  # fmt: skip
def test_signs_of_collapse(ends: dict[str, float], sign: list[str]) -> None:
    table = history(**ends)
    assert collapsed(table, 10, FINE) == sign
    assert (onset(table) == 6) if sign else math.isnan(onset(table))


def test_a_fall_or_a_stop_is_a_collapse_too() -> None:
    assert collapsed(history(), 10, {"low": -0.3, "high": -0.1}) == ["reward"]
    assert collapsed(history(), 10, {"low": -0.3, "high": 0.1}) == []
    assert collapsed(history(), 30, FINE) == ["stopped"]


def runs(
    gains: list[float], how: str = "", from_step: float = 8, drift: float = 0, variant: str = "lr=1"
) -> pd.DataFrame:
    """A run a gain; `how` "entropy -" is collapsed, collapsed, not: the last word for the other runs."""
    words = (how.split() + [how.split()[-1]] * len(gains))[: len(gains)] if how else ["-"] * len(gains)
    return pd.DataFrame({
        "variant": variant, "gain": gains, "collapsed": ["" if word == "-" else word for word in words], "steps": 30,
        "onset": [math.nan if word == "-" else from_step for word in words], "ref_logprob_change": drift,
    })  # fmt: skip


BAD, GOOD = runs([-0.50, -0.48, -0.46], "empty"), runs([1.0, 0.9, 1.1])


@pytest.mark.parametrize(
    ("start", "base", "variant", "truth"),
    [
        ("notebook", BAD, runs([0.30, 0.31, 0.32]), "causes"),
        ("notebook", BAD, runs([-0.49, -0.50, -0.51], "empty"), "harmless"),
        ("notebook", BAD, runs([-1.49, -1.50, -1.51], "empty"), "harmless"),  # worse is no cure
        ("notebook", BAD, runs([-0.30, -0.29, -0.28], "empty"), "contributes"),  # a quarter won back
        ("notebook", BAD, runs([-0.49, -0.50, -0.51], "empty", from_step=16), "contributes"),  # twice as late
        ("notebook", BAD, runs([-0.30, -0.29, -0.28], "empty", variant="top_k=0"), "harmless"),  # other measure
        ("notebook", BAD, runs([-0.5, 0.2, 0.2], "empty -"), "contributes (undecided: more seeds)"),
        ("notebook", BAD, runs([-0.5, 0.2, 0.2, 0.2, 0.2], "empty -"), "contributes"),
        ("notebook", GOOD, GOOD, "open: the start itself does not behave as it should"),
        ("notebook", BAD, BAD[:2], "too few seeds"),
        ("stable", GOOD, runs([1.0, 0.95, 1.05]), "harmless"),
        ("stable", GOOD, runs([1.5, 1.6, 1.4], "entropy"), "causes"),
        ("stable", GOOD, runs([0.5, 0.4, 0.45]), "contributes"),  # gains less by more than a quarter
        ("stable", GOOD, runs([2.5, 2.4, 2.45]), "harmless"),  # gains more
        ("stable", GOOD, runs([1.0, 0.95, 1.05], drift=-1.2), "contributes"),
        ("stable", BAD, BAD, "open: the start itself does not behave as it should"),
        ("clean", runs([1.6, 1.7, 1.6], "entropy"), runs([0.5, 0.5, 0.5], "entropy"), "harmless"),  # nothing was lost
    ],
)
def test_verdicts(start: str, base: pd.DataFrame, variant: pd.DataFrame, truth: str) -> None:
    assert verdict(start, base, variant) == truth


def test_tables_of_the_kept_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/COLLAPSE.md holds what the command prints of docs/collapse.csv."""
    monkeypatch.chdir(ROOT)
    ablation.tables()
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    page = (ROOT / "docs/COLLAPSE.md").read_text(encoding="utf-8").splitlines()
    assert len(printed) > 10
    assert [line for line in printed if line not in page] == []
