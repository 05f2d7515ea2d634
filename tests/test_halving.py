"""The search of `reinforce tune` on made-up results: which values are tried, which runs are next, which trial wins."""

import math
import random
from collections.abc import Callable
from decimal import Decimal

import pytest

from pipeline.config.load import load_params
from pipeline.config.schema import Recipe
from pipeline.errors import UserError
from pipeline.runs import halving
from pipeline.runs.halving import Outcome, Range
from tests.project import ROOT

STABLE = load_params(ROOT / "params.yaml").recipes["stable"]
SPACE, _ = halving.search_space(STABLE)
RUNGS = [12, 25, 50]
Objective = Callable[[int, int], Outcome]


def healthy(gain: float | None) -> Outcome:
    return Outcome("healthy", None, {"mean": gain, "low": gain, "high": gain})


def collapsed(gain: float) -> Outcome:
    return Outcome("gibberish", 3, {"mean": gain, "low": gain, "high": gain})


def search(count: int, objective: Objective, rungs: list[int] = RUNGS, eta: int = 2) -> list[list[tuple[int, int]]]:
    """The batches of runs, (trial, steps) each, that a search comes to."""
    outcomes: dict[tuple[int, int], Outcome] = {}
    batches = []
    while batch := halving.next_runs(count, rungs, eta, outcomes):
        assert not outcomes.keys() & set(batch), "what has run is not run again"
        assert len({steps for _, steps in batch}) == 1
        outcomes |= {run: objective(*run) for run in batch}
        batches.append(batch)
    found.clear()
    found.update(outcomes)
    return batches


found: dict[tuple[int, int], Outcome] = {}  # of the last search


# --- the values


def two_digits(value: float) -> bool:
    return len(Decimal(repr(value)).normalize().as_tuple().digits) <= 2


def test_the_first_trial_is_the_recipe_as_it_stands() -> None:
    odd = STABLE.model_copy(update={"lr": 0.000123456, "kl_coef": 0.2718})
    space, _ = halving.search_space(odd)
    assert halving.trial_values(space, 8, seed=0)[0] == {"lr": 0.000123456, "kl_coef": 0.2718}


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_values_have_two_digits_and_lie_within_their_range(seed: int) -> None:
    odd = STABLE.model_copy(update={"lr": 0.000123456, "kl_coef": 0.2718})
    for recipe in (STABLE, odd):
        space, _ = halving.search_space(recipe)
        trials = halving.trial_values(space, 32, seed)
        assert len({tuple(each.items()) for each in trials}) == 32
        for values in trials[1:]:
            assert recipe.lr / 10 * (1 - 1e-12) <= values["lr"] <= recipe.lr * 10 * (1 + 1e-12)
            assert recipe.kl_coef / 8 * (1 - 1e-12) <= values["kl_coef"] <= recipe.kl_coef * 8 * (1 + 1e-12)
            assert all(map(two_digits, values.values()))


def test_values_spread_over_the_logarithm_of_their_range() -> None:
    trials = halving.trial_values(SPACE, 33, seed=0)[1:]
    for name, around in (("lr", 1e-4), ("kl_coef", 0.2)):
        assert sum(values[name] < around for values in trials) == pytest.approx(16, abs=2)


def test_the_seed_alone_decides() -> None:
    assert halving.trial_values(SPACE, 8, seed=3) == halving.trial_values(SPACE, 8, seed=3)
    assert halving.trial_values(SPACE, 8, seed=3)[1:] != halving.trial_values(SPACE, 8, seed=4)[1:]
    assert halving.trial_values(SPACE, 16, seed=3)[:8] == halving.trial_values(SPACE, 8, seed=3), "more only adds"


def test_no_values_come_twice() -> None:
    """0.0001 to 0.0002 has eleven values of two digits."""
    trials = halving.trial_values({"lr": Range(1e-4, 1e-4, 2e-4)}, 11, seed=0)
    assert len({values["lr"] for values in trials}) == 11


@pytest.mark.parametrize(
    ("changes", "names", "note"),
    [
        ({}, ["lr", "kl_coef"], ""),
        ({"kl": "loss_k3"}, ["lr", "kl_coef"], ""),
        ({"kl": "none"}, ["lr"], "no KL term"),
        ({"kl_coef": 0.0}, ["lr"], "kl_coef is 0"),
    ],
)
def test_what_is_searched_goes_by_the_recipe_s_kl_term(changes: dict[str, object], names: list[str], note: str) -> None:
    space, said = halving.search_space(Recipe.model_validate(STABLE.model_dump() | changes))
    assert list(space) == names
    assert note in said
    assert bool(note) == bool(said)


def test_a_range_never_leaves_what_the_schema_allows() -> None:
    space, _ = halving.search_space(STABLE.model_copy(update={"lr": 900.0}))
    assert space["lr"] == Range(900.0, 90.0, 1000.0)
    for changes in ({"lr": 5e-324}, {"kl_coef": 1e308}):
        with pytest.raises(UserError, match="leaves the numbers that can be computed with"):
            halving.search_space(STABLE.model_copy(update=changes))


# --- the rungs


