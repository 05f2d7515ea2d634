"""Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943): many short runs, then longer ones of the better.

Pure functions: from a recipe and a seed to the values that are tried, from results to the runs that come next. The
verdict prunes, the held-out gain judges.
"""

import math
import sys
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from pipeline.config.schema import Recipe
from pipeline.errors import UserError
from pipeline.runs.results import Interval

LR_FACTOR, KL_FACTOR = 10, 8  # a range reaches from the recipe's value divided by this to its product with it
MOST_RUNGS = 3  # the shortest runs have a quarter of the steps: shorter ones tell little about the whole
HIGHEST_LR = 1000.0  # the bound in the schema


class Range(NamedTuple):
    present: float
    low: float
    high: float


class Outcome(NamedTuple):
    """The outcome of one run of a trial."""

    verdict: str  # `healthy`, or the kind of collapse
    onset: int | None  # the first step of the collapse
    gain: Interval  # held-out reward, trained policy minus reference


Outcomes = Mapping[tuple[int, int], Outcome]  # by (trial, steps)


# --- what is tried


def search_space(recipe: Recipe) -> tuple[dict[str, Range], str]:
    """The range of each key that is searched, and a note on why the KL strength is not, if it is not."""
    lr = Range(recipe.lr, *ends(recipe.lr, LR_FACTOR))
    space = {"lr": lr._replace(high=min(lr.high, HIGHEST_LR))}
    if recipe.kl == "none":
        return space, "the recipe has no KL term (kl: none): only lr is searched"
    if recipe.kl_coef == 0:
        return space, "kl_coef is 0, which no factor changes: only lr is searched"
    return space | {"kl_coef": Range(recipe.kl_coef, *ends(recipe.kl_coef, KL_FACTOR))}, ""


def ends(present: float, factor: float) -> tuple[float, float]:
    """The lowest and the highest two-digit value within a factor. Rounding keeps a value between them there."""
    least, most = present / factor, present * factor
    if not (least >= sys.float_info.min and most <= sys.float_info.max / 10):
        raise UserError(f"{present:g} times and divided by {factor:g} leaves the numbers that can be computed with")
    low, high = rounded(least), rounded(most)
    step = 10.0 ** (math.floor(math.log10(low)) - 1)
    low = rounded(low + step) if low < present / factor * (1 - 1e-9) else low
    step = 10.0 ** (math.floor(math.log10(high)) - 1)
    high = rounded(high - step) if high > present * factor * (1 + 1e-9) else high
    return low, high


def rounded(value: float) -> float:
    """Round to two significant digits, so that the printed table shows the values that ran."""
    return float(f"{value:.1e}")


def trial_values(space: dict[str, Range], count: int, seed: int) -> list[dict[str, float]]:
    """Values of each trial, all of them different. The first are the recipe's present ones, the others a scrambled
    Sobol sequence over the logarithms.

    Raises UserError where Optuna is missing.
    """
    try:
        import optuna
    except ImportError as error:
        if error.name != "optuna":
            raise
        raise UserError("optuna is not installed: pip install -e '.[pipeline]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # since 3.0; its numbers are scipy's
        sampler = optuna.samplers.QMCSampler(qmc_type="sobol", scramble=True, seed=seed)
    study = optuna.create_study(sampler=sampler)  # in memory
    drawn: dict[str, Any] = {
        name: optuna.distributions.FloatDistribution(
            min(each.low, each.present), max(each.high, each.present), log=True
        )
        for name, each in space.items()
    }
    present = {name: each.present for name, each in space.items()}
    study.enqueue_trial(present)
    study.ask(drawn)
    found = [present]
    while len(found) < count:
        values = {name: rounded(value) for name, value in study.ask(drawn).params.items()}
        if values not in found:
            found.append(values)
    return found


# --- which runs are next


def rungs(steps: int, eta: int, least: int, trials: int) -> list[int]:
    """The number of steps of each rung; the last rung has the full length.

    Each rung has eta times the steps of the one below and a share 1 / eta of its trials: none has fewer than `least`
    steps, and two trials at least are compared at full length.
    """
    found = [steps]
    while len(found) < MOST_RUNGS and steps // eta ** len(found) >= least and trials >= 2 * eta ** len(found):
        found.insert(0, steps // eta ** len(found))
    return found


def places(trials: int, rung_count: int, eta: int) -> list[int]:
    """How many trials run at each rung."""
    return [math.ceil(trials / eta**rung) for rung in range(rung_count)]


def next_runs(trials: int, steps_of: list[int], eta: int, outcomes: Outcomes) -> list[tuple[int, int]]:
    """The next runs, all of one rung, as (trial, steps); empty when the search has ended.

    The best trials that are healthy so far go up a rung. If no trial is healthy at full length, the next best have
    their turn, those of the highest rung first: a trial that gains most in a few steps may be one that breaks later.
    """
    ready, left = list(range(trials)), []  # those that may run at this rung, the best first
    for steps, room in zip(steps_of, places(trials, len(steps_of), eta), strict=True):
        waiting = [(trial, steps) for trial in ready if (trial, steps) not in outcomes]
        free = room - (len(ready) - len(waiting))
        if free > 0 and waiting:
            return waiting[:free]
        left.append(waiting[:room])
        ready = [trial for trial in best_first(steps, outcomes) if trial in ready]
    return [] if ready else next((batch for batch in reversed(left) if batch), [])


def best_first(steps: int, outcomes: Outcomes) -> list[int]:
    """The trials that are healthy after these steps, by their gain; of equal ones, the earlier trial comes first."""
    gains = {
        trial: outcome.gain["mean"]
        for (trial, length), outcome in outcomes.items()
        if length == steps and outcome.verdict == "healthy" and outcome.gain["mean"] is not None
    }
    return sorted(gains, key=lambda trial: (-gains[trial], trial))


def winner(steps_of: list[int], outcomes: Outcomes) -> int | None:
    """The best trial at full length; None where none is healthy there."""
    return next(iter(best_first(steps_of[-1], outcomes)), None)


def ranking(steps_of: list[int], outcomes: Outcomes) -> list[int]:
    """All trials that ran: those that are healthy after more steps first, and among these the better ones first."""
    ranked = [trial for steps in reversed(steps_of) for trial in best_first(steps, outcomes)]
    return list(dict.fromkeys([*ranked, *sorted(trial for trial, _ in outcomes)]))
