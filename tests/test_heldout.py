"""The held-out curve of training, the best policy by it, and over-optimisation."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.config.load import load_params
from pipeline.config.schema import LIKELIHOOD
from pipeline.diagnosis.calibration import Spread
from pipeline.diagnosis.curve import curve_rows
from pipeline.diagnosis.over_optimisation import Heldout, over_optimised
from pipeline.diagnosis.thresholds import THRESHOLDS
from pipeline.diagnosis.verdict import Finding, heldout_finding
from pipeline.distributed.dist_context import DistContext
from pipeline.errors import UserError
from pipeline.file_io import read_json, read_jsonl, write_jsonl
from pipeline.paths import RunFiles
from pipeline.report import page, style
from pipeline.report.inputs import load
from pipeline.rl.batch import sample_batch
from pipeline.rl.context import build_context
from pipeline.rl.heldout import best_report, best_step, candidate_steps, measure, record_steps
from pipeline.rl.seeding import draw_uniforms
from pipeline.rl.state import TrainState
from pipeline.runs import checkpoints
from pipeline.runs.background import BackgroundWriter
from pipeline.runs.consistency import raise_if_mixed
from pipeline.runs.loaded_run import load_run
from pipeline.runs.provenance import chosen_params
from pipeline.stages import diagnose, plot, train
from tests.html import words_of
from tests.project import ROOT, Project
from tests.reports import history as made_up_history
from tests.reports import reports as made_up
from tests.seal import edit, seal
from tests.training import contents, end_before, forget

OF_TRAINING = ("data/policy/", "data/healthy/", "reports/train/history.csv", "reports/train/samples.jsonl",
           "reports/train/calibration.csv")  # fmt: skip


def of_training(project: Project) -> dict[str, bytes]:
    return {name: content for name, content in contents(project).items() if name.startswith(OF_TRAINING)}


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
    assert (here.root / "reports/train/heldout.jsonl").read_bytes() == b"\n"
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
        end_before(killed_at)
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


@pytest.mark.numeric
def test_what_a_row_says_is_transformers_own(here: Project) -> None:
    """In two parts of two prompts: a step samples two completions. The policy is the reference with a louder head."""
    here.edit(train__prompts_per_step=1, evaluate__every=1, evaluate__curve_prompts=4)
    params = load_params()
    context, policy = build_context(params, torch.device("cpu"))
    reference = AutoModelForCausalLM.from_pretrained("data/checkpoint/policy")
    with torch.no_grad():
        policy.get_output_embeddings().weight.mul_(30.0)
    rows = measure(context, 7)
    assert [row["prompt"] for row in rows] == [prompt.text for prompt in context.heldout]
    uniforms = torch.cat([draw_uniforms(0, place, "heldout", 1, params.train.max_tokens) for place in range(4)])
    rollout = sample_batch(list(context.heldout), context, policy, uniforms)
    for i, row in enumerate(rows):
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i]]
        said = rollout.completions[i, : row["tokens"]]
        ids, text = torch.cat([prompt, said])[None], row["text_tokens"]
        assert row["completion"] == context.tokenizer.decode(said, skip_special_tokens=True)
        assert row["text_bytes"] == len(row["completion"].encode())
        with torch.no_grad():
            table, own = (m(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (reference, policy))
        ref, logprobs = (x.gather(1, said[:, None]).squeeze(1) for x in (table, own))
        entropy = -(table.exp() * table).sum(1)
        assert text == row["tokens"] - (said[-1] in context.eos)
        truth = {"kl": (logprobs - ref).sum(), "ref_logprob": ref.sum(), "text_ref_logprob": ref[:text].sum(),
                 "text_ref_entropy": entropy[:text].sum()}  # fmt: skip
        assert {name: row[name] for name in truth} == pytest.approx(
            {name: value.item() for name, value in truth.items()}, rel=1e-3, abs=1e-4
        )
    assert sum(row["kl"] for row in rows) > 0.1


def test_a_curve_without_prompts_is_one_line(here: Project) -> None:
    (here.root / "data/prompts/heldout.jsonl").unlink()
    here.edit(evaluate__every=1)
    with pytest.raises(UserError, match=r"^data/prompts/heldout\.jsonl is missing; run `dvc repro`"):
        train.main()


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


@pytest.mark.parametrize("patience", [1, 2, 3, 4])
def test_the_best_step_is_always_among_the_kept(patience: int) -> None:
    """Whenever a collapse is confirmed: `patience` steps after its onset, a number that is not finite at once."""
    thresholds = replace(THRESHOLDS, patience=patience)
    for seed in range(200):
        draw, steps = random.Random(seed), 8
        onsets = {"hacking": draw.randrange(2 * steps), "numeric": draw.randrange(2 * steps)}
        seen, rows, kept = {"hacking": patience, "numeric": 1}, [], set()
        for done in range(steps + 1):
            rows += measured(**{f"at{done}": [draw.random(), 0.0]})
            found = [f for kind, at in onsets.items() if at + seen[kind] <= done for f in collapse(kind, at)]
            candidates = candidate_steps(rows, found, done, thresholds)
            assert candidates <= kept | {done}
            kept = candidates
            assert best_step(rows, found) in kept | {0}
    # of the states too: one known to be healthy, and as many newer ones as a collapse may yet leave
    assert THRESHOLDS.patience <= checkpoints.KEEP_LAST


def at_a_step(here: Project, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run without a model, whose weights are its step, and what it measures a dict."""
    params = SimpleNamespace(train=load_params().train.model_copy(update={"steps": 12, "checkpoint_every": 5}),
                             evaluate=SimpleNamespace(every=2))  # fmt: skip
    context, values = SimpleNamespace(params=params, processes=DistContext()), {}
    monkeypatch.setattr(train, "measure", lambda _, step: measured(**{f"at{step}": [values[step], 0.0]}))
    monkeypatch.setattr(train, "trained_weights", lambda step, *_: {"step": torch.tensor(step)})
    monkeypatch.setattr(train, "optimizer_state", lambda *_: {})
    monkeypatch.setattr(train, "state_bytes", lambda *_: 0)
    monkeypatch.setattr(train, "findings", lambda *_: [])
    monkeypatch.setattr(train, "load_weights", lambda *_: None)
    monkeypatch.setattr("pipeline.rl.heldout.findings", lambda *_: [])
    monkeypatch.setattr(train, "null_statistics", lambda *_: {})

    def run(measures: dict[int, float], until: int = 12) -> TrainState:
        values.update(measures)
        state = checkpoints.load(folder)
        run = TrainState(**state["run"]) if state else TrainState()
        with BackgroundWriter() as writer:
            while True:
                candidate = train.measure_heldout(run, context, [])
                due = bool(run.step) and (run.step % 5 == 0 or run.step == 12)
                if candidate or due:
                    train.save_checkpoint(folder, run, run.step, None, context, [], writer, candidate, due)
                if run.step == until:
                    return run
                run.rows.append({"step": float(run.step)})
                run.timings.append({"seconds": 0.0})

    folder = here.root / "states"
    folder.mkdir()
    return folder, context, run


