"""The verdict: Student's t against its published quantiles, the false-alarm rate against simulation, each kind against
made-up histories."""

import json
import math
import random
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pipeline.config.load import validate_params
from pipeline.config.schema import Params
from pipeline.diagnosis import verdict
from pipeline.diagnosis.calibration import (
    Limit,
    Spread,
    null_statistics,
)
from pipeline.diagnosis.cures import cure, root_causes
from pipeline.diagnosis.thresholds import THRESHOLDS
from pipeline.diagnosis.verdict import (
    ORDER,
    TITLES,
    Evidence,
    Finding,
    Kind,
    confirmed_healthy_steps,
    findings,
    limits_of_run,
)
from pipeline.errors import UserError
from pipeline.rl.metrics import CALIBRATION_COLUMNS, HISTORY_COLUMNS
from pipeline.runs import checkpoints
from pipeline.runs.provenance import chosen_params
from pipeline.stages import diagnose
from tests.models import PARAMS
from tests.project import Project

STEPS, PROMPTS = 20, 16
NORMAL = {  # of the reference: mean and spread of a batch
    "reward_mean": (-6.5, 0.06), "entropy": (3.7, 0.05), "ref_logprob": (-3.6, 0.08), "empty_share": (0.03, 0.02),
    "distinct_completions": (0.97, 0.02), "repeated_3grams": (0.02, 0.01), "reward_std_within": (0.45, 0.03),
    "ref_bits_per_byte": (1.4, 0.05), "ref_typicality": (0.0, 0.05), "shuffled_bits_per_byte": (3.2, 0.1),
    "shuffled_typicality": (-3.5, 0.1),
}  # fmt: skip
REST = {
    "logprob_gap": 1e-5,
    "update_kl": 1e-3,
    "reward_se": 0.06,
    "completion_tokens": 12.0,
}  # the other columns are zero


def batch(draw: random.Random) -> dict[str, float]:
    row = dict.fromkeys((*HISTORY_COLUMNS, *CALIBRATION_COLUMNS), 0.0)
    return row | REST | {name: draw.gauss(*normal) for name, normal in NORMAL.items()}


def history(**changes: Any) -> list[dict[str, float]]:
    """A run that does not learn, with some columns changed: lists of a value per step, None = as it was."""
    draw = random.Random(1)
    rows = [batch(draw) | {"step": float(step)} for step in range(STEPS)]
    for name, values in changes.items():
        for step, value in enumerate(values):
            if value is not None:
                rows[step][name] = value
    return rows


def since(onset: int, value: float, end: int = STEPS) -> list[float | None]:
    return [value if onset <= step < end else None for step in range(STEPS)]


@pytest.fixture(scope="module")
def calibration() -> list[dict[str, float]]:
    draw = random.Random(2)
    return [batch(draw) for _ in range(8)]


def without_signal(calibration: list[dict[str, float]]) -> list[dict[str, float]]:
    return [row | {"zero_spread_share": 1.0} for row in calibration]


@pytest.fixture(scope="module")
def spreads(calibration: list[dict[str, float]]) -> dict[str, Spread]:
    return null_statistics(calibration, PROMPTS)


# --- calibration


@given(st.floats(1e-9, 0.4), st.integers(2, 100))
def test_the_margin_of_one_degree_of_freedom_is_cauchy_s(tail: float, batches: int) -> None:
    margin = Spread(mean=0.0, std=2.0, dof=1, batches=batches).margin(tail)
    assert margin == pytest.approx(2 / math.tan(math.pi * tail) * math.sqrt(1 + 1 / batches), rel=1e-9)


# upper quantiles of Student's t: Abramowitz & Stegun 1964, table 26.10
@pytest.mark.parametrize(("dof", "tail", "quantile"), [(2, 0.025, 4.303), (8, 0.005, 3.355), (120, 0.05, 1.658)])
def test_the_quantile_is_the_published_one(dof: int, tail: float, quantile: float) -> None:
    spread = Spread(mean=0.0, std=1.0, dof=dof, batches=10**9)
    assert spread.margin(tail) == pytest.approx(quantile, abs=5e-4)


