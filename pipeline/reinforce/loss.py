"""The loss. N = B * G completions of at most T tokens.

    loss = - (1 / N) sum_i A_i sum_t log pi(y_it | x_i, y_i,<t)          (aggregation: sequence_sum)

whose gradient is REINFORCE's (Williams 1992) when A_i is a reward minus a baseline that does not depend on y_i.
"""

import torch
from torch import Tensor


def token_weights(mask: Tensor, aggregation: str) -> Tensor:
    """How much each token's log-probability counts, [N, T], computed once for the whole batch of an optimizer step.

    sequence_sum   1 / N                      the policy gradient
    sequence_mean  1 / (N * length_i)         short completions weigh more (biased; GRPO)
    token_mean     1 / sum_i length_i         in each batch the direction of sequence_sum, N / sum_i length_i as long
                                              (DAPO, arXiv 2503.14476)
    mask [N, T]: True = the token counts. float64, so that the normalisers are exact.
    """
    ones = mask.double()
    if aggregation == "sequence_sum":
        return ones / len(mask)
    if aggregation == "sequence_mean":
        return ones / ones.sum(1, keepdim=True).clamp(min=1) / len(mask)
    return ones / ones.sum().clamp(min=1)


def policy_loss(logprobs: Tensor, advantages: Tensor, weights: Tensor) -> Tensor:
    """- sum_it w_it A_i log pi_it. A sum: the losses of micro-batches add up to the loss of the batch.

    logprobs [n, T] with gradient, advantages [n], weights [n, T] of any n rows of the batch.
    """
    # where, not only times zero: what stands in padding must not matter even if it is not finite
    counted = torch.where(weights > 0, logprobs, 0.0)
    return -((weights * advantages.detach()[:, None]).to(counted.dtype) * counted).sum()


def kl_loss_k2(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, batch: int) -> Tensor:
    """(1 / batch) sum_i (sum_t log pi_it - log ref_it)^2 / 2: k2 of the *summed* log-ratio.

    On-policy its gradient is that of KL(pi || ref) of whole completions; squaring token by token would drop the terms
    through which a token changes the later ones (Tang & Munos, arXiv 2506.09477). logprobs [n, T] with gradient, ref_logprobs and
    mask [n, T], batch = N.
    """
    log_ratio = torch.where(mask, logprobs - ref_logprobs.detach(), 0.0).sum(1)
    return 0.5 * log_ratio.square().sum() / batch
