"""It learns: the rewards `length` and `words` rise on the pocket model, on each of five seeds."""

import json
import shutil

import pandas as pd
import pytest

from pipeline.stages import evaluate, train
from tests.project import Project, copy_of_project

pytestmark = [pytest.mark.slow, pytest.mark.numeric]

SIZES = {"prompts_per_step": 8, "samples_per_prompt": 8, "max_tokens": 12, "threads": 1, "checkpoint_every": 100,
         "calibration_batches": 6}  # fmt: skip
STEPS = {"length": 8, "words": 40}  # a required word has to be said by chance first


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The pocket model, cached. A few steps suffice for `stable` at ten times its rate with half its KL."""
    project = copy_of_project(tmp_path_factory.mktemp("pocket"))
    for stage in ("prepare", "cache"):
        done = project.run(stage)
        assert done.returncode == 0, done.stderr
    project.edit(
        recipes__stable__lr=1e-3, recipes__stable__kl_coef=0.1, evaluate__prompts=40, evaluate__bootstrap=100,
        **{f"train__{key}": value for key, value in SIZES.items()},
    )  # fmt: skip
    project.keep_rewards("length", "words")
    return project


@pytest.mark.parametrize(("reward", "seed"), [
    ("length", 0), *(pytest.param(reward, seed, marks=pytest.mark.exhaustive)
                     for reward in STEPS for seed in range(5) if (reward, seed) != ("length", 0)),
])  # fmt: skip
def test_the_held_out_reward_rises_by_three_standard_errors(
    pocket: Project, monkeypatch: pytest.MonkeyPatch, torch_as_before: None, reward: str, seed: int
) -> None:
    """Over the reference model, paired by prompt and random numbers; the standard error is that of prompts."""
    pocket.enter(monkeypatch)
    for folder in ("data/policy", "reports", ".checkpoints"):
        shutil.rmtree(folder, ignore_errors=True)
    pocket.edit(reward=reward, seed=seed, train__steps=STEPS[reward])
    train.main()
    evaluate.main()
    rows = [json.loads(line) for line in (pocket.root / "reports/evaluate/completions.jsonl").read_text().splitlines()]
    gains = pd.DataFrame(
        {"prompt": row["prompt"], "gain": row["rewards"][reward][1] - row["rewards"][reward][0]} for row in rows
    )
    of_prompts = gains.groupby("prompt")["gain"].mean()
    assert len(of_prompts) > 30
    assert of_prompts.mean() > 3 * of_prompts.sem() > 0