def test_a_further_batch_stays_within_the_margin_as_often_as_it_says() -> None:
    draw, outside, trials, tail = random.Random(0), 0, 20_000, 0.05
    for _ in range(trials):
        values = [draw.gauss(3, 2) for _ in range(6)]
        rows = [dict.fromkeys(CALIBRATION_COLUMNS, math.nan) | {"entropy": value} for value in values]
        spread = null_statistics(rows, PROMPTS)["entropy"]
        outside += draw.gauss(3, 2) > spread.mean + spread.margin(tail)
    assert stats.binomtest(outside, trials, tail).pvalue > 1e-3


def test_the_reward_s_spread_comes_from_the_prompts(calibration: list[dict[str, float]]) -> None:
    spread = null_statistics(calibration, PROMPTS)["reward_mean"]
    assert spread.std == pytest.approx(REST["reward_se"])
    assert spread.dof == len(calibration) * (PROMPTS - 1)
    assert spread.mean == pytest.approx(sum(row["reward_mean"] for row in calibration) / len(calibration))


def test_undefined_metrics_have_no_spread() -> None:
    rows = [dict.fromkeys(CALIBRATION_COLUMNS, math.nan) for _ in range(8)]
    assert null_statistics(rows, 1) == {}
    assert findings(history(), {}, STEPS) == []


def test_false_alarms_are_as_rare_as_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without effect sizes and with one step enough, at a rate that can be counted: at most a fifth of the runs without
    learning may pass any limit. At least a tenth do: Bonferroni's inequality gives little away."""
    monkeypatch.setattr(verdict, "FALSE_ALARMS", 0.2)
    only_chance = replace(
        THRESHOLDS, patience=1, empty=0, repeated=0, distinct=1, entropy=1, unlikely=0, broken=0, costly=0, atypical=0,
        reward=1e-9, certain=9,
    )  # fmt: skip
    draw, runs, alarms = random.Random(3), 1000, 0
    for _ in range(runs):
        spreads = null_statistics([batch(draw) for _ in range(8)], PROMPTS)
        alarms += bool(findings([batch(draw) for _ in range(STEPS)], spreads, STEPS, only_chance))
    assert stats.binomtest(alarms, runs, 0.2, alternative="greater").pvalue > 1e-3
    assert alarms > 0.1 * runs


def test_rewards_too_large_to_square_are_no_error() -> None:
    draw = random.Random(0)
    rows = [batch(draw) | {"reward_mean": draw.gauss(0, 1e200), "reward_se": 1e200} for _ in range(8)]
    assert null_statistics(rows, PROMPTS)["reward_mean"].std == math.inf
    content = diagnose.diagnose(PARAMS, history(nonfinite=since(0, 1.0)), rows, [], chosen_params(PARAMS))
    assert content["verdict"] == "numeric"
    json.dumps(content, allow_nan=False)


# --- verdict

# what a run shows, and the findings: kind and onset. First each kind by itself.
RUNS: dict[str, tuple[dict[str, Any], list[tuple[str, int]]]] = {
    "misaligned": ({"logprob_gap": since(0, 16.0)}, [("misaligned", 0)]),
    "numeric": ({"nonfinite": since(7, 1.0)}, [("numeric", 7)]),
    "starved": ({"zero_spread_share": since(0, 1.0)}, [("starved", 0)]),
    "empty": ({"empty_share": since(2, 0.7)}, [("empty", 2)]),
    "repetition": ({"repeated_3grams": since(4, 0.8)}, [("repetition", 4)]),
    "gibberish": ({"ref_logprob": since(5, -9.0)}, [("gibberish", 5)]),
    # the limits: 2.9 bits a byte; 2.3 together with -0.5 nats a token
    "gibberish of short, likely tokens": ({"ref_bits_per_byte": since(5, 3.0)}, [("gibberish", 5)]),
    "gibberish by two measures": (
        {"ref_bits_per_byte": since(5, 2.5), "ref_typicality": since(5, -0.7)}, [("gibberish", 5)]),
    "a reward won by gibberish of short tokens": (
        {"ref_bits_per_byte": since(5, 2.5), "ref_typicality": since(5, -0.7), "reward_mean": since(4, -3.0)},
        [("hacking", 5), ("gibberish", 5)]),
    "costly text that the reference expects": ({"ref_bits_per_byte": since(5, 2.6)}, []),  # names and numbers
    "surprising text that is not costly": ({"ref_typicality": since(5, -1.2)}, []),
    "mode": ({"distinct_completions": since(6, 0.2)}, [("mode", 6)]),
    "step-size": ({"reward_mean": since(3, -7.4)}, [("step-size", 3)]),
    "hacking": (
        {"repeated_3grams": since(4, 0.8), "reward_mean": since(4, -5.0)}, [("hacking", 4), ("repetition", 4)]),
    "no learning": ({}, []),
    "a certain policy": ({"entropy": since(4, 0.3)}, [("mode", 4)]),
    "silence is no mode collapse": (
        {"empty_share": since(4, 0.9), "distinct_completions": since(4, 0.1), "entropy": since(4, 0.1)},
        [("empty", 4)]),
    "a rising reward alone": ({"reward_mean": since(2, -3.0)}, []),
    "one batch that strays": ({"empty_share": since(5, 0.9, 6)}, []),
    "two batches that stray": ({"empty_share": since(5, 0.9, 7)}, [("empty", 5)]),
    "a truncated sampler": ({"logprob_gap": since(0, 6.4), "truncation_gap": since(0, 6.4)}, []),
    "as large a gap without truncation": ({"logprob_gap": since(0, 6.4)}, [("misaligned", 0)]),
    "a gap that appears later": ({"logprob_gap": since(3, 20.0)}, []),
    "a collapse at once, with signal before": (
        {"zero_spread_share": since(1, 1.0), "empty_share": since(1, 1.0)}, [("empty", 1)]),
    "undefined values": ({"repeated_3grams": since(2, math.nan), "entropy": since(2, math.nan)}, []),
    "a large update alone": ({"update_kl": since(1, 5.0)}, []),
    "several, by onset": (
        {"logprob_gap": since(0, 9.0), "empty_share": since(6, 0.9), "reward_mean": since(9, -8.0)},
        [("misaligned", 0), ("empty", 6), ("step-size", 9)]),
}  # fmt: skip


