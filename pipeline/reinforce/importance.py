"""Several updates on one batch: from the second on, the policy is no longer the one that sampled."""

import torch
from torch import Tensor


def importance_weights(
    logprobs: Tensor,  # [n, T] of the policy now
    old_logprobs: Tensor,  # [n, T] of the policy that sampled
    mask: Tensor,  # [n, T] True = in the loss
    advantages: Tensor,  # [n]
    level: str,
    clip_range: float,
) -> Tensor:
    """Factors [n, T], without gradient, on the tokens' terms of the loss.

    token     r_it = pi(y_it) / old(y_it), each token for itself (PPO; Schulman et al., arXiv 1707.06347)
    sequence  r_i = prod_t r_it, of whole completions: unbiased without clipping; its variance grows with the length

    With clip_range = c > 0 a factor is 0 where the ratio has left [1 - c, 1 + c] on the side to which the advantage
    pulls: sum_t w A factor grad log pi is then the gradient of PPO's min(r A, clip(r, 1 - c, 1 + c) A), since
    grad r = r grad log pi.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0).detach()
    if level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
    ratio = log_ratio.exp()
    if clip_range == 0:
        return ratio
    rising = advantages.detach()[:, None] > 0
    outside = torch.where(rising, ratio > 1 + clip_range, ratio < 1 - clip_range)
    return ratio.masked_fill(outside, 0.0)
