"""Log-probabilities and entropies of logits, a few rows at a time: float32 tensors of the vocabulary's size stay in the
processor's cache.

M positions, V vocabulary, K tokens whose log-probabilities are asked for (several may be asked of one position).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS, ROWS_OF_A_GPU = 16, 1024  # 16 x 50,304 float32 are 3 MB; a GPU has no use for slices beyond saving memory


def row_slices(logits: Tensor) -> list[slice]:
    """Slices over the rows of logits [M, V], of the size that is fastest on the device."""
    step = ROWS if logits.device.type == "cpu" else ROWS_OF_A_GPU
    return [slice(start, start + step) for start in range(0, len(logits), step)]


def upcast(logits: Tensor) -> Tensor:
    """Half precision -> float32; float32 and float64 stay."""
    return logits if logits.dtype == torch.float64 else logits.float()


def log_probabilities(logits: Tensor, positions: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(log softmax(logits / temperature) of `tokens` [K] at `positions` [K], entropy [M] of softmax(logits)), in nats.

    logits [M, V], positions and tokens [K] int64 -> [K], [M], both float32, or float64 if the logits are. Gradients
    flow through both. The backward pass overwrites `logits` with their gradient, which saves a second tensor of this
    size, the largest there is.
    """
    return _LogProbabilities.apply(logits, positions, tokens, temperature)


class _LogProbabilities(torch.autograd.Function):
    """With p = softmax(l / T), q = softmax(l) and H = -sum_v q_v log q_v:

    d log p_y / d l_v = ([v = y] - p_v) / T,    d H / d l_v = - q_v (log q_v + H)
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, positions: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, ...]:
        normaliser, entropy, plain = [], [], []
        for rows in row_slices(logits):
            part = upcast(logits[rows])
            log_sum, mean = _log_sum(part)
            plain.append(log_sum)
            entropy.append(log_sum - mean)
            normaliser.append(log_sum if temperature == 1 else _log_sum(part / temperature)[0])
        scaled, entropies = torch.cat(normaliser), torch.cat(entropy)
        chosen = upcast(logits[positions, tokens]) / temperature
        ctx.save_for_backward(logits, positions, tokens, scaled, torch.cat(plain), entropies)
        ctx.temperature = temperature
        return chosen - scaled[positions], entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        logits, positions, tokens, scaled, plain, entropies = ctx.saved_tensors
        at_position = torch.zeros_like(scaled).index_add(0, positions, grad_logprobs)  # [M]
        with_entropy = bool(grad_entropy.any())
        for rows in row_slices(logits):
            part = upcast(logits[rows])
            warm = part if ctx.temperature == 1 else part / ctx.temperature
            pulls = (warm - scaled[rows, None]).exp_()
            pulls *= -at_position[rows, None] / ctx.temperature
            if with_entropy:
                log_q = part - plain[rows, None]
                pulls -= grad_entropy[rows, None] * log_q.exp() * (log_q + entropies[rows, None])
            logits[rows] = pulls
        logits.index_put_((positions, tokens), (grad_logprobs / ctx.temperature).to(logits.dtype), accumulate=True)
        return logits, None, None, None


def _log_sum(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(log sum_v exp l_v, sum_v softmax(l)_v l_v) of each row."""
    top = logits.amax(-1, keepdim=True)
    weights = (logits - top).exp_()
    total = weights.sum(-1)
    return total.log() + top.squeeze(-1), (weights.mul_(logits)).sum(-1) / total