@pytest.mark.parametrize("case", RUNS)
def test_a_run_is_found_to_be_what_it_is(case: str, calibration: list[dict[str, float]]) -> None:
    """The evidence holds at the onset and at the step that is shown, and not before the onset."""
    changes, expected = RUNS[case]
    before = without_signal(calibration) if case == "starved" else calibration
    rows = history(**changes)
    found = findings(rows, null_statistics(before, PROMPTS), STEPS)
    assert [(finding.kind, finding.onset) for finding in found] == expected
    for finding in found:
        limits = [shown.limit for shown in finding.evidence]
        assert limits
        assert all(limit.passed(rows[step]) for limit in limits for step in (finding.onset, finding.shown_at))
        assert finding.onset == 0 or not all(limit.passed(rows[finding.onset - 1]) for limit in limits)
        assert all(shown.value == rows[shown.step][shown.limit.metric] for shown in finding.evidence)
    content = diagnose.diagnose(changed(), rows, before, [], chosen_params(changed()))
    assert content["verdict"] == (expected[0][0] if expected else "healthy")
    assert content["headline"].endswith(".")
    assert "nan" not in content["headline"]


@pytest.mark.parametrize(("changes", "kinds"), [
    (RUNS["several, by onset"][0], ["misaligned", "empty"]),
    ({"empty_share": since(2, 0.9), "nonfinite": since(7, 1.0)}, ["numeric", "empty"]),
])  # fmt: skip
def test_causes_are_treated_first(changes: dict[str, Any], kinds: list[str], spreads: dict[str, Spread]) -> None:
    assert [f.kind for f in root_causes(findings(history(**changes), spreads, STEPS))] == kinds


@settings(max_examples=20, deadline=None)  # each writes twenty files
@given(st.data())
def test_what_is_kept_on_the_way_is_the_state_before_the_collapse(data: st.DataObject) -> None:
    """Whatever a run shows on its way, and at whichever steps a signal has it save: in the end it has the newest
    regular state from before the onset. Rewards without a spread are no collapse as long as that may end."""
    draw = random.Random(2)
    spreads = null_statistics(without_signal([batch(draw) for _ in range(8)]), PROMPTS)
    empty = data.draw(st.lists(st.sampled_from([0.03, 0.8]), min_size=STEPS, max_size=STEPS))
    first = data.draw(st.integers(0, STEPS))
    rows = history(empty_share=empty, zero_spread_share=[1.0 if step < first else 0.0 for step in range(STEPS)])
    every, signals = data.draw(st.integers(1, 6)), data.draw(st.sets(st.integers(1, STEPS)))
    with tempfile.TemporaryDirectory() as folder:
        for done in range(1, STEPS + 1):
            if done % every == 0 or done == STEPS or done in signals:
                checkpoints.save(
                    Path(folder), done, {}, confirmed_healthy_steps(findings(rows[:done], spreads, STEPS), done), every
                )
        found = findings(rows, spreads, STEPS)
        onset = found[0].onset if found else STEPS
        kept = checkpoints.last_before(Path(folder), onset, every)
    truth = max((done for done in range(every, onset, every)), default=None)
    assert (kept and int(kept.stem.partition("-")[2])) == truth