def test_what_is_measured_anew_may_differ(here: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after step 8, with a state after 5: the first life's better step 6 is none of the second's, which needs
    step 4. The same where the newest state is damaged."""
    folder, _, run = at_a_step(here, monkeypatch)
    run({0: 0.0, 2: 1.0, 4: 3.0, 6: 3.1, 8: 2.0}, until=8)
    finished = run({6: 2.9, 8: 2.0, 10: 2.5, 12: 2.0})
    assert best_step(finished.heldout, []) == 4
    assert checkpoints.read(checkpoints.candidate(folder, 4)) == {"policy": {"step": 4}}

    checkpoints.delete_checkpoints(folder)
    run({0: 0.0, 2: 1.0, 4: 3.0, 6: 3.1, 8: 3.2, 10: 3.3}, until=11)
    (folder / "state-00000010.pt").write_bytes(b"damaged")
    finished = run({6: 2.9, 8: 2.0, 10: 2.5})
    assert best_step(finished.heldout, []) == 4
    assert checkpoints.read(checkpoints.candidate(folder, 4)) == {"policy": {"step": 4}}
    assert not checkpoints.candidate(folder, 10).exists()


def test_a_lost_candidate_is_made_again_from_the_state_before(here: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, context, run = at_a_step(here, monkeypatch)
    run({0: 0.0, 2: 1.0, 4: 3.0, 6: 2.0, 8: 2.0, 10: 2.0, 12: 4.0})
    checkpoints.candidate(folder, 12).unlink()
    with pytest.raises(UserError, match="is damaged; the same command trains again from step 10"):
        train.restore(None, context, folder, checkpoints.candidate(folder, 12), "the best policy")
    assert checkpoints.saved_steps(folder) == [10]
    assert best_step(run({}).heldout, []) == 12
    assert train.restore(None, context, folder, checkpoints.candidate(folder, 12), "the best policy")
    checkpoints.candidate(folder, 4).unlink(missing_ok=True)  # both states have its row
    with pytest.raises(UserError, match="is damaged; the same command trains again from step 0"):
        train.restore(None, context, folder, checkpoints.candidate(folder, 4), "the best policy")
    assert not list(folder.glob("*.pt"))


def test_the_report_is_of_the_other_half() -> None:
    report = best_report(CURVE, 4, seed=0)
    assert report["chosen_on"] == {"prompts": 1, "mean": 2.0}
    assert report["reported_on"] == {"prompts": 1, "difference": {"mean": -9.0, "low": None, "high": None}}
    four = best_report(measured(at0=[5.0, 0.0, 5.0, 2.0], at3=[9.0, 1.0, 9.0, 5.0]), 3, seed=0)
    # of two differences, 1 and 3, resamples have means of 1, 2, 3 with odds 1 : 2 : 1
    assert four["reported_on"]["difference"] == {"mean": 2.0, "low": 1.0, "high": 3.0}
    assert math.isclose(four["chosen_on"]["mean"], 9.0)


# --- the curve and over-optimisation


def heldout_rows(kl: list[float], bits: list[float] | None = None, prompts: int = 4) -> list[dict[str, Any]]:
    """At steps 0, 10, ...: completions of 4 tokens and as many bytes, at `bits` a byte."""
    return [
        {"step": 10 * at, "prompt": f"p{b}", "completion": "text", "reward": 0.0, "kl": distance, "tokens": 4,
         "text_tokens": 4, "text_bytes": 4, "ref_logprob": -4 * cost * math.log(2),
         "text_ref_logprob": -4 * cost * math.log(2), "text_ref_entropy": 4 * math.log(2)}
        for at, (distance, cost) in enumerate(zip(kl, bits or [1.0] * len(kl), strict=True)) for b in range(prompts)
    ]  # fmt: skip


def draws(prompts: int) -> torch.Tensor:
    """Every resample of so many prompts, by enumeration."""
    return torch.cartesian_prod(*[torch.arange(prompts)] * prompts).view(-1, prompts)


def draws_of_one(prompts: int) -> torch.Tensor:
    return torch.arange(prompts)[None]


TRAINED = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 2, 2]], dtype=torch.float64)
PEAKED = torch.tensor([[0, 0, 0, 0], [4, 2, 4, 4], [1, 1, 1, 1]], dtype=torch.float64)  # rises, then falls


def test_the_curve_by_hand() -> None:
    rows = curve_rows(heldout_rows([0.0, 4.0, 9.0], [1.0, 1.0, 3.0]), {"a": TRAINED, "b": PEAKED}, "a", draws)
    assert [(row["step"], row["reward"]) for row in rows] == [
        (step, name) for step in (0, 10, 20) for name in ("a", "b", LIKELIHOOD)
    ]
    assert [row["sqrt_kl"] for row in rows[::3]] == [0.0, 2.0, 3.0]
    middle, last = rows[4], rows[7]
    # of 4 ** 4 resamples of (4, 2, 4, 4) 1 has a mean of 2.0, 12 of 2.5, 54 of 3.0: the quantiles are 2.5 and 4
    assert (middle["mean"], middle["low"], middle["high"]) == (3.5, 2.5, 4.0)
    assert middle["gain"] == {"mean": 3.5, "low": 2.5, "high": 4.0}
    # chosen by the prompts at places 0 and 2, reported by those at 1 and 3: 1 - 2 and 1 - 4
    # whose four resamples have means of -3, -2, -2, -1, with 2.5% of the way between the first and the last two
    assert last["best_step"] == 10
    assert last["since_best"] == pytest.approx({"mean": -2.0, "low": -3 + 0.075, "high": -1 - 0.075})
    assert last["trained_since_best"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert math.isclose(rows[8]["mean"], -3 * math.log(2))
    assert math.isclose(rows[8]["text"]["ref_bits_per_byte"], 3.0)
    assert math.isclose(rows[8]["text"]["ref_typicality"], -2 * math.log(2))
    assert curve_rows([], {}, "a", draws) == []


def test_the_curve_and_data_best_choose_the_same_step() -> None:
    """Of the same rewards in another order, which add up otherwise in floating point, the earlier step; none where a
    number is not finite."""
    draw = random.Random(0)
    for _ in range(100):
        half = [draw.choice([-0.1, -0.2, -0.3, 0.1, 0.7, 1 / 3]) for _ in range(5)]
        steps = [[value for x in draw.sample(half, 5) for value in (x, draw.random())] for _ in range(3)]
        table = torch.tensor(steps, dtype=torch.float64)
        rows = [row | {"reward": value} for row, value in zip(heldout_rows([0.0, 1.0, 4.0], prompts=10),
                                                              table.flatten().tolist(), strict=True)]  # fmt: skip
        assert record_steps(rows) == [0]
        assert {row["best_step"] for row in curve_rows(rows, {"a": table}, "a", draws_of_one)[::2]} == {0}
    for place, best in {0: 10, 10: 20, 20: 10}.items():  # the row with the number
        table = torch.tensor([[0.0], [1.0], [0.5]], dtype=torch.float64).expand(3, 10)
        rows = [row | {"reward": value} | ({"kl": None} if at == place else {}) for at, (row, value) in enumerate(zip(
            heldout_rows([0.0, 1.0, 4.0], prompts=10), table.flatten().tolist(), strict=True))]  # fmt: skip
        chosen = [
            best_step(rows, []),
            curve_rows(rows, {"a": table}, "a", draws_of_one)[0]["best_step"],
        ]
        assert chosen == [best, best]


def test_a_mean_over_tokens_counts_tokens() -> None:
    """Of a completion of one token at -1 nat and one of three at -9 in all: -10 / 4, not the mean of -1 and -3."""
    rows = heldout_rows([0.0], prompts=2)
    rows[0] |= {"tokens": 1, "ref_logprob": -1.0}
    rows[1] |= {"tokens": 3, "ref_logprob": -9.0}
    assert curve_rows(rows, {"a": TRAINED[:1, :2]}, "a", draws)[1]["mean"] == -2.5


def test_a_spread_is_not_what_rounding_leaves() -> None:
    """Of 0.1 seven times floating point makes one; a sparse reward has the first that there is."""
    scores = {
        "constant": torch.full((3, 7), 0.1, dtype=torch.float64),
        "sparse": torch.tensor([[0.1] * 7, [0.1] * 6 + [1.1], [1.1] * 3 + [0.1] * 4], dtype=torch.float64),
    }
    assert scores["constant"][0].std() > 0
    rows = curve_rows(heldout_rows([0.0, 1.0, 4.0], [0.1] * 3, prompts=7), scores, "sparse", draws_of_one)
    spreads = {row["reward"]: row["spread"] for row in rows}
    assert spreads == {"constant": 0.0, "sparse": pytest.approx(math.sqrt(1 / 7)), LIKELIHOOD: 0.0}
    broken = [row | {"ref_logprob": None} for row in heldout_rows([0.0], prompts=7)]
    assert curve_rows(broken, {"a": TRAINED[:1, :1].expand(1, 7)}, "a", draws_of_one)[1]["spread"] == 0.0


def test_a_mean_beside_its_interval_is_drawn(tmp_path: Path) -> None:
    """Each prompt gains the same: an interval without width, which rounding puts beside the mean."""
    folder = made_up(tmp_path / "reports", steps=30)
    rows = curve_rows(heldout_rows([0.0, 4.0], prompts=2), {"embedding": TRAINED[:2, :2] + torch.tensor([0.0, 1.0])},
                      "embedding", draws)  # fmt: skip
    for row in rows:
        row["gain"] = {"mean": 1 / 3, "low": 1 / 3 + 1e-16, "high": 1 / 3 + 1e-16}
    write_jsonl(folder / "evaluate/curve.jsonl", rows)
    seal(folder)
    assert plot.draw(load(folder))["curve"]


def test_the_figure_and_the_page_show_the_curve(tmp_path: Path) -> None:
    """Each reward in units of its spread; one that has none is named; the step of data/best is ringed."""
    spread = torch.tensor([-1.0, 1.0, -1.0, 1.0])  # a standard deviation of sqrt(4 / 3)
    scores = {"embedding": 3 * TRAINED + spread, "other": PEAKED + spread, "flat": TRAINED}
    rows = curve_rows(heldout_rows([0.0, 4.0, 9.0]), scores, "embedding", draws)
    folder = made_up(tmp_path / "reports", steps=30)
    write_jsonl(folder / "evaluate/curve.jsonl", rows)
    best = {"step": 10, "weights": "data/best", "reported_on": {"prompts": 2, **interval(0.5, 1.5)}}
    edit(folder / "diagnosis.json", best=best, independent="other", over_optimisation="Told in a line.")
    seal(folder)
    data = load(folder)
    figure = plot.draw(data)["curve"]
    left, right = figure.axes
    drawn = {label.get_text(): line for label, line in zip(
        left.get_legend().get_texts(), left.get_legend().get_lines(), strict=False)}  # fmt: skip
    assert list(drawn) == ["embedding (trained)", "other (independent)"]
    lines = [line for line in left.lines if line.get_color() == style.BLUE and len(line.get_xdata()) == 3]
    assert [list(lines[0].get_xdata()), list(lines[0].get_ydata())] == [
        [0.0, 2.0, 3.0], pytest.approx([0.0, 3 / math.sqrt(4 / 3), 6 / math.sqrt(4 / 3)]),
    ]  # fmt: skip
    ring = [line for line in left.lines if line.get_fillstyle() == "none"]
    assert [list(line.get_xdata()) for line in ring] == [[2.0]]
    assert "no spread at any step: flat" in " ".join(text.get_text() for text in figure.texts)
    assert list(right.lines[0].get_ydata()) == pytest.approx([-math.log(2)] * 3)
    for narrow in (False, True):
        assert style.png(plot.draw(data, narrow)["curve"]).startswith(b"\x89PNG")
    words = words_of(page.render(data, *2 * [{"curve": b""}]))
    assert "after 10 updates: +1 (95% interval +0.5 to +1.5) over step 0 on the 2 prompts that did not choose" in words
    assert "Told in a line." in words
    for step, said in (
        (0, "no measured step before any collapse that training shows was better."),
        (10, "by the trained reward on held-out prompts before any collapse that training shows."),
    ):
        edit(folder / "diagnosis.json", best=best | {"step": step}, verdict="over-optimised")
        seal(folder)
        words = words_of(page.render(load(folder), *2 * [{"curve": b""}]))
        assert said in words
        assert ("the ring is the policy in data/best: no measured step was better than step 0." in words) == (not step)
    assert list(load_run(tmp_path).curve["step"]) == [row["step"] for row in rows]
    assert "evaluate.independent=other" in page.render(data, {}, {})


@pytest.mark.parametrize("file", ["train/heldout.jsonl", "train/calibration.csv", "evaluate/metrics.json"])
def test_a_verdict_is_of_its_curve_too(tmp_path: Path, file: str) -> None:
    """After an edit of evaluate.every the history has the same bytes, and the verdict is another run's all the same."""
    folder = made_up(tmp_path / "reports", steps=3)
    files, before = RunFiles(folder), (folder / "diagnosis.json").read_bytes()
    raise_if_mixed("train", "evaluate", "diagnose", files=files)
    (folder / file).write_bytes((folder / file).read_bytes() + b"\n")
    seal(folder)
    raise_if_mixed("train", "evaluate", "diagnose", files=files)
    (folder / "diagnosis.json").write_bytes(before)
    with pytest.raises(
        UserError, match=r"diagnosis\.json: of another run than .*`dvc repro -f -s diagnose && dvc repro`"
    ):
        raise_if_mixed("train", "evaluate", "diagnose", files=files)


def interval(low: float, high: float) -> dict[str, Any]:
    return {"difference": {"mean": (low + high) / 2, "low": low, "high": high}}


def judged(independent: str, evaluation: dict[str, Any], curve: list[dict[str, Any]] | None = None,
           broken: Finding | None = None, best: int | None = None) -> tuple[Finding | None, str]:  # fmt: skip
    return over_optimised(Heldout("a", independent, evaluation, curve or [], best), broken, SPREADS, 20)


# own text at 1 bit a byte, shuffled at 3: half of the way, with a typicality 15% of the way down, is broken
SPREADS = {name: Spread(mean, 0.1, 7, 8) for name, mean in {
    "ref_bits_per_byte": 1.0, "shuffled_bits_per_byte": 3.0, "ref_typicality": 0.0, "shuffled_typicality": -2.0,
}.items()}  # fmt: skip
RISES, FALLS, UNSURE = interval(0.5, 1.5), interval(-1.5, -0.5), interval(-0.5, 0.5)


@pytest.mark.parametrize(("trained", "other", "found"), [
    (RISES, FALLS, True), (RISES, UNSURE, False), (UNSURE, FALLS, False), (RISES, RISES, False), (FALLS, FALLS, False),
])  # fmt: skip
def test_one_reward_rises_and_an_independent_one_falls(
    trained: dict[str, Any], other: dict[str, Any], found: bool
) -> None:
    finding, told = judged("b", {"a": trained, "b": other})
    assert bool(finding) == found
    if finding:
        assert (finding.kind, finding.onset) == ("over-optimised", 19)
        assert "a has risen (+1, 95% interval +0.5 to +1.5) and b" in told
    else:
        assert told.startswith("Not over-optimised by the independent reward b")


def test_the_curve_tells_since_when() -> None:
    """Above the reference still, and past its best: the final evaluation alone does not see it."""
    rows = curve_rows(heldout_rows([0.0, 4.0, 9.0]), {"a": TRAINED, "b": PEAKED}, "a", draws)
    above = {"a": RISES, "b": RISES}
    finding, told = judged("b", above, rows, best=20)
    assert finding
    assert finding.onset == 10
    assert "from step 10 on, where the latter was best" in told
    assert told.endswith("data/best is the policy after 20 updates, later than that: the trained reward chose it.")
    assert judged("b", above, rows, best=10)[1].endswith("the policy after 10 updates, no later than that.")
    below = {"a": RISES, "b": FALLS}  # best at the last step, which no row of a history has
    finding, told = judged("b", below, curve_rows(heldout_rows([0.0, 4.0, 9.0]), {"a": TRAINED, "b": TRAINED}, "a",
                                                  draws), best=20)  # fmt: skip
    assert finding
    assert finding.onset == 19
    assert told.endswith("was best at step 20. data/best is the policy after 20 updates, no later than that.")
    falling = curve_rows(heldout_rows([0.0, 4.0, 9.0]), {"a": PEAKED, "b": PEAKED}, "a", draws)
    assert judged("b", above, falling)[0] is None  # both fall: what is trained no longer rises
    risen = curve_rows(heldout_rows([0.0, 4.0, 9.0]), {"a": TRAINED, "b": TRAINED}, "a", draws)
    assert judged("b", above, risen)[0] is None


def test_the_verdict_of_a_run_that_is_healthy_but_for_it() -> None:
    params = load_params(ROOT / "params.yaml")
    params = params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"independent": "length"})})
    text = {side: {"empty_share": 0.0} for side in ("checkpoint", "policy")}
    evaluation = {"text": text, LIKELIHOOD: {"checkpoint": -3.0, "policy": -3.0}, "embedding": RISES, "length": FALLS}
    rows = made_up_history(20, collapsed=False).to_dict("records")
    calibration = [{"batch": float(i), "reward_se": 0.1} for i in range(8)]
    content = diagnose.diagnose(params, rows, calibration, [], chosen_params(params), evaluation)
    assert (content["verdict"], content["independent"]) == ("over-optimised", "length")
    assert content["headline"] == content["over_optimisation"]
    assert content["cure"]["changes"]["recipes.stable.kl_target"] == 2.0  # a third of what was
    content = diagnose.diagnose(params, rows, calibration, [], chosen_params(params), evaluation | {"length": UNSURE})
    assert content["verdict"] == "healthy"
    json.dumps(content, allow_nan=False)


