"""The difference of two configurations' gains: intervals are scipy's, and hold the truth as often as they say."""

import math

import numpy as np
import pytest
from scipy import stats

from pipeline.runs.gain_differences import TOO_FEW, answer, difference

GAINS = {"0": 1.25, "1": -0.5, "2": 0.75, "7": 2.0}
OTHER = {"2": 0.5, "0": 0.25, "9": 4.0, "1": -1.5}  # another order, another seed


def of(values: np.ndarray, first: int = 0) -> dict[str, float]:
    return {str(first + place): float(value) for place, value in enumerate(values)}


# --- against scipy


@pytest.mark.parametrize("comparisons", [1, 2, 5])
def test_the_paired_interval_is_scipy_s(comparisons: int) -> None:
    found = difference(GAINS, OTHER)
    truth = stats.ttest_rel([1.25, -0.5, 0.75], [0.25, -1.5, 0.5])
    assert found.interval(comparisons) == pytest.approx(
        tuple(truth.confidence_interval(1 - 0.05 / comparisons)), rel=1e-12
    )
    assert (found.mean, found.dof, found.paired) == (0.75, truth.df, True)
    assert found.seeds == found.other_seeds == ("0", "1", "2")


@pytest.mark.parametrize("comparisons", [1, 2, 5])
@pytest.mark.parametrize(("count", "other_count"), [(2, 2), (3, 8), (6, 3)])
def test_the_unpaired_interval_is_welch_s_as_scipy_has_it(count: int, other_count: int, comparisons: int) -> None:
    random = np.random.default_rng(count)
    gains, other = random.normal(1, 0.3, count), random.normal(0, 2, other_count)
    found = difference(of(gains), of(other, first=count))
    truth = stats.ttest_ind(gains, other, equal_var=False)
    assert found.interval(comparisons) == pytest.approx(
        tuple(truth.confidence_interval(1 - 0.05 / comparisons)), rel=1e-12
    )
    assert found.dof == pytest.approx(truth.df, rel=1e-12)
    assert (len(found.seeds), len(found.other_seeds), found.paired) == (count, other_count, False)


def test_a_seed_that_alone_is_shared_is_left_out_where_the_others_suffice() -> None:
    """The two means are then of independent runs, as Welch's interval has it."""
    found = difference({"0": 9.0, "1": 1.0, "2": 2.0}, {"0": 7.0, "3": 0.5, "4": 0.0, "5": 1.0})
    truth = stats.ttest_ind([1.0, 2.0], [0.5, 0.0, 1.0], equal_var=False)
    assert found.interval() == pytest.approx(tuple(truth.confidence_interval(0.95)), rel=1e-12)
    assert (found.mean, found.seeds, found.other_seeds) == (1.0, ("1", "2"), ("3", "4", "5"))


def test_the_other_way_round_only_the_sign_changes() -> None:
    for gains, other in ((GAINS, OTHER), (of(np.array([1.0, 2.0, 4.0])), of(np.array([0.0, 0.5]), first=3))):
        low, high = difference(gains, other).interval()  # type: ignore[misc]
        assert difference(other, gains).interval() == pytest.approx((-high, -low), rel=1e-12)


# --- what has no interval, or no width


@pytest.mark.parametrize(
    ("gains", "other", "mean", "seeds"),
    [
        ({"0": 3.0}, {"0": 1.0}, 2.0, (("0",), ("0",))),
        ({"0": 3.0, "1": 9.0}, {"0": 1.0}, 2.0, (("0",), ("0",))),  # the pair: the rest is of other seeds
        ({"0": 3.0, "1": 9.0}, {"0": 1.0, "2": 5.0}, 2.0, (("0",), ("0",))),
        ({"0": 3.0, "1": 5.0}, {"2": 1.0}, 3.0, (("0", "1"), ("2",))),
        ({"0": 3.0}, {"2": 1.0, "3": 2.0, "4": 6.0}, 0.0, (("0",), ("2", "3", "4"))),
    ],
)
def test_too_few_seeds_have_a_difference_and_no_interval(
    gains: dict[str, float], other: dict[str, float], mean: float, seeds: tuple[tuple[str, ...], ...]
) -> None:
    found = difference(gains, other)
    assert (found.mean, (found.seeds, found.other_seeds)) == (mean, seeds)
    assert (found.error, found.dof, found.interval()) == (None, None, None)
    assert answer(found.interval()) == TOO_FEW