def test_what_comes_again_is_shown_where_it_was_last_seen(spreads: dict[str, Spread]) -> None:
    values = [0.6 if step in (3, 4) else 1.0 if 8 <= step <= 15 else None for step in range(STEPS)]
    (finding,) = findings(history(empty_share=values), spreads, STEPS)
    assert (finding.onset, finding.shown_at) == (3, 15)
    assert finding.evidence[0].value == 1.0


def test_the_evidence_is_what_holds_where_it_is_shown(spreads: dict[str, Spread]) -> None:
    """Mode collapse by few texts first, by certainty later."""
    (finding,) = findings(history(distinct_completions=since(4, 0.2, 8), entropy=since(7, 0.2)), spreads, STEPS)
    assert finding.onset == 4
    assert finding.passes("entropy")
    assert not finding.passes("distinct_completions")


def test_the_earlier_finding_comes_first_and_of_two_at_once_the_cause(spreads: dict[str, Spread]) -> None:
    for onset, kinds in ((9, ["mode", "numeric"]), (4, ["numeric", "mode"])):
        rows = history(distinct_completions=since(4, 0.2), nonfinite=since(onset, 1.0))
        assert [finding.kind for finding in findings(rows, spreads, STEPS)] == kinds


def test_a_collapse_is_confirmed_as_soon_as_its_second_step_is_in(spreads: dict[str, Spread]) -> None:
    rows = history(empty_share=since(2, 0.9))
    assert findings(rows[:3], spreads, STEPS) == []
    assert [f.onset for f in findings(rows[:4], spreads, STEPS)] == [2]


def test_signal_that_comes_later_is_not_starved(calibration: list[dict[str, float]]) -> None:
    spreads = null_statistics(without_signal(calibration), PROMPTS)
    rows = history(zero_spread_share=since(0, 1.0, 10))
    assert findings(rows[: THRESHOLDS.no_signal_steps - 1], spreads, STEPS) == []
    assert findings(rows[: THRESHOLDS.no_signal_steps], spreads, STEPS)[0].kind == "starved"
    assert findings(rows, spreads, STEPS) == []


def test_rewards_without_any_spread_neither_rise_nor_fall() -> None:
    draw = random.Random(0)
    same = {"reward_mean": 0.0, "reward_se": 0.0, "reward_std_within": 0.0, "zero_spread_share": 1.0}
    spreads = null_statistics([batch(draw) | same for _ in range(8)], PROMPTS)
    rows = [batch(draw) | same for _ in range(STEPS)]
    assert [f.kind for f in findings(rows, spreads, STEPS)] == ["starved"]


def test_a_noisy_reference_moves_the_limits() -> None:
    """Where batches differ that much without learning, more is asked for; of a share at most THRESHOLDS.certain."""
    draw = random.Random(0)
    rows = [batch(draw) | {"empty_share": draw.choice([0.0, 0.4]), "ref_logprob": draw.gauss(-3, 1)} for _ in range(8)]
    limits = limits_of_run(null_statistics(rows, PROMPTS), STEPS, THRESHOLDS)
    assert limits["empty"].threshold == THRESHOLDS.certain
    assert limits["unlikely"].threshold < -3 - 2 * THRESHOLDS.unlikely


# --- cures


def changed(**selectors: Any) -> Params:
    tree = PARAMS.model_dump(exclude_none=True)
    recipe = selectors.pop("recipe", "notebook")
    tree["recipe"] = recipe
    tree["recipes"][recipe] |= selectors
    return validate_params(tree)


def found(kind: Kind, onset: int = 3, metric: str = "reward_mean") -> Finding:
    return Finding(kind, onset, onset, (Evidence(Limit(metric, "above", 0.0), onset, 1.0),))


