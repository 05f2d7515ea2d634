"""pass@k: how often at least one of k completions of a prompt is right."""

import math

import torch
from torch import Tensor


def pass_at_k(right: Tensor, samples: int, k: int) -> Tensor:
    """[B] of each prompt 1 - C(n - c, k) / C(n, k), for n samples of which c are right (Chen et al., arXiv 2107.03374).

    It is the share of the sets of k of the n samples that hold a right one: unbiased for the chance that k new samples
    do. right [B]: c, integers; samples: n; 1 <= k <= n.
    """
    missed = [math.comb(samples - c, k) / math.comb(samples, k) for c in range(samples + 1)]
    return 1 - torch.tensor(missed, dtype=torch.float64)[right]


def measured_k(samples: int) -> list[int]:
    """The powers of two up to the number of samples, and that number."""
    return sorted({1 << power for power in range(samples.bit_length())} | {samples})
