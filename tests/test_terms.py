"""The terms of a sum: their shares of the signal against numpy, what is told of them, and what a run writes of them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from pipeline.__main__ import build_parser
from pipeline.commands import diagnose as command
from pipeline.config.schema import SumReward, term_names
from pipeline.diagnosis.terms import DEAD_STEPS, Note, notes
from pipeline.file_io import read_json, read_jsonl, write_jsonl
from pipeline.rl.terms import shares_of_variance, std_within, term_rows
from pipeline.runs.results import TERM_COLUMNS, by_term
from pipeline.stages import diagnose, evaluate, train
from pipeline.tracking.record import read_growing
from tests.mlflow_runs import grow, timestamp
from tests.project import Project
from tests.training import contents, end_before, forget, history

pytestmark = pytest.mark.numeric

LENGTH: dict[str, Any] = {"kind": "length", "target": 40}
WORDS: dict[str, Any] = {"kind": "words", "words": ["a", "the"]}
TERMS = [{"weight": 0.5, "reward": LENGTH}, {"weight": -2.0, "reward": WORDS}]


def names(*terms: dict[str, Any]) -> list[str]:
    given_terms = [{"weight": 1.0, **term} for term in terms]
    return term_names(TypeAdapter(SumReward).validate_python({"kind": "sum", "terms": given_terms}))


def test_a_term_is_called_by_its_name_its_function_or_its_kind() -> None:
    own = {"kind": "custom", "function": "custom/example.py:length"}
    called = {"name": "length_2", "reward": WORDS}
    assert names({"reward": LENGTH}, {"reward": own}, called, {"reward": WORDS}) == [
        "length", "length_3", "length_2", "words",
    ]  # fmt: skip


# --- shares


def test_shares_by_hand() -> None:
    """Two samples of one prompt: the reward is 0 and 5, its variance 12.5. Covariances 2.5 * 2 / 2 and so on."""
    parts = torch.tensor([[[0.0, 2.0]], [[0.0, 4.0]], [[1.0, 0.0]]]).double()  # the reward is 1 and 6
    assert shares_of_variance(parts).tolist() == [0.4, 0.8, -0.2]
    row = term_rows(3, torch.tensor([[[0.0, 4.0], [1.0, math.nan]]]).double(), {"one": 0.5}, "sum")[0]
    assert row == {
        "step": 3, "term": "one", "weight": 0.5, "scored_share": 0.75, "mean": 5 / 3, "mean_weighted": 2.5 / 4,
        "std_within": 8**0.5, "std_within_weighted": ((2 + 0.125) / 2) ** 0.5, "share": 1.0,
    }  # fmt: skip
    nothing = term_rows(
        0, torch.tensor([[[0.1] * 7], [[math.nan] * 7]], dtype=torch.float64), {"a": 1.0, "b": 1.0}, "sum"
    )
    assert [row["share"] for row in nothing] == [None, None]
    assert (nothing[0]["std_within_weighted"], nothing[1]["mean"], nothing[1]["std_within"]) == (0.0, None, None)


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 3), st.integers(2, 5), st.booleans())
def test_shares_are_covariances_and_add_up(seed: int, count: int, prompts: int, group: int, silent: bool) -> None:
    """Against numpy's covariances; and the weighted means are the reward's."""
    random = np.random.default_rng(seed)
    values, weights = random.normal(5, 3, (count, prompts, group)), random.normal(0, 2, count)
    values[random.random(values.shape) < 0.2 * silent] = np.nan
    rows = term_rows(0, torch.from_numpy(values), {f"{k}": float(w) for k, w in enumerate(weights)}, "sum")
    added = np.nan_to_num(values * weights[:, None, None])
    rewards = added.sum(0)
    assert math.fsum(row["mean_weighted"] for row in rows) == pytest.approx(rewards.mean())
    variance = np.mean([np.var(one, ddof=1) for one in rewards])
    if variance < 1e-9:
        return
    covariances = [np.mean([np.cov(part[b], rewards[b])[0, 1] for b in range(prompts)]) for part in added]
    assert [row["share"] for row in rows] == pytest.approx(np.array(covariances) / variance, abs=1e-9)
    assert math.fsum(row["share"] for row in rows) == pytest.approx(1)
    assert std_within(torch.from_numpy(rewards)) == pytest.approx(variance**0.5)


def test_the_share_of_a_normalised_term_is_that_of_what_is_learnt_from() -> None:
    """Independent terms of any unit: their weights' squares."""
    random = np.random.default_rng(0)
    terms = torch.from_numpy(random.normal(0, 1, (2, 500, 8)) * np.array([1000, 1])[:, None, None])
    weights = {"large": 1.0, "small": 2.0}
    assert [row["share"] for row in term_rows(0, terms, weights, "normalized")] == pytest.approx([0.2, 0.8], abs=0.02)
    assert [row["share"] for row in term_rows(0, terms, weights, "sum")] == pytest.approx([1, 0], abs=0.02)