@pytest.mark.parametrize(("independent", "bits", "kinds"), [
    ("length", 1.0, ["over-optimised", "heldout"]), ("reference", 9.0, ["over-optimised", "heldout"]),
    ("reference", 1.0, ["heldout"]),
])  # fmt: skip
def test_texts_that_fell_apart_are_said_beside_over_optimisation(
    independent: str, bits: float, kinds: list[str]
) -> None:
    """Nearly all of them empty, which neither another reward nor the likelihood tells."""
    params = load_params(ROOT / "params.yaml")
    params = params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"independent": independent})})
    text = {"checkpoint": {"empty_share": 0.0, "ref_bits_per_byte": 1.0, "ref_typicality": 0.0},
            "policy": {"empty_share": 0.95, "ref_bits_per_byte": bits, "ref_typicality": 0.0}}  # fmt: skip
    evaluation = {"text": text, LIKELIHOOD: {"checkpoint": -3.0, "policy": -3.0}, "embedding": RISES, "length": FALLS}
    rows = made_up_history(20, collapsed=False).to_dict("records")
    costs = {"ref_bits_per_byte": 1.0, "shuffled_bits_per_byte": 3.0, "ref_typicality": 0.0, "shuffled_typicality": -2}
    calibration = [{"batch": float(i), "reward_se": 0.1} | costs for i in range(8)]
    told = chosen_params(params)
    # a history whose own texts the reference finds likely
    rows = [row | {"ref_bits_per_byte": 1.0, "ref_typicality": 0.0} for row in rows]
    content = diagnose.diagnose(params, rows, calibration, [], told, evaluation)
    assert [finding["kind"] for finding in content["findings"]] == kinds
    assert content["verdict"] == kinds[0]
    assert "95% are empty" in content["headline"]
    metrics = [[shown["metric"] for shown in finding["evidence"]] for finding in content["findings"]]
    assert metrics[-1] == ["empty_share"]


