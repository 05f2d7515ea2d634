"""The held-out curve of training, the best policy by it, and over-optimisation."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.diagnosis.verdict import Finding
from pipeline.errors import UserError
from pipeline.file_io import read_json, read_jsonl
from pipeline.rl.heldout import best_report, best_step, candidate_steps, record_steps
from pipeline.stages import train
from tests.project import Project
from tests.training import contents, forget

TRAINED = ("data/policy/", "data/healthy/", "reports/train/history.csv", "reports/train/samples.jsonl",
           "reports/train/calibration.csv")  # fmt: skip


def of_training(project: Project) -> dict[str, bytes]:
    return {name: content for name, content in contents(project).items() if name.startswith(TRAINED)}


def best(project: Project) -> dict[str, Any]:
    return dict(read_json(project.root / "data/best/best.json"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


@pytest.mark.slow
@pytest.mark.numeric
@pytest.mark.parametrize("changes", [{}, {"train__lora_rank": 2}], ids=["all weights", "adapters"])
def test_measuring_changes_no_trained_byte(here: Project, changes: dict[str, Any]) -> None:
    here.edit(train__steps=5, **changes)
    train.main()
    assert (here.root / "reports/train/heldout.jsonl").read_bytes() == b""
    assert best(here)["weights"] is None
    without = of_training(here)
    forget(here)
    here.edit(evaluate__every=2, evaluate__curve_prompts=3)
    train.main()
    assert of_training(here) == without

    rows = read_jsonl(here.root / "reports/train/heldout.jsonl")
    prompts = [row["prompt"] for row in read_jsonl(here.root / "data/prompts/heldout.jsonl")[:3]]
    assert [(row["step"], row["prompt"]) for row in rows] == [(s, prompt) for s in (0, 2, 4, 5) for prompt in prompts]
    assert [row["reward"] for row in rows] == [-abs(len(row["completion"]) - 40) for row in rows]
    assert max(abs(row["kl"]) for row in rows[:3]) < 1e-5  # the untouched policy is the reference
    assert max(abs(row["kl"]) for row in rows[3:]) > 1e-4


@pytest.mark.slow
@pytest.mark.numeric
def test_the_best_policy_is_that_of_its_step_also_after_a_kill(here: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards of a script: the second measurement is the best one. The kill comes after a measurement that no state
    has."""
    script, real = {0: -5.0, 2: 3.0, 4: 1.0, 6: 2.0, 7: 3.0}, train.measure
    monkeypatch.setattr(train, "measure", lambda context, step: [
        row | {"reward": script[step] + place} for place, row in enumerate(real(context, step))
    ])  # fmt: skip
    # the scale is of prompts behind the last step: a shorter run has another
    here.edit(train__steps=7, train__checkpoint_every=5, recipes__stable__scale_rewards="none", evaluate__every=2,
              evaluate__curve_prompts=4)  # fmt: skip
    train.main()
    undisturbed = contents(here)
    kept = weights(here.root / "data/best")
    # the script's rewards rise by 1 from prompt to prompt: 3 and 5 choose, 4 and 6 report, each 8 above step 0
    eight = {"mean": 8.0, "low": 8.0, "high": 8.0}
    assert best(here) == {"step": 2, "weights": "data/best", "reward": "length",
                          "chosen_on": {"prompts": 2, "mean": 4.0},
                          "reported_on": {"prompts": 2, "difference": eight}}  # fmt: skip

    for killed_at in (4, 6):  # with no state yet; with one that has no row of the last measurement
        forget(here)
        step = train.train_step

        def killed(run: Any, *arguments: Any, at: int = killed_at) -> None:
            if run.step == at:
                raise KeyboardInterrupt
            step(run, *arguments)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(train, "train_step", killed)
            with pytest.raises(KeyboardInterrupt):
                train.main()
        train.main()
        assert contents(here) == undisturbed

    (file,) = here.root.glob(".checkpoints/*/best-00000002.pt")  # no other candidate is left
    file.unlink()
    with pytest.raises(UserError, match="the best policy, is damaged; the same command trains again"):
        train.main()
    train.main()
    assert contents(here) == undisturbed

    forget(here)  # the policy after 2 updates, by training for as many
    here.edit(train__steps=2, evaluate__every=0)
    train.main()
    truth = weights(here.root / "data/policy")
    assert all(torch.equal(truth[name], kept[name]) for name in kept)


@pytest.mark.slow
@pytest.mark.numeric
def test_a_curve_needs_two_prompts(here: Project) -> None:
    (here.root / "data/prompts/heldout.jsonl").write_text(json.dumps({"prompt": "Hello!", "message_id": None}) + "\n")
    here.edit(evaluate__every=1)
    with pytest.raises(UserError, match=r"one to choose by and one to report on; .* leave 1"):
        train.main()


def measured(**rewards: list[float]) -> list[dict[str, Any]]:
    """Rows of heldout.jsonl, by `at` and the step."""
    return [{"step": int(at.removeprefix("at")), "reward": reward, "kl": 0.1}
            for at, values in rewards.items() for reward in values]  # fmt: skip


CURVE = measured(at0=[0.0, 9.0], at4=[2.0, 0.0], at8=[1.0, 9.0], at12=[2.0, 9.0], at16=[3.0, 9.0])


def collapse(kind: Any, onset: int) -> list[Finding]:
    return [Finding(kind, onset, onset, ())]


def test_the_best_step_by_hand() -> None:
    """By the first prompt of two; of equal ones the earlier; none of or behind a collapse, none that is not finite."""
    assert record_steps(CURVE) == [0, 4, 16]
    assert best_step(CURVE, []) == 16
    assert best_step(CURVE, collapse("hacking", 17)) == 16
    assert best_step(CURVE, collapse("hacking", 16)) == 4
    assert best_step(CURVE, collapse("misaligned", 0)) == 0
    assert best_step(CURVE, collapse("starved", 0)) == 16
    broken = [row | ({"kl": None} if row["step"] == 16 else {}) for row in CURVE]
    assert best_step(broken, []) == 4


def test_the_weights_that_are_kept_by_hand() -> None:
    """The best known to be healthy, and what a collapse that is not yet confirmed may leave: a step needs another one
    behind it to be known."""
    assert candidate_steps(CURVE[:4], [], 4) == {4}
    assert candidate_steps(CURVE, [], 16) == {4, 16}
    assert candidate_steps(CURVE, [], 18) == {16}
    assert candidate_steps(CURVE, collapse("hacking", 15), 17) == {4}
    assert candidate_steps(CURVE[:2], [], 0) == set()


def test_the_report_is_of_the_other_half() -> None:
    report = best_report(CURVE, 4, seed=0)
    assert report["chosen_on"] == {"prompts": 1, "mean": 2.0}
    assert report["reported_on"] == {"prompts": 1, "difference": {"mean": -9.0, "low": None, "high": None}}
    four = best_report(measured(at0=[5.0, 0.0, 5.0, 2.0], at3=[9.0, 1.0, 9.0, 5.0]), 3, seed=0)
    # of two differences, 1 and 3, resamples have means of 1, 2, 3 with odds 1 : 2 : 1
    assert four["reported_on"]["difference"] == {"mean": 2.0, "low": 1.0, "high": 3.0}
    assert math.isclose(four["chosen_on"]["mean"], 9.0)
