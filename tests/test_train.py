"""Stage `train` by itself, on a tiny model: resuming, stopping, refusing; and `evaluate` behind it."""

import hashlib
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock
from scipy.stats import ks_2samp
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.__main__ import build_parser
from pipeline.commands import generate
from pipeline.diagnosis.calibration import null_statistics
from pipeline.diagnosis.verdict import TITLES, Finding, findings
from pipeline.errors import UserError
from pipeline.file_io import read_csv
from pipeline.models.sampling import Rollout
from pipeline.rewards.build import LARGEST
from pipeline.rewards.turns import settings_of_training
from pipeline.rl.advantages import reward_scale
from pipeline.rl.metrics import CALIBRATION_COLUMNS, SHUFFLED
from pipeline.runs import checkpoints
from pipeline.stages import evaluate, train
from tests.faults import fault, first
from tests.project import Project
from tests.training import contents, end_before, forget, history, interrupted, states, succeed

pytestmark = [pytest.mark.slow, pytest.mark.numeric]  # each run of the stage imports torch and transformers


def test_same_seed_same_bytes_other_seed_other_bytes(here: Project) -> None:
    """In another process too, whose hashes are others."""
    train.main()
    first = contents(here)
    assert {"data/policy/model.safetensors", "data/policy/tokenizer.json", "reports/train/run.json"} <= set(first)
    forget(here)
    succeed(here, PYTHONHASHSEED="2")
    assert contents(here) == first
    here.edit(seed=1)
    train.main()
    assert contents(here)["reports/train/history.csv"] != first["reports/train/history.csv"]


# the others end a trainer of tests/test_crash.py, which is quicker to start
@pytest.mark.parametrize("number", first(1, [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]))
def test_a_run_that_was_ended_goes_on_to_the_same_bytes(here: Project, number: signal.Signals) -> None:
    here.edit(train__steps=30)
    train.main()
    undisturbed = contents(here)
    forget(here)
    said = interrupted(here, {}, number)
    if number != signal.SIGKILL:
        assert "the same command goes on" in said
        assert not (here.root / "reports/train/history.csv").exists(), "half a history is no output"
    assert not (here.root / "data/policy").exists()
    shutil.rmtree(here.root / "reports", ignore_errors=True)
    train.main()
    assert contents(here) == undisturbed


STATEFUL = {
    "scale_rewards": "none", "baseline": "running", "kl_target": 0.001, "kl_coef": 0.05, "lr_decay": "linear",
    "lr": 0.01, "lr_base_width": 0,
}  # fmt: skip


def test_the_running_baseline_goes_on_where_it_was(here: Project) -> None:
    """Against its recurrence, read off the history, beside a KL above its target; and through an interruption."""
    here.edit(**{f"recipes__stable__{key}": value for key, value in STATEFUL.items()})
    train.main()
    undisturbed, rows = contents(here), history(here)
    running = None
    for row in rows:
        coef = 0.05 * max(1.0, row["ref_kl_sequence"] / 0.001) ** 4
        assert row["kl_coef"] == pytest.approx(coef, rel=1e-4)
        penalised = row["reward_mean"] - coef * row["ref_kl_sequence"]
        if running is not None:
            assert row["baseline"] == pytest.approx(running, rel=1e-4)
        running = penalised if running is None else 0.9 * running + 0.1 * penalised
    assert len({row["kl_coef"] for row in rows}) > 2
    assert [row["lr"] for row in rows] == pytest.approx([0.01 * (step + 1) / 6 for step in range(5)] + [0.01])

    forget(here)
    end_before(3)
    train.main()
    assert contents(here) == undisturbed


def test_the_greedy_baseline_is_the_reward_of_a_greedy_completion(here: Project) -> None:
    here.edit(recipes__stable__baseline="greedy", recipes__stable__kl="none", train__steps=1)
    train.main()
    folder = here.root / "data/checkpoint/policy"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).float(), AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in (here.root / "reports/train/samples.jsonl").read_text().splitlines()]
    assert len(rows) == 6  # both samples of every prompt of the step
    lengths = []
    for row in rows[::2]:
        ids = tokenizer(row["prompt"], return_tensors="pt")
        output = model.generate(**ids, do_sample=False, max_new_tokens=6, pad_token_id=tokenizer.eos_token_id)
        lengths.append(len(tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)))
    assert history(here)[0]["baseline"] == pytest.approx(sum(-abs(n - 40) for n in lengths) / 3)


