"""The loss. N = B * G completions of at most T tokens.

    loss = - (1 / N) sum_i A_i sum_t log pi(y_it | x_i, y_i,<t)          (aggregation: sequence_sum)

whose gradient is REINFORCE's (Williams 1992) when A_i is a reward minus a baseline that does not depend on y_i.
Every function here is a sum over rows with normalisers of the whole batch: the losses of micro-batches, and those of
processes, add up to the loss of the batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossNormalizers:
    """Sizes of the whole batch of an optimizer step, over all micro-batches and processes."""

    samples: int  # N
    tokens: int  # sum_i length_i, tokens in the loss
    max_completion_tokens: int  # tokens that a completion may have: train.max_tokens


def token_weights(mask: Tensor, aggregation: str, batch: LossNormalizers) -> Tensor:
    """Weight of each token's log-probability in the loss, [n, T] for any n rows of the batch.

    sequence_sum     1 / N                      the policy gradient
    sequence_mean    1 / (N * length_i)         short completions weigh more (biased; GRPO)
    token_mean       1 / sum_i length_i         in each batch the gradient of sequence_sum, times N / sum_i length_i
                                                (DAPO, arXiv 2503.14476)
    constant_length  1 / (N * longest)          the policy gradient, times 1 / longest (Dr. GRPO, arXiv 2503.20783);
                                                longest = max_completion_tokens
    mask [n, T]: True = the token counts. float64, so that the normalisers are exact.
    """
    ones = mask.double()
    if aggregation == "sequence_sum":
        return ones / batch.samples
    if aggregation == "sequence_mean":
        return ones / ones.sum(1, keepdim=True).clamp(min=1) / batch.samples
    if aggregation == "constant_length":
        return ones / (batch.samples * batch.max_completion_tokens)
    return ones / max(batch.tokens, 1)


def policy_loss(logprobs: Tensor, advantages: Tensor, weights: Tensor) -> Tensor:
    """- sum_it w_it A_i log pi_it.

    logprobs [n, T] with gradient, advantages [n], weights [n, T] of any n rows of the batch.
    """
    # torch.where and not only a weight of zero: padding must not matter even if its values are not finite
    counted = torch.where(weights > 0, logprobs, 0.0)
    return -((weights * advantages.detach()[:, None]).to(counted.dtype) * counted).sum()


def entropy_bonus(entropy: Tensor, weights: Tensor) -> Tensor:
    """sum_it w_it H_it of the tokens' entropies [n, T], with gradient.

    Its gradient raises the entropy at the positions that were visited. It is not the gradient of the entropy of whole
    completions: like token-level KL, it ignores that a token's choice changes which positions are visited later.
    """
    counted = torch.where(weights > 0, entropy, 0.0)
    return (weights.to(counted.dtype) * counted).sum()


def kl_loss_k2(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, samples: int) -> Tensor:
    """(1 / N) sum_i (sum_t log pi_it - log ref_it)^2 / 2: k2 of the *summed* log-ratio.

    On-policy its gradient is that of KL(pi || ref) of whole completions; squaring token by token would drop the terms
    through which a token changes the later ones (Tang & Munos, arXiv 2506.09477). logprobs [n, T] with gradient,
    ref_logprobs and mask [n, T], samples = N.
    """
    log_ratio = torch.where(mask, logprobs - ref_logprobs.detach(), 0.0).sum(1)
    return 0.5 * log_ratio.square().sum() / samples


def kl_loss_k3(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, samples: int) -> Tensor:
    """(1 / N) sum_it exp(-d_it) - 1 + d_it, with d = log pi - log ref: k3 token by token.

    The KL term of GRPO (arXiv 2402.03300), except that GRPO takes the mean over each completion's tokens.

    Its *value* is unbiased for the sum of the tokens' KL(pi || ref). Its gradient is not that of KL(pi || ref), but
    near the reference it agrees to first order with that of the tokens' KL (arXiv 2510.01555). Arguments: `kl_loss_k2`.
    """
    log_ratio = torch.where(mask, logprobs - ref_logprobs.detach(), 0.0)
    return (torch.expm1(-log_ratio) + log_ratio).sum() / samples


KL_LOSSES = {"loss_k2": kl_loss_k2, "loss_k3": kl_loss_k3}
