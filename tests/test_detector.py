"""The measure of the verdict as a detector: its rule of labels, and the page that holds its tables."""

from pathlib import Path
from typing import Any

import pytest
from scipy.stats import beta

from benchmarks import detector_tables, text_labels
from benchmarks.detector import PLANS, params_of
from benchmarks.labels import LASTING, bad, labels

ROOT = Path(__file__).resolve().parents[1]
FIRST = {
    "rewards": [[-1.0, 1.0], [0.0, 2.0], [-2.0, 0.0], [1.0, 3.0]], "entropy": 3.5, "ref_logprob": -3.6, "empty": 0.02,
    "repeated": 0.02, "distinct": 0.98,
}  # fmt: skip


def evaluation(shift: float = 0.0, **changes: Any) -> dict[str, Any]:
    return {**FIRST, "rewards": [[reward + shift for reward in pair] for pair in FIRST["rewards"]], **changes}


@pytest.mark.parametrize(("changes", "kinds"), [
    ({"empty": 0.6}, {"empty"}),
    ({"repeated": 0.6}, {"repetition"}),
    ({"ref_logprob": -5.7}, {"gibberish"}),
    ({"distinct": 0.4}, {"mode"}),
    ({"entropy": 0.5}, {"mode"}),  # certainty is mode collapse
    ({"entropy": 0.5, "distinct": 0.1, "empty": 0.9}, {"empty"}),  # silence is not
    ({"empty": 0.4, "repeated": 0.4, "ref_logprob": -5.5, "distinct": 0.5, "entropy": 0.8}, set()),
    ({"shift": -0.8}, {"step-size"}),
    ({"shift": -0.6}, set()),  # less than half the spread, sqrt(2), within a prompt
    ({"shift": 5.0}, set()),  # a higher reward alone
    ({"shift": 2.0, "repeated": 0.9}, {"hacking", "repetition"}),  # a higher reward for broken text
    ({"shift": 2.0, "distinct": 0.1}, {"mode"}),
])  # fmt: skip
def test_what_is_bad(changes: dict[str, float], kinds: set[str]) -> None:
    assert bad(evaluation(**changes), FIRST) == kinds


def labels_of(*evaluations: dict[str, Any], stopped: bool = False, alignment: str = "correct") -> dict[str, int]:
    rows: list[Any] = [{}] * (len(evaluations) - 1)
    return labels({"held_out": evaluations, "stopped": stopped, "alignment": alignment, "rows": rows})


def test_labels_of_runs() -> None:
    """Most kinds need several evaluations in a row; some have rules of their own."""
    fine, broken, same = evaluation(), evaluation(empty=0.9), {**FIRST, "rewards": [[0.0, 0.0]] * 4}
    assert labels_of(FIRST, *[fine] * 3, *[broken] * (LASTING - 1), fine) == {}
    assert labels_of(FIRST, *[fine] * 3, *[broken] * LASTING, fine) == {"empty": 4}
    assert labels_of(FIRST, *[fine] * 5) == {}
    assert labels_of(FIRST, fine, alignment="shifted") == {"misaligned": 0}
    assert labels_of(FIRST, fine, fine, fine, stopped=True) == {"numeric": 2}
    assert labels_of(same, same, same) == {"starved": 0}


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


def test_labels_of_texts() -> None:
    """The rule of docs/REAL_MODELS.md, on texts of five words."""
    own = ["the cat sat on mats", "a dog ran in parks"] * 2
    known = text_labels.word_pairs(["The cat sat on mats. A dog ran in parks."])
    assert text_labels.known_share(own, known) == 1
    assert text_labels.known_share(["the cat ran in mats"], known) == 2 / 4  # the cat, ran in
    assert text_labels.repeated_share(["no no no no no", "one two"]) == pytest.approx(1 / 3)  # 2 of 3, and 0

    assert text_labels.labels(own, own, known) == []
    assert text_labels.labels(["mats the in ran cat", *own[1:]], own, known) == []  # one of four has lost its order
    assert text_labels.labels(text_labels.shuffled(own), own, known) == ["salad"]
    assert text_labels.labels(["", " ", "", own[1]], own, known) == ["empty"]
    three = [f"{first} {second} {third}" for first, second, third in zip("abcd", "efgh", "ijkl", strict=True)]
    same = text_labels.word_pairs([three[0]])
    assert text_labels.labels([three[0]] * 4, three, same) == ["mode"]
    assert text_labels.labels(["no no no no no", *own[1:]], own, known | {("no", "no")}) == []
    assert text_labels.labels(["no no no no no no"] * 4, own, known | {("no", "no")}) == ["repetition"]