def test_seeds_that_all_say_the_same_have_an_interval_without_width() -> None:
    """Two collapsed policies with the same texts: every seed's gains are equal, and scipy's interval is nan."""
    assert difference(GAINS, GAINS).interval() == (0.0, 0.0)
    assert difference({"0": 1.5, "1": 2.5}, {"0": 1.0, "1": 2.0}).interval() == (0.5, 0.5)
    assert difference({"0": 1.0, "1": 1.0}, {"2": 0.5, "3": 0.5}).interval() == (0.5, 0.5)


def test_without_a_gain_there_is_no_difference() -> None:
    for gains, other in (({}, GAINS), (GAINS, {})):
        with pytest.raises(ValueError, match="no gain"):
            difference(gains, other)


@pytest.mark.parametrize(
    ("interval", "word"),
    [((0.1, 2.0), "higher"), ((-2.0, -0.1), "lower"), ((-0.1, 0.1), "cannot tell"), ((0.0, 0.1), "cannot tell"),
     ((-0.1, 0.0), "cannot tell"), ((0.0, 0.0), "cannot tell"), ((0.3, 0.3 + 1e-16), "cannot tell"),
     (None, "too few seeds: an interval needs two")],
)  # fmt: skip
def test_the_answer_is_what_the_interval_allows(interval: tuple[float, float] | None, word: str) -> None:
    assert answer(interval) == word


# --- how often it is right

RUNS = 2000  # of the coverage: its standard error is 0.005 at 0.95


def missed(interval: tuple[float, float] | None, truth: float) -> bool:
    assert interval is not None
    return not interval[0] <= truth <= interval[1]


def test_95_of_100_intervals_hold_the_true_difference() -> None:
    random, paired, unpaired = np.random.default_rng(0), 0, 0
    for _ in range(RUNS):
        luck = random.normal(0, 3, 3)  # of a seed, which both configurations share
        gains, other = luck + random.normal(1, 0.5, 3), luck + random.normal(0, 1, 3)
        paired += missed(difference(of(gains), of(other)).interval(), truth=1)
        gains, other = random.normal(1, 1, 4), random.normal(0, 2, 5)
        unpaired += missed(difference(of(gains), of(other, first=4)).interval(), truth=1)
    assert paired / RUNS == pytest.approx(0.05, abs=0.015)
    assert unpaired / RUNS == pytest.approx(0.05, abs=0.02), "Welch's degrees of freedom are approximate"


def test_several_intervals_hold_together_as_often_as_one() -> None:
    """Four configurations that are no better than the fifth: one sweep in twenty at most says that one is."""
    random, alone, together = np.random.default_rng(1), 0, 0
    for _ in range(RUNS):
        base, *others = random.normal(0, 1, (5, 3))
        found = [difference(of(other), of(base)) for other in others]
        alone += any(answer(each.interval()) != "cannot tell" for each in found)
        together += any(answer(each.interval(len(found))) != "cannot tell" for each in found)
    assert together / RUNS < 0.05 + 0.01
    assert alone / RUNS > 0.10, "why they are wider"


def test_shared_seeds_make_a_narrower_interval() -> None:
    luck = np.array([-4.0, 0.0, 5.0, 1.0])
    gains, other = luck + np.array([1.1, 0.9, 1.0, 1.2]), luck
    (low, high), (low_apart, high_apart) = (
        difference(of(gains), of(other, first)).interval() or (math.nan, math.nan) for first in (0, 4)
    )
    assert answer((low, high)) == "higher"
    assert answer((low_apart, high_apart)) == "cannot tell"
    assert high - low < (high_apart - low_apart) / 10
