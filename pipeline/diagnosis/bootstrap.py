"""Bootstrap intervals."""

import torch
from torch import Tensor


def interval(values: Tensor, indices: Tensor, level: float = 0.95) -> dict[str, float | None]:
    """Mean and percentile interval of the mean (Efron & Tibshirani 1993, chapter 13).

    values [B], one a prompt: resampling prompts keeps the samples of a prompt together (clustered bootstrap).
    indices [resamples, B]: which prompts each resample holds; the same ones for paired quantities. One prompt tells
    nothing about others: its interval is None.
    """
    if len(values) == 1:
        return {"mean": values.item(), "low": None, "high": None}
    means = values[indices].mean(1)
    tail = (1 - level) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=means.dtype)).tolist()
    return {"mean": values.mean().item(), "low": low, "high": high}
