"""A right algorithm solves the sums that it trains on; where the answers are shuffled it has nothing to learn."""

import json
import random
import shutil
from pathlib import Path

import pytest

from pipeline.stages import evaluate, train
from tests.project import ROOT, Project, copy_of_project
from tests.training import history

pytestmark = [pytest.mark.exhaustive, pytest.mark.numeric]

STEPS = 200
SIZES = {"steps": STEPS, "prompts_per_step": 32, "max_tokens": 8, "threads": 1, "checkpoint_every": STEPS}


def trained(base: Path, monkeypatch: pytest.MonkeyPatch, shuffled: bool) -> Project:
    """RLOO on the sums, or on the same questions with each other's answers, and its evaluation."""
    project = copy_of_project(base)
    shutil.copytree(ROOT / "data/pocket-math", project.root / "data/pocket-math")
    if shuffled:
        for file in (project.root / "data/pocket-math/prompts").glob("*.jsonl"):
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            answers = [row["answer"] for row in rows]
            random.Random(0).shuffle(answers)
            rows = [row | {"answer": answer} for row, answer in zip(rows, answers, strict=True)]
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    project.keep_rewards("answer")
    project.edit(model="pocket-math", prompts="arithmetic", reward="answer", recipe="rloo", recipes__rloo__lr=1e-4)
    project.edit(**{f"train__{key}": value for key, value in SIZES.items()}, evaluate__prompts=0)
    for stage in ("prepare", "cache"):
        done = project.run(stage)
        assert done.returncode == 0, done.stderr
    project.enter(monkeypatch)
    train.main()
    evaluate.main()
    return project


def solved(project: Project) -> tuple[float, float, float]:
    """Share of the training problems solved at the end, and of the held-out ones before and after."""
    rewards = [row["reward_mean"] for row in history(project)][-16:]  # of 512 problems, each of them once
    found = json.loads((project.root / "reports/evaluate/metrics.json").read_text())["answer"]["pass_at"]["1"]
    return sum(rewards) / len(rewards), found["checkpoint"]["mean"], found["policy"]["mean"]


def test_rloo_solves_the_sums_that_it_trains_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch_as_before: None
) -> None:
    train_share, before, after = solved(trained(tmp_path, monkeypatch, shuffled=False))
    assert train_share > 0.95
    assert 0.2 < before < 0.8 < after


def test_shuffled_answers_leave_it_at_chance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch_as_before: None
) -> None:
    """To say the most frequent answer always would solve one problem in forty."""
    train_share, before, after = solved(trained(tmp_path, monkeypatch, shuffled=True))
    assert max(train_share, before, after) < 0.05
