"""Several updates on one batch: from the second on, the policy is no longer the one that sampled."""

import torch
from torch import Tensor


def importance_weights(
    logprobs: Tensor,  # [n, T] of the policy now
    old_logprobs: Tensor,  # [n, T] of the policy that sampled
    mask: Tensor,  # [n, T] True = a token of the completion; elsewhere token ratios are 1
    advantages: Tensor,  # [n]
    level: str,
    clip_range: float,
    clip_range_high: float = 0.0,  # 0 = clip_range
) -> tuple[Tensor, Tensor]:
    """Returns the factors [n, T] of the tokens' terms in the loss, without gradient, and where they are clipped to 0.

    token     r_it = pi(y_it) / old(y_it), each token for itself (PPO; Schulman et al., arXiv 1707.06347)
    sequence  r_i = prod_t r_it, of whole completions: unbiased without clipping; its variance grows with the length

    With clip_range = c > 0 and clip_range_high = h, a term is cut where its ratio has left [1 - c, 1 + h] on the side
    to which the advantage pulls. Over the terms that stay, sum_t w A ratio grad log pi is the gradient of PPO's
    min(r A, clip(r, 1 - c, 1 + h) A), since grad r = r grad log pi. PPO has h = c; with h > c, unlikely tokens can gain
    more in one batch (DAPO, arXiv 2503.14476).
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0).detach()
    if level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
    ratio, pull = log_ratio.exp(), advantages.detach()[:, None]
    if clip_range == 0:
        return ratio, torch.zeros_like(mask)
    high = clip_range_high or clip_range
    return ratio, ((pull > 0) & (ratio > 1 + high)) | ((pull < 0) & (ratio < 1 - clip_range))