def scale(project: Project) -> float:
    return reward_scale(read_csv(project.root / "reports/train/calibration.csv"))


AFFINE = """
def affine(prompts, completions, factor, shift):
    return [factor * -abs(len(text) - 40) + shift for text in completions]
"""


@pytest.mark.parametrize(("factor", "shift"), [(128.0, 0.0), (100.0, 0.0), (1.0, 1000.0)])
def test_the_scale_and_origin_of_a_reward_change_its_columns_alone(here: Project, factor: float, shift: float) -> None:
    """Of a `stable` run; bytes for a power of two, else to rounding."""
    (here.root / "custom/affine.py").write_text(AFFINE)
    table = {"kind": "custom", "function": "custom/affine.py:affine"}
    runs, policies = [], []
    for numbers in ({"factor": 1.0, "shift": 0.0}, {"factor": factor, "shift": shift}):
        here.edit(reward="affine", rewards__affine={**table, "params": numbers}, recipes__stable__lr=0.01)
        train.main()
        runs.append(pd.DataFrame(history(here)))
        policies.append((here.root / "data/policy/model.safetensors").read_bytes())
    plain, other = runs
    moved = [name for name in plain if name.startswith("reward_")]
    assert (plain.ref_kl_sequence.abs() > 1e-3).any()
    assert (plain.grad_norm > 0).all()
    np.testing.assert_allclose(other.reward_mean, factor * plain.reward_mean + shift)
    np.testing.assert_allclose(other.baseline, factor * plain.baseline + shift, rtol=1e-5)
    rest = plain.columns.drop([*moved, "baseline"])
    np.testing.assert_allclose(other[rest], plain[rest], rtol=1e-3, atol=1e-4)
    if factor == 128:
        pd.testing.assert_frame_equal(other[rest], plain[rest], check_exact=True)
        assert policies[0] == policies[1]


def test_rewards_without_a_spread_are_not_scaled() -> None:
    rows = [{"reward_std_within": spread} for spread in (3.0, 4.0, 0.0)]
    assert reward_scale(rows) == pytest.approx((25 / 3) ** 0.5, rel=1e-15)
    for nothing in (0.0, math.nan, math.inf, 1e200):
        assert reward_scale([{"reward_std_within": nothing}]) == 1


def before_step(monkeypatch: pytest.MonkeyPatch, step: int, change: Callable[[Any], None]) -> None:
    """Changes the policy by hand before it samples for this step."""
    real = train.train_step

    def changing(run: Any, setting: Any, policy: Any, *rest: Any) -> None:
        if run.step == step:
            with torch.no_grad():
                change(policy)
        real(run, setting, policy, *rest)

    monkeypatch.setattr(train, "train_step", changing)