# --- what is told


def rows_of(**terms: list[tuple[float, float | None]]) -> list[dict[str, Any]]:
    """Of each term the weight-1 spread and share of every step."""
    return [
        {"step": step, "term": name, "weight": 1.0, "mean": 0.25, "std_within": spread, "std_within_weighted": spread,
         "share": share}
        for name, values in terms.items() for step, (spread, share) in enumerate(values)
    ]  # fmt: skip


def noted(rows: list[dict[str, Any]], combine: str) -> list[Note]:
    return notes(by_term(rows), combine)


def test_a_term_that_drowns_the_others_is_named_with_its_weight() -> None:
    rows = rows_of(length=[(8.0, 0.95), (12.0, 0.97)], words=[(0.5, 0.05), (0.5, 0.03)])
    (note,) = noted(rows, "sum")
    assert (note.kind, note.short, note.weight) == ("dominant", "`length` carries 96% of the signal.", 0.05)
    assert "A weight of 0.05 instead of 1 would make it differ within a prompt as much as `words` does" in note.advice
    assert [note.weight for note in noted(rows, "normalized")] == [1.0], "normalised terms have one spread"
    assert noted(rows_of(length=[(9.0, 0.9)], words=[(1.0, 0.1)]), "sum") == []
    assert noted(rows_of(length=[(9.0, 1.0)]), "sum") == [], "alone it drowns none"
    assert noted([], "sum") == []


def test_a_term_that_has_died_is_named_with_its_step() -> None:
    alive, dead = [(1.0, 0.5)] * 3, [(0.0, 0.0)] * DEAD_STEPS
    (note,) = noted(rows_of(length=alive + [(1.0, 1.0)] * DEAD_STEPS, words=alive + dead), "sum")
    assert (note.kind, note.short, note.weight) == ("dead", "`words` is dead since step 3.", None)
    (note,) = noted(rows_of(length=[(1.0, 1.0)] * DEAD_STEPS, words=dead), "sum")
    assert note.short == "`words` is dead from the start."
    assert noted(rows_of(length=alive[:1] + dead[1:], words=alive), "sum") == [], "too few steps to tell"
    revived = rows_of(words=[*dead, (1.0, 0.5)], length=[(1.0, 0.5)] * (DEAD_STEPS + 1))
    assert noted(revived, "sum") == []
    unweighted = [{**row, "weight": 0.0} for row in rows_of(words=dead)]
    assert noted(unweighted, "sum") == [], "it was left out on purpose"


# --- runs


LETTERS = """
def letters(completions, factor):
    return [factor * sum(c.isascii() and c.isalpha() for c in text) for text in completions]
"""


def with_letters(weight: float = -2.0, factor: float = 1.0, twice: int = 1, **keys: Any) -> dict[str, Any]:
    """The length and a count of letters, whose weights and unit can be others."""
    letters = {"kind": "custom", "function": "custom/own.py:letters", "params": {"factor": factor}}
    terms = [{"weight": 0.5 * twice, "reward": LENGTH}, {"weight": weight * twice, "reward": letters}]
    return {"kind": "sum", "terms": terms, **keys}


@pytest.fixture
def both(here: Project) -> Project:
    (here.root / "custom/own.py").write_text(LETTERS)
    here.edit(reward="both", rewards__both=with_letters())
    here.keep_rewards("both")
    return here


def terms_of(project: Project) -> list[dict[str, Any]]:
    return read_jsonl(project.root / "reports/train/terms.jsonl")


@pytest.mark.slow
def test_a_run_tells_what_each_term_adds_and_goes_on_to_the_same_bytes(both: Project) -> None:
    train.main()
    undisturbed, rows = contents(both), terms_of(both)
    assert [row["term"] for row in rows[:2]] == ["length", "letters"]
    for step, row in enumerate(history(both)):
        own = [each for each in rows if each["step"] == step]
        assert sum(each["mean_weighted"] for each in own) == pytest.approx(row["reward_mean"])
        assert sum(each["share"] for each in own) == pytest.approx(1)
        for each in own:
            assert each["mean_weighted"] == pytest.approx(each["weight"] * each["mean"])
            assert each["std_within_weighted"] == pytest.approx(abs(each["weight"]) * each["std_within"])
    for sample in read_jsonl(both.root / "reports/train/samples.jsonl"):
        added = sample["terms"]
        assert added["length"] == -0.5 * abs(len(sample["completion"]) - 40)
        assert sum(added.values()) == sample["reward"]
    forget(both)
    end_before(3)
    train.main()
    assert contents(both) == undisturbed
    forget(both)
    both.edit(reward="length", rewards__length=LENGTH)
    train.main()
    assert contents(both)["reports/train/terms.jsonl"] == b"\n"
    assert b'"terms"' not in contents(both)["reports/train/samples.jsonl"]


