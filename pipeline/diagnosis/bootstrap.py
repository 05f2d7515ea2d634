"""Bootstrap intervals."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def mean(values: Sequence[float]) -> float:
    """Rounded once: the same in any order, so that steps with the same rewards are equal, and by any Python."""
    return math.fsum(values) / len(values)


def interval(values: Tensor, indices: Tensor, level: float = 0.95) -> dict[str, float | None]:
    """Mean and percentile interval of the mean (Efron & Tibshirani 1993, chapter 13).

    values [B], one a prompt: resampling prompts keeps the samples of a prompt together (clustered bootstrap).
    indices [resamples, B]: which prompts each resample holds; the same ones for paired quantities. One prompt tells
    nothing about others: its interval is None.
    """
    if len(values) == 1:
        return {"mean": values.item(), "low": None, "high": None}
    return {"mean": values.mean().item(), **percentiles(values[indices].mean(1), level)}


def interval_of(
    statistic: Callable[[Tensor], Tensor], prompts: Tensor, resamples: Tensor, level: float = 0.95
) -> dict[str, float | None]:
    """The same of any statistic of prompts, and None where it is not finite.

    statistic: indices of prompts [R, n] -> its value for each row [R]. prompts [n]: all of them. resamples [R, n].
    """
    of_all, values = statistic(prompts[None]).item(), statistic(resamples)
    if not math.isfinite(of_all):
        return {"mean": None, "low": None, "high": None}
    if len(prompts) == 1 or not values.isfinite().all():
        return {"mean": of_all, "low": None, "high": None}
    return {"mean": of_all, **percentiles(values, level)}


def percentiles(values: Tensor, level: float) -> dict[str, float | None]:
    """What the middle `level` of the values lies between."""
    tail = (1 - level) / 2
    low, high = torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=values.dtype)).tolist()
    return {"low": low, "high": high}
