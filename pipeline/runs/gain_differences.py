"""By how much the held-out gains of two configurations differ: Student's t intervals over seeds. Pure functions."""

import math
import statistics
from collections.abc import Mapping
from typing import NamedTuple

ALPHA = 0.05  # the chance that at least one of the intervals made together misses its true difference
TOO_FEW = "too few seeds: an interval needs two"

Gains = Mapping[str, float]  # held-out reward, trained policy minus reference, by seed
Limits = tuple[float, float]


class Difference(NamedTuple):
    """A mean difference of gains, in units of the reward."""

    mean: float
    error: float | None  # standard error of the mean over seeds; None: too few seeds
    dof: float | None  # degrees of freedom of the error
    seeds: tuple[str, ...]  # seeds of the first configuration that the mean is over
    other_seeds: tuple[str, ...]  # seeds of the other; the same ones if paired
    paired: bool

    def interval(self, comparisons: int = 1) -> Limits | None:
        """mean ± t_{dof, 1 - ALPHA / (2 comparisons)} error, in units of the reward; None for too few seeds.

        Each of `comparisons` intervals misses with probability ALPHA / comparisons, so that with a probability of at
        least 1 - ALPHA none does, however they depend on each other (Bonferroni; Dunn 1961).
        """
        from scipy.special import stdtrit  # takes 0.4 s

        if self.error is None or self.dof is None:
            return None
        margin = -float(stdtrit(self.dof, ALPHA / (2 * comparisons))) * self.error
        return self.mean - margin, self.mean + margin


def difference(gains: Gains, other: Gains) -> Difference:
    """The first configuration's gain minus the other's. The seeds alone decide how it is computed, never their gains:

    two or more shared seeds: paired, over these alone. A seed's effect on both configurations cancels.
    else two seeds of each that are not shared: Welch's, over these alone, since the two means must be independent.
    else a mean without an interval, over the shared seed if there is one.

    Raises ValueError if one configuration has no gain.
    """
    if not (gains and other):
        raise ValueError("no gain of any seed")
    shared = [seed for seed in gains if seed in other]
    alone = {seed: gain for seed, gain in gains.items() if seed not in other}
    other_alone = {seed: gain for seed, gain in other.items() if seed not in gains}
    if len(shared) >= 2 or (shared and min(len(alone), len(other_alone)) < 2):
        return _paired({seed: gains[seed] - other[seed] for seed in shared})
    return _unpaired(alone, other_alone)


def _paired(differences: Gains) -> Difference:
    """mean_s d_s of n seeds, error std(d) / sqrt(n), n - 1 degrees of freedom; d_s: difference of a seed's gains."""
    values, seeds = list(differences.values()), tuple(differences)
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return Difference(mean, None, None, seeds, seeds, paired=True)
    return Difference(mean, statistics.stdev(values) / math.sqrt(count), count - 1, seeds, seeds, paired=True)


def _unpaired(gains: Gains, other: Gains) -> Difference:
    """mean(a) - mean(b), error sqrt(u + v) with u = var(a) / n and v = var(b) / m, and degrees of freedom
    (u + v)² / (u² / (n - 1) + v² / (m - 1))   (Welch 1947)."""
    a, b = list(gains.values()), list(other.values())
    mean, seeds = statistics.fmean(a) - statistics.fmean(b), (tuple(gains), tuple(other))
    if min(len(a), len(b)) < 2:
        return Difference(mean, None, None, *seeds, paired=False)
    u, v = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    share = u / (u + v) if u + v > 0 else 0.5
    dof = 1 / (share * share / (len(a) - 1) + (1 - share) * (1 - share) / (len(b) - 1))
    return Difference(mean, math.sqrt(u + v), dof, *seeds, paired=False)


def answer(interval: Limits | None) -> str:
    """In a word: higher or lower, if the interval has a width and leaves out 0."""
    if interval is None:
        return TOO_FEW
    low, high = interval
    if math.isclose(low, high, rel_tol=1e-9):  # if all seeds differ by the same amount, there is no spread to judge by
        return "cannot tell"
    return "higher" if low > 0 else "lower" if high < 0 else "cannot tell"