@pytest.mark.parametrize(
    ("steps", "eta", "least", "trials", "expected"),
    [
        (50, 2, 6, 8, [12, 25, 50]),
        (50, 2, 6, 4, [25, 50]),  # two at full length: one alone would have nothing to be compared with
        (50, 2, 6, 64, [12, 25, 50]),
        (50, 3, 6, 18, [16, 50]),  # 50 // 9 is short
        (12, 2, 6, 8, [6, 12]),
        (5, 2, 6, 8, [5]),
        (90, 3, 6, 18, [10, 30, 90]),
        (50, 2, 6, 2, [50]),
    ],
)
def test_the_rungs(steps: int, eta: int, least: int, trials: int, expected: list[int]) -> None:
    assert halving.rungs(steps, eta, least, trials) == expected


# --- the search


def test_the_known_best_is_found_at_the_announced_cost() -> None:
    """Where longer runs keep the order of shorter ones."""
    gains = random.Random(0).sample(range(100), 8)
    batches = search(8, lambda trial, steps: healthy(gains[trial] * steps))
    assert [len(batch) for batch in batches] == [8, 4, 2] == halving.places(8, 3, 2)
    assert [batch[0][1] for batch in batches] == RUNGS
    best = halving.ranking(RUNGS, found)
    assert best[0] == max(range(8), key=gains.__getitem__)
    assert best[:4] == sorted(range(8), key=gains.__getitem__, reverse=True)[:4]
    assert halving.winner(RUNGS, found) == best[0]


def test_a_collapsed_trial_is_pruned_whatever_its_gain() -> None:
    """The places that collapsed trials leave go to the next best."""
    batches = search(8, lambda trial, steps: collapsed(100 + trial) if trial > 3 else healthy(trial))
    assert [sorted(trial for trial, _ in batch) for batch in batches] == [[*range(8)], [0, 1, 2, 3], [2, 3]]
    assert halving.winner(RUNGS, found) == 3


def test_one_that_collapses_late_gives_its_place_to_the_next_best() -> None:
    """What gains most in a few steps is what learns fastest, and may be what breaks: the next best get their turn."""

    def objective(trial: int, steps: int) -> Outcome:
        return collapsed(9 * trial) if trial >= 5 and steps == 50 else healthy(trial)

    batches = search(8, objective)
    assert [[trial for trial, _ in batch] for batch in batches[1:]] == [[7, 6, 5, 4], [7, 6], [5, 4]]
    assert halving.winner(RUNGS, found) == 4


def test_where_all_longer_runs_collapse_it_goes_back_to_shorter_ones() -> None:
    def objective(trial: int, steps: int) -> Outcome:
        return collapsed(9) if trial > 1 and steps > 12 else healthy(trial)

    batches = search(8, objective)
    assert batches[1:] == [
        [(7, 25), (6, 25), (5, 25), (4, 25)], [(3, 25), (2, 25), (1, 25), (0, 25)], [(1, 50), (0, 50)],
    ]  # fmt: skip
    assert halving.winner(RUNGS, found) == 1


def test_where_all_collapse_none_wins_and_the_search_ends() -> None:
    assert [len(batch) for batch in search(8, lambda trial, steps: collapsed(1))] == [8]
    assert halving.winner(RUNGS, found) is None
    search(8, lambda trial, steps: collapsed(1) if steps == 50 else healthy(1))
    assert halving.winner(RUNGS, found) is None
    assert {trial for trial, steps in found if steps == 50} == set(range(8)), "each had its turn"


def test_ties_go_to_the_earlier_trial() -> None:
    batches = search(8, lambda trial, steps: healthy(0.0))
    assert [[trial for trial, _ in batch] for batch in batches] == [[*range(8)], [0, 1, 2, 3], [0, 1]]
    assert halving.winner(RUNGS, found) == 0


def test_an_undefined_gain_is_no_better_than_a_collapse() -> None:
    search(4, lambda trial, steps: healthy(None if trial else -5.0), [50])
    assert halving.winner([50], found) == 0
    search(4, lambda trial, steps: healthy(None), [50])
    assert halving.winner([50], found) is None


def test_longer_runs_decide_over_shorter_ones() -> None:
    search(4, lambda trial, steps: healthy(trial if steps < 50 else -trial), [25, 50])
    assert halving.winner([25, 50], found) == 2
    assert halving.ranking([25, 50], found) == [2, 3, 1, 0]


def test_an_eta_of_three_and_odd_numbers() -> None:
    gains = {trial: math.sin(trial) for trial in range(10)}
    batches = search(10, lambda trial, steps: healthy(gains[trial]), [10, 30], eta=3)
    assert [len(batch) for batch in batches] == [10, 4]
    assert halving.winner([10, 30], found) == max(gains, key=gains.__getitem__)


def test_the_same_results_give_the_same_next_runs_in_any_order() -> None:
    search(8, lambda trial, steps: healthy(math.sin(trial)))
    turned = dict(reversed(found.items()))
    assert halving.ranking(RUNGS, turned) == halving.ranking(RUNGS, found)
    partly = {run: outcome for run, outcome in turned.items() if run[1] == 12}
    expected = sorted(range(8), key=math.sin, reverse=True)[:4]
    assert halving.next_runs(8, RUNGS, 2, partly) == [(trial, 25) for trial in expected]
