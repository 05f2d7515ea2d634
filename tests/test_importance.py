"""Importance weights: unbiased where they claim to be, nothing at the first update, and clipped as PPO is."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.rl.advantages import BASELINES, advantages
from pipeline.rl.importance import importance_weights
from pipeline.rl.loss import policy_loss, token_weights
from pipeline.rl.micro_batch import Batch
from pipeline.rl.optimizer import make_optimizer
from pipeline.rl.update import backward, update_policy
from tests.enumeration import random, size_of, world
from tests.models import difference, gradient, mask_of, plain_logprobs, recipe, rollout_of, tiny_neox, token_lists

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("limit", [1, 2, 3])
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_whole_completions_weighed_by_their_ratio_are_unbiased(level: str, limit: int) -> None:
    """Sampled by another policy, the reference; token by token only where a completion has one token."""

    def loss(rewards: Tensor, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
        advantage = advantages(rewards, BASELINES["none"](rewards), "none").flatten()
        ratio, cut = importance_weights(logprobs, old_logprobs, mask, advantage, level, clip_range=0.0)
        assert not cut.any()
        return policy_loss(logprobs, advantage, token_weights(mask, "sequence_sum", size_of(mask)) * ratio)

    measured, truth = world(limit).expected(loss, 1, sampled_by="reference"), -world(limit).policy_gradient()
    if level == "sequence" or limit == 1:
        assert difference(measured, truth) < 1e-12
    else:
        assert difference(measured, truth) > 0.1


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 10_000),
    st.sampled_from(["token", "sequence"]),
    st.floats(0.01, 0.9),
    st.just(0) | st.floats(0.01, 0.9),
)
def test_the_gradient_is_that_of_ppo_s_clipped_surrogate(seed: int, level: str, clip_range: float, high: float) -> None:
    """min(r A, clip(r) A) as it is published, through autograd; with DAPO's limit above 1, or without one."""
    lengths = torch.tensor([3, 1, 4])
    mask, advantage = mask_of(lengths, 4), random(3, seed=seed + 1)
    new = (-1 + 0.3 * random(3, 4, seed=seed)).requires_grad_()
    old = -1 + 0.3 * random(3, 4, seed=seed + 2)
    difference_of_logs = torch.where(mask, new - old, 0.0)
    ratio = (difference_of_logs.sum(1, keepdim=True) if level == "sequence" else difference_of_logs).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + (high or clip_range))
    surrogate = torch.minimum(ratio * advantage[:, None], clipped * advantage[:, None])
    loss = -(surrogate.squeeze(1) if level == "sequence" else (surrogate * mask).sum(1)).sum() / 3
    truth = torch.autograd.grad(loss, new)[0]
    factors, cut = importance_weights(new, old, mask, advantage, level, clip_range, high)
    assert not factors.requires_grad
    assert not importance_weights(new, old, mask, torch.zeros(3), level, clip_range)[1].any()  # it pulls nowhere
    weights = token_weights(mask, "sequence_sum", size_of(mask)) * factors.masked_fill(cut, 0.0)
    measured = torch.autograd.grad(policy_loss(new, advantage, weights), new, allow_unused=True)[0]
    torch.testing.assert_close(measured, truth, rtol=1e-10, atol=1e-12)


PROMPTS, COMPLETIONS = token_lists([2, 5, 1], 7), token_lists([4, 1, 3], 7, seed=1)
ADVANTAGE = torch.tensor([1.5, -1.0, 0.7], dtype=torch.float64)


def batch() -> Batch:
    rollout = rollout_of(PROMPTS, COMPLETIONS)
    mask = rollout.completion_mask
    return Batch(rollout, ADVANTAGE, mask, torch.zeros(mask.shape), size_of(mask))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_first_update_is_reinforce(level: str) -> None:
    measured = []
    for changes in ({}, {"importance": level}, {"importance": level, "clip_range": 0.2}):
        model = tiny_neox()
        assert backward(model, batch(), recipe("stable", **changes), 2).clip_share == 0
        measured.append(gradient(model))
        assert torch.equal(measured[-1], measured[0])


def weights_of(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_several_updates_on_a_batch_are_ppo_s(level: str) -> None:
    """A straight PPO loop of three epochs, one completion at a time, with torch's Adam."""
    chosen = recipe(
        "stable", importance=level, clip_range=0.1, epochs=3, lr=0.01, warmup_steps=0, max_grad_norm=0.0, kl="none"
    )
    ours, theirs = tiny_neox(), tiny_neox()
    first, updated = update_policy(batch(), ours, make_optimizer(ours.parameters(), chosen), chosen, chosen.lr, 2, 1)

    adam = torch.optim.Adam(theirs.parameters(), lr=0.01)
    pairs = list(zip(PROMPTS, COMPLETIONS, strict=True))
    old = [plain_logprobs(theirs, *pair).detach() for pair in pairs]
    clipped, norms, lengths = 0, [], []
    for _ in range(3):
        adam.zero_grad()
        loss, clipped = torch.zeros(()), 0
        for pair, before, advantage in zip(pairs, old, ADVANTAGE, strict=True):
            log_ratio = plain_logprobs(theirs, *pair) - before
            ratio = (log_ratio.sum() if level == "sequence" else log_ratio).exp()
            raw, cut = ratio * advantage, ratio.clamp(0.9, 1.1) * advantage
            loss = loss - torch.minimum(raw, cut).sum() / 3
            clipped += int((cut < raw).sum()) * (len(before) if level == "sequence" else 1)
        loss.backward()
        norms.append(gradient(theirs).norm().item())
        weights = weights_of(theirs)
        adam.step()
        lengths.append(difference(weights_of(theirs), weights))
    assert updated.pop("relative_update") == pytest.approx(lengths[0], rel=1e-6)  # of the first update
    assert clipped > 0
    assert updated == {"grad_norm": pytest.approx(norms[0]), "clip_share": clipped / 8, "nonfinite": 0.0}
    for i, before in enumerate(old):
        torch.testing.assert_close(first.logprobs[i, : len(before)], before, rtol=0, atol=1e-12)
    moved, truth = (weights_of(model) - weights_of(tiny_neox()) for model in (ours, theirs))
    assert difference(moved, truth) < 1e-7  # Adam divides by the root of tiny squares


def test_an_update_that_is_not_finite_ends_the_batch() -> None:
    chosen, model = recipe("stable", importance="token", epochs=3), tiny_neox()
    bad = dataclasses.replace(batch(), advantages=torch.full((3,), torch.inf, dtype=torch.float64))
    _, updated = update_policy(bad, model, make_optimizer(model.parameters(), chosen), chosen, 0.1, 2, 1)
    assert updated["nonfinite"] == 1.0
    assert torch.equal(weights_of(model), weights_of(tiny_neox()))