def test_noise_alone_hardly_ever_falls_from_its_best_step() -> None:
    """Seven measurements, of nothing but noise. One in 40 by the interval; the same prompts to choose by and to tell
    would find a fall in one run of eight."""
    noise, falls, runs, rows = torch.Generator().manual_seed(0), 0, 200, heldout_rows([0.0] * 7, prompts=40)
    draws = torch.randint(40, (200, 40), generator=noise), torch.randint(20, (200, 20), generator=noise)
    for _ in range(runs):
        scores = {"a": torch.randn(7, 40, generator=noise, dtype=torch.float64)}
        last = curve_rows(rows, scores, "a", lambda prompts: draws[prompts == 20])[-2]
        falls += last["since_best"]["high"] < 0
    assert falls / runs < 0.06


def test_without_an_independent_measure_it_cannot_be_told() -> None:
    finding, told = judged("none", {"a": RISES, "b": FALLS})
    assert finding is None
    assert told == "Over-optimisation cannot be told without an independent reward: evaluate.independent is none."


def test_by_the_likelihood_only_broken_text_counts() -> None:
    """Of the curve, the last stretch of broken text: at 1.9 bits a byte it is less likely, and not broken."""

    def sides(bits: float) -> dict[str, Any]:
        return {"ref_bits_per_byte": bits, "ref_typicality": 1.0 - bits}

    def broken(bits: float) -> Finding | None:
        text = {"checkpoint": sides(1.0), "policy": sides(bits)}
        return heldout_finding(text, {"checkpoint": -1.0, "policy": -1.0}, SPREADS, 20)

    assert judged("reference", {"a": RISES}, broken=broken(1.9))[0] is None
    assert judged("reference", {"a": UNSURE}, broken=broken(2.1))[0] is None
    assert over_optimised(Heldout("a", "reference", {"a": RISES}, [], None), broken(2.1), SPREADS, 20, True)[0] is None
    finding, told = judged("reference", {"a": RISES}, broken=broken(2.1))
    assert finding
    assert finding.onset == 19
    assert "2.1 bits a byte by the reference model (its own 1.0)" in told
    curve = curve_rows(heldout_rows([0.0, 1.0, 2.0, 3.0], [1.0, 2.5, 1.9, 2.5]), {"a": torch.zeros(4, 4).double()}, "a",
                       draws)  # fmt: skip
    for best, where in ((10, "10 updates, no later than that."), (20, "20 updates, the one that shows it: the trai")):
        finding, told = judged("reference", {"a": RISES}, curve[:6], broken=broken(2.1), best=best)
        assert finding
        assert finding.onset == 19  # not from the broken stretch that ended
        assert f"None of the measured steps shows it yet. data/best is the policy after {where}" in told
    for best, where in ((20, "20 updates, no later than that."), (30, "30 updates, later than that: the trained")):
        finding, told = over_optimised(Heldout("a", "reference", {"a": RISES}, curve, best), broken(2.1), SPREADS, 31)
        assert finding
        assert finding.onset == 30
        assert f"all show it from step 30 on. data/best is the policy after {where}" in told


@pytest.mark.parametrize(("changes", "said"), [
    ({"evaluate__independent": "wrods"}, "there is no reward 'wrods'; should be one of reference, none, embedding"),
    ({"evaluate__independent": "length"}, "'length' is the trained reward"),
    ({"rewards__none": {"kind": "length", "target": 3}}, "rewards: 'none' is taken"),
    ({"evaluate__every": 2, "evaluate__prompts": 50}, "curve_prompts 100 exceeds prompts 50"),
])  # fmt: skip
def test_what_cannot_be_is_refused(project: Project, changes: dict[str, Any], said: str) -> None:
    project.edit(reward="length", **changes)
    with pytest.raises(UserError, match=said):
        load_params(project.root / "params.yaml")
