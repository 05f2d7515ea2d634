"""Truth by enumeration: policies so small that every batch can be written down.

J = E[R(y)] and KL(pi || ref) are sums over all completions; autograd gives their gradients. A loss is right if its
gradient, averaged over every batch that can be sampled, is that of -J or of the KL. All in float64.
"""

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.rl.advantages import BASELINES, advantages, with_kl_penalty
from pipeline.rl.loss import LossNormalizers, policy_loss, token_weights
from tests.models import all_completions, mask_of, tabular_rows

VOCABULARY = 3
COEF = 0.3


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class World:
    """Tabular policies of B prompts, a reference, and the rewards of every completion. K completions of T tokens."""

    def __init__(self, limit: int, prompts: int = 1) -> None:
        self.ids, self.lengths = all_completions(VOCABULARY, limit)
        self.mask = mask_of(self.lengths, limit)
        self.table = random(prompts, limit, VOCABULARY ** (limit - 1), VOCABULARY, seed=0).requires_grad_()
        reference = random(prompts, limit, VOCABULARY ** (limit - 1), VOCABULARY, seed=1)
        self.rewards = 2 + random(prompts, len(self.ids), seed=2)  # not centred: a wrong baseline must show
        rows, ref_rows = (
            torch.stack([tabular_rows(one, self.ids) for one in tables]) for tables in (self.table, reference)
        )  # [B, K, T, V]
        taken = self.ids.expand(prompts, -1, -1)[..., None]
        self.logprobs, self.ref_logprobs = (x.gather(3, taken).squeeze(3) for x in (rows, ref_rows))  # [B, K, T]
        self.entropies = -(rows.exp() * rows).sum(3)  # [B, K, T]
        self.log_p, self.log_q = ((x * self.mask).sum(2) for x in (self.logprobs, self.ref_logprobs))  # [B, K]
        self.p = self.log_p.exp()
        torch.testing.assert_close(self.p.sum(1), torch.ones(prompts, dtype=torch.float64))  # no completion is missing

    def grad(self, scalar: Tensor) -> Tensor:
        return torch.autograd.grad(scalar, self.table, retain_graph=True)[0].flatten()

    def policy_gradient(self) -> Tensor:
        """Of J = mean over prompts of sum_y pi(y | x) R(x, y)."""
        return self.grad((self.p * self.rewards).sum(1).mean())

    def kl_gradient(self) -> Tensor:
        """Of KL(pi || ref) = sum_y pi(y) log(pi(y) / ref(y)), mean over prompts."""
        return self.grad((self.p * (self.log_p - self.log_q)).sum(1).mean())

    def expected(
        self, loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], group: int, sampled_by: str = "policy"
    ) -> Tensor:
        """Mean gradient of loss(rewards [B, G], logprobs, ref_logprobs, mask [B * G, T]) over every batch there is.

        The batches are as frequent as the policy, or the reference, makes them.
        """
        p = (self.log_p if sampled_by == "policy" else self.log_q).detach().exp()
        prompts, total = len(self.p), torch.zeros((), dtype=torch.float64)
        for batch in itertools.product(range(len(self.ids)), repeat=prompts * group):
            rows = torch.tensor(batch).view(prompts, group)
            b = torch.arange(prompts)[:, None]
            chance = p[b, rows].prod()
            arguments = (self.logprobs[b, rows].flatten(0, 1), self.ref_logprobs[b, rows].flatten(0, 1))
            total = total + chance * loss(self.rewards[b, rows], *arguments, self.mask[rows].flatten(0, 1))
        return self.grad(total)


@functools.cache
def world(limit: int = 2, prompts: int = 1) -> World:
    return World(limit, prompts)


def size_of(mask: Tensor, longest: int = 0) -> LossNormalizers:
    return LossNormalizers(len(mask), int(mask.sum()), longest or mask.shape[1])


def reinforce(
    baseline: str, norm: str = "none", aggregation: str = "sequence_sum", coef: float = 0.0,
    outside: Tensor | None = None,
) -> Callable[..., Tensor]:  # fmt: skip
    """The loss as `train_step` puts it together."""

    def loss(rewards: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
        if coef:
            rewards = with_kl_penalty(rewards, logprobs, ref_logprobs, mask, coef)
        advantage = advantages(rewards, BASELINES[baseline](rewards, outside), norm)
        return policy_loss(logprobs, advantage.flatten(), token_weights(mask, aggregation, size_of(mask)))

    return loss
