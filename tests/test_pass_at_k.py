"""pass@k against all sets of k samples, and where `evaluate` and the report show it."""

import itertools
import re
import statistics
from pathlib import Path

import pytest
import torch

from pipeline.diagnosis.pass_at_k import measured_k, pass_at_k
from pipeline.file_io import read_json, read_jsonl, write_json
from pipeline.report import inputs, page
from pipeline.stages import evaluate, train
from tests.project import Project
from tests.reports import interval, reports
from tests.seal import seal

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("samples", [1, 2, 5, 6])
def test_pass_at_k_is_the_share_of_sets_of_k_with_a_right_one(samples: int) -> None:
    for k in range(1, samples + 1):
        shares = []
        for right in range(samples + 1):
            answers = [True] * right + [False] * (samples - right)
            shares.append(statistics.fmean(any(chosen) for chosen in itertools.combinations(answers, k)))
        found = pass_at_k(torch.arange(samples + 1), samples, k)
        torch.testing.assert_close(found, torch.tensor(shares, dtype=torch.float64), rtol=0, atol=1e-12)


def test_pass_at_k_is_unbiased() -> None:
    """Over all outcomes of five samples, each right with chance p: 1 - (1 - p)^k."""
    p, samples = 0.3, 5
    outcomes = list(itertools.product([0, 1], repeat=samples))
    chances = torch.tensor([p ** sum(row) * (1 - p) ** (samples - sum(row)) for row in outcomes], dtype=torch.float64)
    right = torch.tensor(outcomes).sum(1)
    for k in range(1, samples + 1):
        assert (chances * pass_at_k(right, samples, k)).sum().item() == pytest.approx(1 - (1 - p) ** k, rel=1e-12)


def test_k_is_a_power_of_two_or_all_samples() -> None:
    assert [measured_k(samples) for samples in (1, 2, 4, 6)] == [[1], [1, 2], [1, 2, 4], [1, 2, 4, 6]]


def test_evaluate_measures_pass_at_k_of_rewards_of_0_or_1_alone(here: Project) -> None:
    here.keep_rewards("length")
    here.edit(rewards__even={"kind": "format", "pattern": r"(?s)(..)*"}, evaluate__independent="none")
    here.edit(train__steps=2, recipes__stable__lr=0.01, evaluate__samples_per_prompt=3)
    train.main()
    evaluate.main()
    metrics = read_json(here.root / "reports/evaluate/metrics.json")
    rows = read_jsonl(here.root / "reports/evaluate/completions.jsonl")
    assert "pass_at" not in metrics["length"]
    even = metrics["even"]
    assert list(even["pass_at"]) == ["1", "2", "3"]
    assert {side: even[side] for side in even["pass_at"]["1"]} == even["pass_at"]["1"]  # of one it is the mean
    for place, side in enumerate(("checkpoint", "policy")):
        solved = [[row["rewards"]["even"][place] for row in rows if row["prompt"] == prompt]
                  for prompt in dict.fromkeys(row["prompt"] for row in rows)]  # fmt: skip
        assert all(len(samples) == 3 for samples in solved)
        assert even["pass_at"]["3"][side]["mean"] == pytest.approx(statistics.fmean(map(max, solved)))
        assert 0 <= even["pass_at"]["2"][side]["low"] <= even["pass_at"]["2"][side]["mean"]


def test_the_report_shows_pass_at_k_where_there_is_one(tmp_path: Path) -> None:
    folder = reports(tmp_path / "reports", steps=6)
    assert "Solved prompts" not in page.render(inputs.load(folder), {}, {})
    metrics = read_json(folder / "evaluate/metrics.json")
    sides = {"checkpoint": interval(0.25, 0.125), "policy": interval(0.75, 0.125), "difference": interval(0.5, 0.25)}
    metrics["words"]["pass_at"] = {"4": sides}
    write_json(folder / "evaluate/metrics.json", metrics)
    seal(folder)
    shown = page.render(inputs.load(folder), {}, {})
    (row,) = re.findall(r"<tr><td>words, k = 4</td>.*?</tr>", shown, re.DOTALL)
    assert list(map(float, re.findall(r"\d\.\d+", row))) == [0.25, 0.125, 0.375, 0.75, 0.625, 0.875, 0.5, 0.25, 0.75]