@pytest.mark.parametrize("kind", ORDER)
@pytest.mark.parametrize("recipe", ["notebook", "stable"])
def test_each_cure_changes_something_and_gives_valid_parameters(
    kind: Kind, recipe: str, spreads: dict[str, Spread]
) -> None:
    params = changed(recipe=recipe)
    remedy = cure(found(kind), params, spreads)
    assert remedy.reason
    assert remedy.source
    if kind == "misaligned" and recipe == "stable":
        assert remedy.changes == {}
        return
    tree = params.model_dump(exclude_none=True)
    for key, value in remedy.changes.items():
        *tables, name = key.split(".")
        table = tree
        for part in tables:
            table = table[part]
        assert table[name] != value
        table[name] = value
    assert validate_params(tree) != params


NOTEBOOK_EMPTY = {
    "alignment": "correct", "padding": "masked", "special_tokens": "strip", "loss_distribution": "sampler",
    "kl": "reward_k1",
    "kl_coef": 0.083,  # a fifth of the spread of rewards, 0.42 here, to two digits
    "kl_target": 6.0,
    "lr": 1e-4, "max_grad_norm": 1.0, "warmup_steps": 10,
}  # fmt: skip


@pytest.mark.parametrize(("finding", "recipe", "settings", "changes"), [
    (found("misaligned"), "notebook", {}, {"alignment": "correct"}),
    (found("empty", metric="empty_share"), "notebook", {}, NOTEBOOK_EMPTY),
    (found("mode"), "stable", {}, {"lr": 3e-5, "warmup_steps": 10}),
    (found("mode"), "stable", {"kl_target": 0.0}, {"kl_target": 6.0, "lr": 3e-5, "warmup_steps": 10}),
    (found("mode"), "stable", {"lr": 1e-3}, {"lr": 1e-4, "warmup_steps": 10}),
    (found("mode"), "stable", {"top_k": 50}, {"loss_distribution": "sampler", "lr": 3e-5, "warmup_steps": 10}),
    (found("mode"), "stable", {"top_p": 0.9}, {"loss_distribution": "sampler", "lr": 3e-5, "warmup_steps": 10}),
    (found("mode"), "stable", {"top_p": 0.9, "kl": "loss_k3"}, {"lr": 3e-5, "warmup_steps": 10}),
    # a fifth of the spread of rewards, 0.42, to two digits; what is half of it or more stays
    (found("mode"), "stable", {"scale_rewards": "none", "kl_coef": 0.04},
     {"kl_coef": 0.083, "lr": 3e-5, "warmup_steps": 10}),
    (found("mode"), "stable", {"scale_rewards": "none", "kl_coef": 0.05}, {"lr": 3e-5, "warmup_steps": 10}),
    (found("mode"), "stable", {"kl_coef": 0.05}, {"kl_coef": 0.2, "lr": 3e-5, "warmup_steps": 10}),  # scaled
    (found("over-optimised"), "stable", {}, {"kl_target": 2.0}),
    (found("gibberish"), "stable", {"entropy_coef": 0.1}, {"entropy_coef": 0.0}),
    (found("step-size"), "stable", {"entropy_coef": 0.1}, {"entropy_coef": 0.0}),
    (found("numeric", 0), "stable", {}, {"advantage_norm": "batch"}),  # before any update
    (found("numeric", 1), "stable", {}, {"lr": 1e-5, "warmup_steps": 10}),
])  # fmt: skip
def test_cures_are_what_the_ablation_found(
    finding: Finding, recipe: str, settings: dict[str, Any], changes: dict[str, Any], spreads: dict[str, Spread]
) -> None:
    measured = cure(finding, changed(recipe=recipe, **settings), spreads).changes
    assert {key.removeprefix(f"recipes.{recipe}."): value for key, value in measured.items()} == changes


@pytest.mark.parametrize(
    ("mean", "limit", "expected"), [(1.2, "total", True), (9.0, "total", False), (1.2, "completion", False)]
)
def test_prompts_that_leave_one_token_are_not_counted(
    mean: float, limit: str, expected: bool, spreads: dict[str, Spread]
) -> None:
    params = changed(recipe="stable", length_limit=limit)
    measured = cure(found("mode"), params, spreads | {"completion_tokens": Spread(mean, 0.1, 7, 8)}).changes
    assert (measured.get("recipes.stable.length_limit") == "completion") is expected


