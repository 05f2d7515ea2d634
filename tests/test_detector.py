"""The measure of the verdict as a detector: its rule of labels, and the page that holds its tables."""

from pathlib import Path
from typing import Any

import pytest
from scipy.stats import beta

from benchmarks import detector_tables
from benchmarks.detector import PLANS, params_of
from benchmarks.labels import LASTING, bad, labels

ROOT = Path(__file__).resolve().parents[1]
FIRST = {"rewards": [[-1.0, 1.0], [0.0, 2.0], [-2.0, 0.0], [1.0, 3.0]], "entropy": 3.5, "ref_logprob": -3.6, "empty": 0.02,
         "repeated": 0.02, "distinct": 0.98}  # fmt: skip


def evaluation(shift: float = 0.0, **changes: Any) -> dict[str, Any]:
    return {**FIRST, "rewards": [[reward + shift for reward in pair] for pair in FIRST["rewards"]], **changes}


def run(*evaluations: dict[str, Any], stopped: bool = False, alignment: str = "correct") -> dict[str, Any]:
    return {
        "held_out": [FIRST, *evaluations],
        "stopped": stopped,
        "alignment": alignment,
        "rows": [{}] * len(evaluations),
    }


WAYS = {
    "empty": {"empty": 0.6}, "repetition": {"repeated": 0.6}, "gibberish": {"ref_logprob": -5.7},
    "mode": {"distinct": 0.4}, "step-size": {"shift": -1.0},
}  # fmt: skip


@pytest.mark.parametrize("kind", WAYS)
def test_each_way_of_being_bad(kind: str) -> None:
    assert bad(evaluation(**WAYS[kind]), FIRST) == {kind}


def test_what_is_not_bad() -> None:
    near = evaluation(empty=0.4, repeated=0.4, ref_logprob=-5.5, distinct=0.5, entropy=0.8)
    assert bad(near, FIRST) == set()
    assert bad(evaluation(shift=5.0), FIRST) == set()  # a higher reward alone
    assert bad(evaluation(shift=-0.6), FIRST) == set()  # less than half the spread, sqrt(2), within a prompt
    assert bad(evaluation(shift=-0.8), FIRST) == {"step-size"}


def test_hacking_is_a_higher_reward_for_broken_text() -> None:
    assert bad(evaluation(shift=2.0, repeated=0.9), FIRST) == {"hacking", "repetition"}
    assert bad(evaluation(shift=2.0, distinct=0.1), FIRST) == {"mode"}


def test_certainty_is_mode_collapse_and_silence_is_not() -> None:
    assert bad(evaluation(entropy=0.5), FIRST) == {"mode"}
    assert bad(evaluation(entropy=0.5, distinct=0.1, empty=0.9), FIRST) == {"empty"}


def test_a_label_needs_evaluations_in_a_row() -> None:
    fine, broken = evaluation(), evaluation(empty=0.9)
    assert labels(run(*[fine] * 3, *[broken] * (LASTING - 1), fine)) == {}
    assert labels(run(*[fine] * 3, *[broken] * LASTING, fine)) == {"empty": 4}
    assert labels(run(*[fine] * 5)) == {}


def test_kinds_with_rules_of_their_own() -> None:
    fine = evaluation()
    assert labels(run(fine, alignment="shifted")) == {"misaligned": 0}
    assert labels(run(fine, fine, fine, stopped=True)) == {"numeric": 2}
    same = {**FIRST, "rewards": [[0.0, 0.0]] * 4}
    assert labels({**run(same, same), "held_out": [same, same, same]}) == {"starved": 0}


def test_seeds_to_choose_on_are_not_measured_on() -> None:
    assert all(not set(plan.choose) & set(plan.measure) for plan in PLANS)
    assert len({plan.name for plan in PLANS}) == len(PLANS)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_every_plan_has_valid_parameters(plan: Any) -> None:
    params = params_of(plan.changes, 7)
    assert params.seed == 7
    for key, value in plan.changes.items():
        if "." not in key and hasattr(params.selected_recipe, key):
            assert getattr(params.selected_recipe, key) == value


def test_the_interval_is_clopper_and_pearson_s() -> None:
    low, high = beta.ppf(0.025, 2, 59), beta.ppf(0.975, 3, 58)
    assert detector_tables.of(2, 60) == f"2 of 60 = 3.3% ({low:.1%} to {high:.1%})"


def test_the_page_holds_the_tables_of_the_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs/DETECTOR.md").read_text(encoding="utf-8").splitlines()
    detector_tables.tables()
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(lines) > 10
    assert [line for line in lines if line not in page] == []