@pytest.mark.slow
def test_normalised_terms_know_no_unit_and_their_weights_no_size(both: Project) -> None:
    """The same policy: to the byte where all weights are doubled, to rounding where a term counts in another unit."""
    both.edit(recipes__stable__lr=0.01)
    runs = []
    for changes in ({}, {"twice": 2}, {"factor": 100.0}):
        both.edit(rewards__both=with_letters(combine="normalized", **changes))
        train.main()
        runs.append((contents(both)["data/policy/model.safetensors"], history(both), terms_of(both)))
    (policy, rows, terms), (same_policy, doubled, _), (_, other, other_terms) = runs
    assert same_policy == policy
    assert doubled[0]["reward_mean"] == 2 * rows[0]["reward_mean"], "the reward is the plain sum"
    assert other[0]["reward_mean"] != rows[0]["reward_mean"]
    for name in ("grad_norm", "advantage_std", "ref_kl_sequence"):
        assert [row[name] for row in other] == pytest.approx([row[name] for row in rows], rel=1e-3, abs=1e-5), name
    assert [row["share"] for row in other_terms] == pytest.approx([row["share"] for row in terms], rel=1e-3)
    assert [row["baseline"] for row in rows] == pytest.approx([row["reward_mean"] for row in rows])


@pytest.mark.slow
def test_evaluation_and_diagnosis_tell_of_the_terms(both: Project, capsys: pytest.CaptureFixture[str]) -> None:
    never = {"weight": 1.0, "reward": {"kind": "words", "words": ["never"]}}
    both.edit(rewards__both={"kind": "sum", "terms": [{"weight": 0.5, "reward": LENGTH}, never]})
    for stage in (train, evaluate, diagnose):
        stage.main()
    measured = read_json(both.root / "reports/evaluate/metrics.json")["both"]
    for who in ("checkpoint", "policy", "difference"):
        means = [term[who]["mean"] for term in measured["terms"].values()]
        assert sum(means) == pytest.approx(measured[who]["mean"])
    rows = read_jsonl(both.root / "reports/evaluate/completions.jsonl")
    lengths = [-abs(len(row["policy"]) - 40) for row in rows]
    assert measured["terms"]["length"]["unweighted"]["policy"] == pytest.approx(sum(lengths) / len(lengths))
    diagnosis, said = read_json(both.root / "reports/diagnosis.json"), capsys.readouterr().out
    (note,) = diagnosis["notes"]
    assert (note["kind"], note["term"], note["changes"]) == ("dead", "words", {})
    assert "`words` is dead from the start." in diagnosis["headline"]
    assert note["text"] in said
    assert not diagnosis["findings"], "a note is no verdict"
    command.main(build_parser().parse_args(["diagnose", str(both.root / "reports/train/history.csv")]))
    said = capsys.readouterr().out
    assert "`words` is dead from the start." in said.splitlines()[0]
    assert note["text"] in said


def test_mlflow_gets_the_defined_numbers_of_each_term(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = grow(2)
    rows = term_rows(0, torch.tensor([[[1.0, 1.0]]]), {"near": 2.0}, "sum")
    write_jsonl(folder / "terms.jsonl", [*rows, {**rows[0], "step": 1, "share": 0.5}, {**rows[0], "step": 2}])
    points = [point for point in read_growing(folder, 1, "RUNNING").points if point.key.startswith("terms/")]
    assert {(point.key, point.step) for point in points} == {
        *((f"terms/near/{name}", step) for name in TERM_COLUMNS for step in (0, 1) if name != "share"),
        ("terms/near/share", 1),  # undefined at step 0, and step 2 has no other numbers yet
    }
    assert {point.value for point in points if point.key == "terms/near/mean_weighted"} == {2.0}
    assert {point.timestamp_ms for point in points} == {timestamp(0), timestamp(1)}


def test_a_note_s_command_changes_the_weight_alone() -> None:
    written = json.dumps([{"name": None, **term} for term in TERMS])
    chosen = {"reward": "both", "reward.terms": written}
    note = noted(rows_of(length=[(8.0, 0.95)], words=[(0.4, 0.05)]), "sum")[0]
    chosen |= dict.fromkeys(("model", "prompts", "encoder", "recipe"), "x") | {"seed": 0}
    report = diagnose.report_note(note, chosen, ["length", "words"])
    assert report["changes"] == {"rewards.both.terms": [{"weight": 0.05, "reward": LENGTH}, TERMS[1]]}
    assert "rewards.both.terms=[{weight:0.05,reward:{kind:length,target:40}}," in report["command"]