def test_a_short_run_gets_a_short_warm_up(spreads: dict[str, Spread]) -> None:
    params = changed(recipe="notebook")
    short = params.model_copy(update={"train": params.train.model_copy(update={"steps": 20})})
    assert cure(found("step-size"), short, spreads).changes["recipes.notebook.warmup_steps"] == 4


# --- the stage


def sample(step: int, completion: str, tokens: int) -> dict[str, Any]:
    return {"step": step, "prompt": "Hi", "completion": completion, "reward": -1.0, "tokens": [5] * tokens}


def test_the_diagnosis_in_full(calibration: list[dict[str, float]]) -> None:
    params = changed(recipe="notebook")
    rows = history(logprob_gap=since(0, 9.0), empty_share=since(6, 0.9))
    samples = [sample(step, text, n) for step in range(STEPS) for text, n in [("well said", 6), ("", 1)]]
    content = diagnose.diagnose(params, rows, calibration, samples, chosen_params(params))
    assert (content["verdict"], content["onset"], content["steps"]) == ("misaligned", 0, STEPS)
    assert "9.0 nats" in content["headline"]
    assert "From step 6 on most completions are empty: 90% at step 19, " in content["headline"]
    empty = content["findings"][1]
    assert (empty["kind"], empty["title"], empty["onset"]) == ("empty", TITLES["empty"], 6)
    assert [shown["completion"] for shown in empty["completions"]] == ["", "well said"]
    (evidence,) = empty["evidence"]
    assert evidence["metric"] == "empty_share"
    assert (evidence["step"], evidence["value"], evidence["side"]) == (19, 0.9, "above")
    assert evidence["untouched"] == pytest.approx(sum(row["empty_share"] for row in calibration) / 8)
    assert content["cure"]["command"].startswith("dvc exp run -S model=pocket ")
    for key, value in content["cure"]["changes"].items():
        assert f"-S ++{key}={value}" in content["cure"]["command"]
    assert f"-S ++train.steps={params.train.steps} " in content["cure"]["command"]
    assert content["cure"]["command"].count("recipes.notebook.alignment=") == 1


def test_the_headline_ends_with_what_the_run_has_come_to(calibration: list[dict[str, float]]) -> None:
    rows = history(
        logprob_gap=since(0, 9.0), reward_mean=since(6, -5.0, 9), empty_share=since(6, 0.9), entropy=since(8, 0.1)
    )
    content = diagnose.diagnose(changed(), rows, calibration, [], chosen_params(changed()))
    assert [finding["kind"] for finding in content["findings"]] == ["misaligned", "hacking", "empty"]
    assert "From step 6 on most completions are empty: 90% at step 19, " in content["headline"]
    assert "higher" not in content["headline"]


@pytest.mark.parametrize(("steps", "headline"), [
    (STEPS, f"No sign of collapse in {STEPS} steps."),
    (1, "No sign of collapse, but too short to tell: one has to last 2 steps to count."),
    (0, "No sign of collapse, but too short to tell: one has to last 2 steps to count."),
])  # fmt: skip
def test_a_healthy_run_has_no_cure(steps: int, headline: str, calibration: list[dict[str, float]]) -> None:
    content = diagnose.diagnose(PARAMS, history()[:steps], calibration, [], chosen_params(PARAMS))
    assert content == {
        "verdict": "healthy", "onset": None, "headline": headline, "steps": steps, "findings": [], "notes": [],
        "cure": None,
        "independent": "reference",
        "over_optimisation": "Over-optimisation cannot be told by fewer than 30 held-out completions.",
    }  # fmt: skip


def test_a_short_run_without_a_difference_in_reward_says_so(calibration: list[dict[str, float]]) -> None:
    def said(steps: int, **changes: Any) -> tuple[str, str]:
        rows = history(**changes)[:steps]
        content = diagnose.diagnose(PARAMS, rows, without_signal(calibration), [], chosen_params(PARAMS))
        return content["verdict"], content["headline"]

    verdict, headline = said(5, zero_spread_share=since(0, 1.0))
    assert verdict == "healthy"
    assert headline.startswith("No sign of collapse in 5 steps. At every step all completions of a prompt had the same")
    assert "nothing to learn from" not in said(5, zero_spread_share=[0.5, *since(1, 1.0)[1:]])[1]
    assert "nothing to learn from" not in said(0)[1]
    verdict, headline = said(STEPS, zero_spread_share=since(0, 1.0))
    assert verdict == "starved"
    assert headline.count("nothing to learn from") == 1