def test_the_greedy_completion_is_penalised_as_the_samples_are(here: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler of one token samples the greedy completion itself: reward and penalty are the baseline's. The policy is
    made to differ from the reference, so that there is a penalty."""
    before_step(monkeypatch, 0, lambda policy: policy.get_output_embeddings().weight.mul_(3))
    here.edit(recipes__stable__baseline="greedy", recipes__stable__top_k=1, train__steps=1)
    train.main()
    (row,) = history(here)
    assert row["ref_kl_sequence"] > 1
    assert row["baseline"] == pytest.approx(row["reward_mean"] - 0.2 * scale(here) * row["ref_kl_sequence"], abs=1e-3)
    assert row["advantage_std"] < 1e-5  # float32 rounds the log-likelihoods, 60 nats, to 4e-6; the penalty is a fifth


def test_the_coefficient_adapts_to_the_kl_that_is_penalised(here: Project) -> None:
    """Of the truncated sampler, not of the full softmax, which at step 0 is the reference's own."""
    here.edit(recipes__stable__top_k=1, recipes__stable__loss_distribution="sampler", recipes__stable__kl_target=1.0)
    train.main()
    rows = history(here)
    assert abs(rows[0]["ref_kl_sequence"]) < 1e-4
    assert rows[0]["kl_coef"] > 2 * 0.2


def test_the_penalty_is_that_of_the_distribution_which_the_loss_scores(here: Project) -> None:
    """A sampler of one token is certain of it: its log-ratio is minus the reference's log-likelihood, nothing else."""
    here.edit(
        recipes__stable__top_k=1, recipes__stable__loss_distribution="sampler", recipes__stable__kl_target=0.0,
        train__steps=1,
    )  # fmt: skip
    train.main()
    row = history(here)[0]
    ref = row["ref_logprob"] * row["completion_tokens"]
    assert row["baseline"] == pytest.approx(row["reward_mean"] + 0.2 * scale(here) * ref, rel=1e-5)
    assert row["logprob_gap"] == 0.0


def test_the_share_of_rescored_prompts_changes_what_is_measured_alone(here: Project) -> None:
    """And a KL term of nothing, which needs all prompts, measures what a share of one does."""
    here.edit(recipes__stable__kl="none", train__kl_probe_fraction=1.0)
    train.main()
    whole, policy = history(here), contents(here)["data/policy/model.safetensors"]
    forget(here)
    here.edit(train__kl_probe_fraction=0.4)
    train.main()
    share = history(here)
    assert contents(here)["data/policy/model.safetensors"] == policy
    rescored = {
        "ref_kl_k1", "ref_kl_se", "ref_kl_k3", "ref_kl_sequence", "ref_logprob", "ref_bits_per_byte", "ref_typicality",
        "update_kl", "update_kl_se",
    }  # fmt: skip
    for name in set(whole[0]) - rescored:
        assert [row[name] for row in share] == pytest.approx([row[name] for row in whole], nan_ok=True), name
    assert all(row["ref_kl_se"] > 0 for row in whole[1:])
    assert all(math.isnan(row["ref_kl_se"]) for row in share)  # one of three prompts
    assert {row["ref_logprob"] for row in share} != {row["ref_logprob"] for row in whole}
    forget(here)
    here.edit(recipes__stable__kl="reward_k1", recipes__stable__kl_coef=0.0, train__kl_probe_fraction=1.0)
    train.main()
    for name in rescored - {"ref_kl_se"}:
        assert [row[name] for row in history(here)] == pytest.approx([row[name] for row in whole]), name


def test_a_batch_can_be_used_for_several_updates(here: Project) -> None:
    here.edit(
        recipes__stable__importance="token",
        recipes__stable__clip_range=1e-4,
        recipes__stable__lr=0.01,
        recipes__stable__lr_base_width=0,
    )
    train.main()
    once = history(here)
    forget(here)
    here.edit(recipes__stable__epochs=3)
    train.main()
    several = history(here)
    assert several[0]["grad_norm"] == once[0]["grad_norm"]  # of the first update, on-policy
    assert once[0]["clip_share"] == 0 < several[0]["clip_share"]
    assert several[1]["ref_kl_k3"] > once[1]["ref_kl_k3"]


ONSET = 4


def collapse(policy: Any) -> None:
    """From now on its only token is the end of text."""
    policy.gpt_neox.final_layer_norm.bias.fill_(1)  # what else the norm puts out sums to zero
    policy.get_output_embeddings().weight[policy.config.eos_token_id] += 100 / policy.config.hidden_size


def diagnosed(project: Project) -> list[Finding]:
    """What the verdict says of the files."""
    reports = project.root / "reports/train"
    return findings(read_csv(reports / "history.csv"), null_statistics(read_csv(reports / "calibration.csv"), 3), 12)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_a_collapse_can_end_the_run_and_the_last_healthy_policy_is_kept(
    here: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice, with and without the stop: the same steps until then, and the policy from before the onset both times."""
    before_step(monkeypatch, ONSET, collapse)
    # the scale is of prompts behind the last step: a shorter run has another
    here.edit(train__steps=8, recipes__stable__scale_rewards="none")
    train.main()
    went_on, found = repr(history(here)), diagnosed(here)  # nan is not equal to itself
    assert (found[0].kind, found[0].onset) == ("empty", ONSET)
    assert f"Diagnosis: {TITLES['empty'].lower()} from step {ONSET} on" in capsys.readouterr().out
    healthy = json.loads((here.root / "data/healthy/healthy.json").read_text())
    assert healthy == {"step": ONSET - 1, "weights": "data/healthy"}
    kept = weights(here.root / "data/healthy")

    forget(here)
    here.edit(train__on_collapse="stop")
    train.main()
    stopped = history(here)
    assert len(stopped) < 8
    assert went_on.startswith(repr(stopped)[:-1])
    assert json.loads((here.root / "reports/train/summary.json").read_text())["stopped"] is True
    assert json.loads((here.root / "data/healthy/healthy.json").read_text()) == healthy
    again = weights(here.root / "data/healthy")
    assert all(torch.equal(again[name], kept[name]) for name in kept)

    forget(here)  # the policy after `step` updates, by training for as many
    here.edit(train__steps=healthy["step"], train__on_collapse="continue")
    train.main()
    truth = weights(here.root / "data/policy")
    assert all(torch.equal(truth[name], kept[name]) for name in kept)


def test_an_interrupted_collapse_keeps_the_same_healthy_policy(here: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """States that a signal leaves off the grid are resumed from, and are no candidates."""
    before_step(monkeypatch, ONSET, collapse)
    here.edit(train__steps=8, train__checkpoint_every=2)
    train.main()
    undisturbed = contents(here)
    assert diagnosed(here)[0].onset == ONSET
    assert ONSET % 2 == 0, "else the state before the onset is on the grid anyway"
    forget(here)
    real = train.train_step

    def interrupted(run: Any, *arguments: Any) -> None:
        real(run, *arguments)
        if run.step == ONSET - 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train, "train_step", interrupted)
    with pytest.raises(SystemExit):
        train.main()
    assert states(here)[-1].name == f"state-{ONSET - 1:08d}.pt"
    train.main()
    assert contents(here) == undisturbed


def test_a_damaged_healthy_policy_is_not_replaced_in_silence(here: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    before_step(monkeypatch, ONSET, collapse)
    here.edit(train__steps=8)
    train.main()
    undisturbed = contents(here)
    step = json.loads(undisturbed["data/healthy/healthy.json"])["step"]
    (kept,) = here.root.glob(f".checkpoints/*/state-{step:08d}.pt")
    kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.raises(UserError, match="the policy before the collapse, is damaged; the same command trains again"):
        train.main()
    train.main()
    assert contents(here) == undisturbed


def test_a_healthy_run_points_to_its_policy(here: Project) -> None:
    here.edit(train__on_collapse="stop")
    train.main()
    assert diagnosed(here) == []
    assert json.loads((here.root / "data/healthy/healthy.json").read_text()) == {"step": 6, "weights": "data/policy"}
    assert [path.name for path in (here.root / "data/healthy").iterdir()] == ["healthy.json"]


def test_calibration_changes_nothing_but_the_scale_of_rewards(here: Project) -> None:
    here.edit(recipes__stable__scale_rewards="none")
    train.main()
    before, first = contents(here), read_csv(here.root / "reports/train/calibration.csv")
    forget(here)
    here.edit(train__calibration_batches=6)
    train.main()
    after = contents(here)
    assert read_csv(here.root / "reports/train/calibration.csv") == first[:6]
    for name in ("data/policy/model.safetensors", "reports/train/history.csv", "reports/train/samples.jsonl"):
        assert after[name] == before[name], name


def test_calibration_measures_what_training_does_where_nothing_is_learnt(here: Project) -> None:
    """A step at a learning rate of next to nothing is one more batch of the reference."""
    here.edit(recipes__stable__lr=1e-30, train__calibration_batches=60, train__steps=60, train__checkpoint_every=60)
    train.main()
    rows, batches = history(here), read_csv(here.root / "reports/train/calibration.csv")
    assert findings(rows, null_statistics(batches, 3), 60) == []
    for name in set(CALIBRATION_COLUMNS[1:]) - set(SHUFFLED.values()):
        values, others = [row[name] for row in rows], [row[name] for row in batches]
        if len({*values, *others}) > 1:
            assert ks_2samp(values, others, method="asymp").pvalue > 1e-4, name


def test_a_damaged_state_is_passed_over(here: Project, capsys: pytest.CaptureFixture[str]) -> None:
    ready = here
    train.main()
    undisturbed = contents(ready)
    newest = states(ready)[-1]
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(damaged)
    train.main()
    assert f"{newest.name} is damaged" in capsys.readouterr().err
    assert contents(ready) == undisturbed
    newest = states(ready)[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    train.main()
    assert f"{newest.name} is damaged" in capsys.readouterr().err
    assert contents(ready) == undisturbed


def test_a_second_trainer_says_who_is_at_work(here: Project) -> None:
    train.main()
    folder = next(path for path in (here.root / ".checkpoints").iterdir() if path.is_dir())
    (folder / "owner").write_text("4711\n")
    with FileLock(folder.with_suffix(".lock")), pytest.raises(UserError, match="process 4711"):
        train.main()


CUSTOM = {
    "raises": ("def f(prompts, completions):\n    return 1 / 0\n",
    "ZeroDivisionError: division by zero (line 2 of custom/mine.py)"),
    "too few": ("def f(prompts, completions):\n    return [1.0]\n", "returned 1 values for 6 completions"),
    "nan": ("def f(prompts, completions):\n    return [float('nan')] * len(completions)\n", "not a finite number"),
    "text": ("def f(prompts, completions):\n    return ['good'] * len(completions)\n", "'good'"),
    "none": ("def f(prompts, completions):\n    pass\n", "NoneType"),
    "no function": ("def g(prompts, completions):\n    pass\n", "defines no function 'f'"),
    "syntax": ("def f(:\n", "SyntaxError"),
    "exits": ("import sys\ndef f(prompts, completions):\n    sys.exit(0)\n",
    "SystemExit: 0 (line 3 of custom/mine.py)"),
    "dict": ("def f(prompts, completions):\n    return dict.fromkeys(range(len(completions)), 1.0)\n",
    "dict, not a list"),
    "endless": ("import itertools\ndef f(prompts, completions):\n    return itertools.count()\n", "7 values for 6"),
    "late": ("calls = []\ndef f(prompts, completions):\n    calls.append(1)\n    assert len(calls) < 12, 'enough'\n"
             "    return [0.0] * len(completions)\n", "AssertionError: enough (line 4 of custom/mine.py)"),
}  # fmt: skip


@pytest.mark.faults
@pytest.mark.parametrize("case", CUSTOM)
def test_a_bad_custom_reward_is_one_line_and_leaves_nothing(here: Project, case: str) -> None:
    code, expected = CUSTOM[case]
    (here.root / "custom/mine.py").write_text(code)
    here.edit(reward="mine", rewards__mine={"kind": "custom", "function": "custom/mine.py:f"})
    with fault("custom reward that fails in training"):
        with pytest.raises(UserError, match=re.escape(expected)):
            train.main()
        assert contents(here) == {}


@pytest.mark.faults
@pytest.mark.parametrize("case", first(1, ["exits", "nan", "late"]))
def test_a_bad_custom_reward_ends_the_process_with_one_line(ready: Project, case: str) -> None:
    code, expected = CUSTOM[case]
    (ready.root / "custom/mine.py").write_text(code)
    ready.edit(reward="mine", rewards__mine={"kind": "custom", "function": "custom/mine.py:f"})
    with fault("custom reward that fails in training"):
        assert expected in ready.refuse("train")
        assert contents(ready) == {}


def test_editing_a_custom_reward_is_another_run(here: Project) -> None:
    (here.root / "custom/mine.py").write_text("def f(prompts, completions):\n    return [0.0] * len(completions)\n")
    here.edit(reward="mine", rewards__mine={"kind": "custom", "function": "custom/mine.py:f"}, train__steps=1)
    train.main()
    (here.root / "custom/mine.py").write_text("def f(prompts, completions):\n    return [1.0] * len(completions)\n")
    train.main()
    assert history(here)[0]["reward_mean"] == 1.0
    assert len([path for path in (here.root / ".checkpoints").iterdir() if path.is_dir()]) == 2


INFINITE = 1e40  # in float32: the loss is infinite with such a coefficient


@pytest.mark.parametrize(("choice", "rows"), [("stop", 1), ("skip", 6)])
def test_a_non_finite_loss_is_never_applied(here: Project, choice: str, rows: int) -> None:
    """A coefficient too large for float32 makes the loss infinite: the policy must stay what the checkpoint is."""
    here.edit(recipes__stable__entropy_coef=INFINITE, train__on_nonfinite=choice)
    train.main()
    assert [row["nonfinite"] for row in history(here)] == [1.0] * rows
    summary: dict[str, Any] = json.loads((here.root / "reports/train/summary.json").read_text())
    assert summary["stopped"] == (choice == "stop")
    assert summary["steps"] == rows
    from safetensors.torch import load_file

    trained = load_file(here.root / "data/policy/model.safetensors")
    before = load_file(here.root / "data/checkpoint/policy/model.safetensors")
    assert trained.keys() == before.keys()
    assert all((trained[name] == before[name].float()).all() for name in trained)


def test_a_policy_that_its_last_update_broke_is_no_healthy_one(
    here: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its weights are finite, and so large that what it says is not: no further step would show that."""
    here.keep_rewards("length")
    here.edit(train__steps=1)
    here.edit(**{f"recipes__stable__{key}": value for key, value in
                 {"optimizer": "sgd", "lr": 1000.0, "max_grad_norm": 0, "entropy_coef": 1e16}.items()})  # fmt: skip
    train.main()
    (row,) = history(here)
    assert row["nonfinite"] == 0, "the update itself was finite"
    assert row["nonfinite_logprobs"] > 0
    assert [(finding.kind, finding.onset) for finding in diagnosed(here)] == [("numeric", 0)]
    evaluate.main()
    assert "warning: the policy's log-probabilities are not finite" in capsys.readouterr().err


def test_a_run_is_not_recorded_under_parameters_changed_meanwhile(
    here: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DVC looks at params.yaml, deps and code once more when the stage has ended, and would record those."""
    changes: dict[str, Callable[[], Any]] = {
        "params.yaml": lambda: here.edit(seed=1),
        "custom/": lambda: (here.root / "custom/words.txt").write_text("a reward may read it"),
        "data/prompts/train.jsonl": lambda: prompts.write_text(prompts.read_text() + '{"prompt": "More"}\n'),
    }
    here.edit(reward="mine", rewards__mine={"kind": "custom", "function": "custom/example.py:questions"})
    real, prompts, before = train.train_step, here.root / "data/prompts/train.jsonl", {}
    for name in ("params.yaml", "data/prompts/train.jsonl"):
        before[name] = (here.root / name).read_text()
    for what, change in changes.items():

        def changing(run: Any, *arguments: Any, change: Callable[[], Any] = change) -> None:
            real(run, *arguments)
            if run.step == 3:
                change()

        monkeypatch.setattr(train, "train_step", changing)
        with pytest.raises(
            UserError, match=f"^{what} changed while this run trained; undo that and repeat the command"
        ):
            train.main()
        assert not (here.root / "data/policy").exists()
        assert not (here.root / "reports/train/run.json").exists()
        for name, text in before.items():
            (here.root / name).write_text(text)
        (here.root / "custom/words.txt").unlink(missing_ok=True)
        monkeypatch.setattr(train, "train_step", lambda *_: pytest.fail("no step is done again"))
        train.main()
        assert len(history(here)) == 6
        forget(here)
    monkeypatch.setattr(train, "train_step", real)

    def removing(run: Any, *arguments: Any) -> None:
        real(run, *arguments)
        prompts.unlink(missing_ok=True)

    monkeypatch.setattr(train, "train_step", removing)
    with pytest.raises(UserError, match=r"^data/prompts/train\.jsonl was removed while this run trained; undo that"):
        train.main()


def test_parameters_changed_during_an_evaluation_are_not_recorded(
    here: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.keep_rewards("length")
    here.edit(reward="length", train__steps=1)
    train.main()
    real = evaluate.evaluate

    def changing(*arguments: Any) -> Any:
        here.edit(evaluate__prompts=3)
        return real(*arguments)

    monkeypatch.setattr(evaluate, "evaluate", changing)
    with pytest.raises(UserError, match=r"^params\.yaml changed while the policy was evaluated"):
        evaluate.main()
    assert not (here.root / "reports/evaluate").exists()
    evaluate.main()


def test_the_history_is_whole_whatever_git_does_to_the_file_meanwhile(
    here: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`git stash`, and with it a `dvc exp run` beside a run, puts another file in the place of the one that grows."""
    train.main()
    undisturbed, real = contents(here), train.train_step
    forget(here)

    def disturbed(run: Any, *arguments: Any) -> None:
        real(run, *arguments)
        if run.step == 3:
            file = here.root / "reports/train/history.csv"
            file.unlink()
            file.write_text("step\n0\n")

    monkeypatch.setattr(train, "train_step", disturbed)
    train.main()
    assert contents(here) == undisturbed


def test_ctrl_c_while_a_state_is_saved_leaves_none_half_written(tmp_path: Path) -> None:
    class Interrupting:
        def write(self, _: Any) -> int:
            raise KeyboardInterrupt

    writer = checkpoints.Hashing(Interrupting())  # type: ignore[arg-type]
    with settings_of_training():
        torch.save({"policy": torch.ones(1000)}, writer)  # type: ignore[arg-type]
    assert isinstance(writer.failure, KeyboardInterrupt)
    with pytest.MonkeyPatch.context() as inside:
        inside.setattr(checkpoints, "Hashing", lambda *_: writer)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(tmp_path, 1, {"policy": torch.ones(1000)}, 0, 1)
    assert not list(tmp_path.iterdir())


def test_a_misaligned_objective_shows_at_step_0(here: Project) -> None:
    here.edit(train__steps=1)
    train.main()
    assert history(here)[0]["logprob_gap"] < 1e-4
    here.edit(recipe="notebook")
    train.main()
    assert history(here)[0]["logprob_gap"] > 0.1


def test_one_held_out_prompt_is_said_to_have_no_interval(here: Project, capsys: pytest.CaptureFixture[str]) -> None:
    here.keep_rewards("length")
    here.edit(train__steps=1, evaluate__prompts=1)
    train.main()
    evaluate.main()
    assert "(one prompt, no interval) over the reference model" in capsys.readouterr().out
    metrics = json.loads((here.root / "reports/evaluate/metrics.json").read_text())
    assert [metrics["length"][part]["low"] for part in ("checkpoint", "policy", "difference")] == [None] * 3


def test_evaluate_gives_an_unchanged_policy_the_same_completions(here: Project) -> None:
    """The same random numbers for both: with a learning rate of (almost) nothing every pair is equal."""
    here.edit(train__steps=1, recipes__stable__lr=1e-30)
    train.main()
    evaluate.main()
    metrics = json.loads((here.root / "reports/evaluate/metrics.json").read_text())
    assert metrics["length"]["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert metrics["length"]["win_rate"] == 0.5
    rows = [json.loads(line) for line in (here.root / "reports/evaluate/completions.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 2
    assert all(row["checkpoint"] == row["policy"] for row in rows)
    means = [sum(row["rewards"]["length"][0] for row in rows) / len(rows)]
    assert means == pytest.approx([metrics["length"]["checkpoint"]["mean"]])


def test_a_forced_run_trains_anew_each_time(here: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """`dvc repro -f` of what DVC has already: the finished state of the run before must not stand in for training."""
    train.main()
    first = contents(here)
    assert capsys.readouterr().out.count("Step: ") == 6
    train.main()  # not committed yet, as after a kill between the end of train and DVC's commit
    assert capsys.readouterr().out.count("Step: ") == 0
    digest = hashlib.md5(first["reports/train/run.json"]).hexdigest()
    (here.root / "dvc.lock").write_text(
        f"stages:\n  train:\n    outs:\n    - path: data/policy\n      md5: 12.dir\n"
        f"    - path: reports/train/run.json\n      md5: {digest}\n"
    )
    for _ in range(2):
        train.main()
        assert capsys.readouterr().out.count("Step: ") == 6
        assert contents(here) == first


def test_a_forced_run_that_stopped_early_trains_anew(here: Project, capsys: pytest.CaptureFixture[str]) -> None:
    here.edit(recipes__stable__entropy_coef=INFINITE)
    train.main()
    digest = hashlib.md5(contents(here)["reports/train/run.json"]).hexdigest()
    (here.root / "dvc.lock").write_text(
        f"stages:\n  train:\n    outs:\n    - path: data/policy\n      md5: 12.dir\n"
        f"    - path: reports/train/run.json\n      md5: {digest}\n"
    )
    capsys.readouterr()
    train.main()
    assert capsys.readouterr().out.count("Step: ") == 1


def test_a_custom_reward_may_edit_what_it_is_given(here: Project) -> None:
    code = "def f(prompts, completions):\n    n = len(completions)\n    completions.clear()\n    return [0.0] * n\n"
    (here.root / "custom/mine.py").write_text(code)
    here.edit(reward="mine", rewards__mine={"kind": "custom", "function": "custom/mine.py:f"}, train__steps=1)
    train.main()
    rows = [json.loads(line) for line in (here.root / "reports/train/samples.jsonl").read_text().splitlines()]
    assert any(row["completion"] for row in rows)


def test_sequences_longer_than_those_that_cache_tried_are_refused(here: Project) -> None:
    """Where `cache` was left out: the layout that it chose may ignore a window, or the context, that they exceed."""
    train.main()
    before = contents(here)
    here.edit(train__max_tokens=3000)
    for stage in (train.main, evaluate.main):
        with pytest.raises(
            UserError, match=r"layout\.json: chosen for sequences of up to 128 tokens, these have up to 30"
        ):
            stage()
    assert contents(here) == before


def test_empty_completions_are_seen_where_the_reward_reads_special_tokens(
    here: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The notebook's recipe feeds `<|endoftext|>` to the reward as text; the statistics look at the text without it."""
    here.edit(recipe="notebook", train__steps=1)
    train.main()

    def ends_at_once(policy: Any, ids: Any, mask: Any, limits: Any, noise: Any, eos: Any, *rest: Any) -> Rollout:
        rows, group = len(noise), len(noise) // len(ids)
        return Rollout(
            ids.repeat_interleave(group, 0), mask.repeat_interleave(group, 0), torch.full((rows, 1), eos[0]),
            torch.ones(rows, dtype=torch.int64), torch.zeros(rows, 1), torch.zeros(rows, 1),
        )  # fmt: skip

    monkeypatch.setattr(evaluate, "sample", ends_at_once)
    evaluate.main()
    metrics = json.loads((here.root / "reports/evaluate/metrics.json").read_text())
    assert metrics["text"]["policy"]["empty_share"] == 1.0
    assert metrics["text"]["policy"]["ended_share"] == 1.0
    rows = [json.loads(line) for line in (here.root / "reports/evaluate/completions.jsonl").read_text().splitlines()]
    assert {row["policy"] for row in rows} == {"<|endoftext|>"}


# all that a reward may do to its process, by each call and by its import
CHANGES = """
import gc, locale, os, random, signal, sys, tempfile, warnings
import numpy as np, torch

held = []

def change():
    random.seed(1); np.random.seed(1); torch.manual_seed(1)
    os.chdir(tempfile.gettempdir())
    os.environ.clear()
    os.umask(0o777)
    sys.path.clear()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, 1000)
    warnings.simplefilter("error")
    gc.disable()
    np.seterr(all="raise")
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_flush_denormal(True)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("medium")
    torch.backends.mkldnn.enabled = False
    torch.backends.cuda.enable_flash_sdp(False)
    torch.autograd.set_detect_anomaly(True)
    torch.set_grad_enabled(False)
    for mode in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        mode.__enter__()
        held.append(mode)
    sys.stdout.close()
    sys.stderr.close()

change()

def f(prompts, completions):
    change()
    return [float(len(completion)) for completion in completions]
"""


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_policy_does_not_depend_on_what_a_reward_does_to_its_process(here: Project, precision: str) -> None:
    table = {"kind": "custom", "function": "custom/mine.py:f"}
    here.edit(reward="mine", rewards__mine=table, train__steps=3, recipes__stable__precision=precision)
    made = []
    for code in ("def f(prompts, completions):\n    return [float(len(c)) for c in completions]\n", CHANGES):
        (here.root / "custom/mine.py").write_text(code)
        train.main()
        files = contents(here)
        files.pop("reports/train/run.json")  # names the reward's digest, as the next does
        summary = json.loads(files.pop("reports/train/summary.json"))
        summary.pop("digests")
        files["summary"] = json.dumps(summary).encode()
        made.append(files)
        forget(here)
    assert made[0] == made[1]
    assert {"reports/train/history.csv", "data/policy/model.safetensors"} <= made[0].keys()


@pytest.mark.parametrize("recipe", ["stable", "notebook"])
@pytest.mark.parametrize("size", [LARGEST, 5e-324])
def test_a_reward_of_any_size_that_is_taken_trains(here: Project, recipe: str, size: float) -> None:
    code = f"def f(prompts, completions):\n    return [{size} * (-1) ** i for i in range(len(completions))]\n"
    (here.root / "custom/mine.py").write_text(code)
    here.edit(reward="mine", rewards__mine={"kind": "custom", "function": "custom/mine.py:f"}, recipe=recipe)
    train.main()
    rows = history(here)
    assert [(row["nonfinite"], row["nonfinite_logprobs"]) for row in rows] == [(0, 0)] * 6
    assert "numeric" not in [finding.kind for finding in diagnosed(here)]
    if size == LARGEST:  # Adam's steps do not depend on a gradient's size
        assert all(row["relative_update"] > 0 for row in rows)


@pytest.mark.usefixtures("torch_as_before")
def test_missing_inputs_are_one_line(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.root)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    for stage, missing in ((train, "data/prompts/train.jsonl"), (evaluate, "data/prompts/heldout.jsonl")):
        with pytest.raises(UserError, match=missing):
            stage.main()
    with pytest.raises(UserError, match="no model in"):
        generate.main(build_parser().parse_args(["generate", "Hello"]))
    assert os.listdir(project.root / "data") == ["pocket"]
