"""The terms of a sum: what each adds to the reward and to the learning signal. K terms, B prompts, G samples of each.

terms [K, B, G]: each term's scores, without its weight; NaN where it gives none. weights: by the term's name.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.file_io import finite_or_none
from pipeline.rl.advantages import normalized_terms


def contributions(terms: Tensor, weights: Mapping[str, float]) -> Tensor:
    """[K, B, G] w_k R_k, 0 where the term gives no score. Their sum over k is the reward."""
    factors = terms.new_tensor(list(weights.values()))[:, None, None]
    return torch.where(terms.isnan(), 0.0, factors * terms)


def signals(terms: Tensor, weights: Mapping[str, float], combine: str) -> Tensor:
    """[K, B, G] what each term adds to the learning signal: w_k R_k, or w_k z_k with `combine: normalized`."""
    return contributions(normalized_terms(terms) if combine == "normalized" else terms, weights)


def std_within(values: Tensor) -> float:
    """Root of the mean variance (ddof 1) of a prompt's values; values [B, G]. Exactly 0 if each prompt's are equal."""
    return shifted(values).var(1).mean().sqrt().item()


def term_rows(step: int, terms: Tensor, weights: Mapping[str, float], combine: str) -> list[dict[str, Any]]:
    """Rows of terms.jsonl. docs/METRICS.md has the formulas.

    share_k = mean_b cov(s_kb, s_b) / mean_b var(s_b), where s_b = sum_k s_kb is the signal of prompt b. The shares add
    up to 1. They are None where the signal has no spread.
    """
    added, signal = contributions(terms, weights), signals(terms, weights, combine)
    shares = shares_of_variance(signal).tolist()
    return [
        {
            "step": step, "term": name, "weight": weight, "scored_share": (~own.isnan()).double().mean().item(),
            "mean": finite_or_none(own.nanmean().item()), "mean_weighted": finite_or_none(mine.mean().item()),
            "std_within": finite_or_none(scored_std_within(own)),
            "std_within_weighted": finite_or_none(std_within(mine)), "share": finite_or_none(share),
        }
        for (name, weight), own, mine, share in zip(weights.items(), terms, added, shares, strict=True)
    ]  # fmt: skip


def shares_of_variance(parts: Tensor) -> Tensor:
    """[K] the share of each part [K, B, G] in the within-prompt variance of their sum; NaN if this variance is 0."""
    centred = shifted(parts)
    centred = centred - centred.mean(2, keepdim=True)
    covariances = (centred * centred.sum(0)).sum((1, 2))
    return covariances / covariances.sum()


def scored_std_within(values: Tensor) -> float:
    """`std_within` over the completions that a term scores, in prompts with at least two of them. values [B, G]."""
    groups = [group[~group.isnan()] for group in values]
    variances = [shifted(group).var() for group in groups if len(group) > 1]
    return torch.stack(variances).mean().sqrt().item() if variances else torch.nan


def shifted(values: Tensor) -> Tensor:
    """Subtracts each prompt's first value, so that the variance of equal values is exactly 0. values [..., G]."""
    return values - values[..., :1]