def heldout(before: dict[str, float] | None = None, **after: float) -> dict[str, Any]:
    """metrics.json of a policy that writes as the reference does, but for `after`."""
    text = {"empty_share": 0.03, "repeated_3grams": 0.02, "distinct_completions": 0.97, "distinct_2": 0.8,
            "ref_bits_per_byte": 1.4, "ref_typicality": 0.0} | (before or {})  # fmt: skip
    likelihood = {"checkpoint": -3.6, "policy": after.pop("ref_logprob", -3.6)}
    return {"text": {"checkpoint": text, "policy": text | after}, "ref_logprob_per_token": likelihood}


@pytest.mark.parametrize(("after", "said"), [
    ({"empty_share": 0.6}, "60% are empty (3% of the reference's)"),
    ({"repeated_3grams": 0.7}, "70% of their 3-grams are repeats"),
    ({"distinct_completions": 0.4}, "40% are different"),
    ({"distinct_2": 0.31}, "of their pairs of neighbouring tokens 31% are different (the reference's 80%)"),
    ({"distinct_2": 0.33}, ""),
    ({"ref_logprob": -5.7}, "-5.7 nats a token by the reference model (its own -3.6)"),
    ({"ref_bits_per_byte": 2.5, "ref_typicality": -0.8}, "2.5 bits a byte by the reference model (its own 1.4)"),
    ({"empty_share": 0.4, "repeated_3grams": 0.4, "distinct_completions": 0.6, "ref_logprob": -5.5}, ""),
    ({"ref_bits_per_byte": 3.0}, "3.0 bits a byte by the reference model (its own 1.4)"),
    ({"ref_bits_per_byte": 2.6}, ""),
    ({"ref_typicality": -3.0}, ""),
    ({"empty_share": math.nan}, ""),
])  # fmt: skip
def test_healthy_is_not_said_of_broken_held_out_texts(
    after: dict[str, float], said: str, calibration: list[dict[str, float]]
) -> None:
    content = diagnose.diagnose(PARAMS, history(), calibration, [], chosen_params(PARAMS), heldout(**after))
    assert content["verdict"] == ("heldout" if said else "healthy")
    if said:
        assert said in content["headline"]
        assert "No step of training shows it" in content["headline"]
        assert content["onset"] == STEPS - 1
        assert content["cure"]
    json.dumps(content, allow_nan=False)


def test_a_reference_that_is_so_itself_is_no_loss(calibration: list[dict[str, float]]) -> None:
    same = heldout({"empty_share": 0.9}, empty_share=0.9)
    content = diagnose.diagnose(PARAMS, history(), calibration, [], chosen_params(PARAMS), same)
    assert content["verdict"] == "healthy"


def test_training_and_held_out_texts_that_disagree_are_shown(calibration: list[dict[str, float]]) -> None:
    rows, aside = history(empty_share=since(6, 0.9)), "The held-out completions of the trained policy do not show it."
    for evaluation, disagrees in ((heldout(), True), (heldout(empty_share=0.9), False), (None, False)):
        content = diagnose.diagnose(PARAMS, rows, calibration, [], chosen_params(PARAMS), evaluation)
        assert content["verdict"] == "empty"
        assert (aside in content["headline"]) == disagrees


def test_the_words_blame_an_update_from_before_the_fall(calibration: list[dict[str, float]]) -> None:
    sizes = [0.5 if step == 1 else 9.0 if step >= 3 else None for step in range(STEPS)]
    content = diagnose.diagnose(
        PARAMS, history(reward_mean=since(3, -7.4), update_kl=sizes), calibration, [], chosen_params(PARAMS)
    )
    assert "The update of step 1 moved it by 0.5 nats a token." in content["headline"]
    update = content["findings"][0]["evidence"][-1]
    assert (update["metric"], update["step"], update["value"]) == ("update_kl", 1, 0.5)


def test_a_missing_and_a_broken_file_are_named(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.root)
    with pytest.raises(UserError, match=r"reports/train/history\.csv: no such file; run `dvc repro train`"):
        diagnose.main()
    file = project.root / "reports/train/history.csv"
    file.parent.mkdir(parents=True)
    file.write_text("step,entropy\n0,3.5\n1,many\n")
    with pytest.raises(UserError, match=r"history\.csv: not what the stage writes: line 3: .*many"):
        diagnose.main()
    assert not (project.root / "reports/diagnosis.json").exists()
