"""Baselines, weights of tokens and the scores themselves against the policy gradient by enumeration."""

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, TopKLogitsWarper, TopPLogitsWarper

from pipeline.config.schema import Recipe
from pipeline.rl.advantages import BASELINES, advantages, next_running_mean
from pipeline.rl.update import Batch, backward
from tests.enumeration import COEF, random, reinforce, size_of, world
from tests.models import (
    all_completions,
    difference,
    gradient,
    plain_logits,
    plain_logprobs,
    recipe,
    rollout_of,
    tiny_neox,
)

pytestmark = pytest.mark.numeric


def test_the_enumeration_is_whole() -> None:
    for limit in (1, 2, 3):
        torch.testing.assert_close(world(limit).p.sum(), torch.ones((), dtype=torch.float64))


# --- baselines


# name of a case: the baseline, what it knows from outside for B prompts, and what is left of the policy gradient
CASES: dict[str, tuple[str, Callable[[int], Tensor | None], Callable[[int, int], float]]] = {
    "none": ("none", lambda prompts: None, lambda prompts, group: 1),
    "batch": ("batch", lambda prompts: None, lambda prompts, group: 1 - 1 / (prompts * group)),
    "group": ("group", lambda prompts: None, lambda prompts, group: 1 - 1 / group),
    "rloo": ("rloo", lambda prompts: None, lambda prompts, group: 1),
    "running, first step": ("running", lambda prompts: None, lambda prompts, group: 1),
    "running": ("running", lambda prompts: torch.tensor(1.7), lambda prompts, group: 1),
    "greedy": ("greedy", lambda prompts: random(prompts, seed=6), lambda prompts, group: 1),
}


@pytest.mark.parametrize(("limit", "prompts", "group"), [(1, 1, 3), (2, 1, 2), (2, 1, 3), (3, 1, 2), (2, 2, 2)])
@pytest.mark.parametrize("case", CASES)
def test_baselines_leave_the_policy_gradient_where_they_claim_to(
    case: str, limit: int, prompts: int, group: int
) -> None:
    """Unbiased, or shrunk by the sample's own share in the mean that it is compared with."""
    baseline, outside, shrinks = CASES[case]
    one = world(limit, prompts)
    measured = one.expected(reinforce(baseline, outside=outside(prompts)), group)
    assert difference(measured, -shrinks(prompts, group) * one.policy_gradient()) < 1e-12


def test_every_baseline_is_enumerated() -> None:
    assert {baseline for baseline, *_ in CASES.values()} == set(BASELINES)


def test_the_group_mean_is_leave_one_out_scaled() -> None:
    rewards = random(5, 4, seed=3)
    group, rloo = (advantages(rewards, BASELINES[name](rewards), "none") for name in ("group", "rloo"))
    torch.testing.assert_close(group, rloo * 3 / 4)


def test_baselines_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
    truth = {
        "none": [[0, 0, 0], [0, 0, 0]],
        "batch": [[2, 2, 2], [2, 2, 2]],
        "group": [[3, 3, 3], [1, 1, 1]],
        "rloo": [[4, 3.5, 1.5], [1.5, 1.5, 0]],
    }
    assert {name: BASELINES[name](rewards).tolist() for name in truth} == truth
    assert BASELINES["running"](rewards).tolist() == [[2.2, 2.0, 1.2], [2.4, 2.4, 1.8]]  # of the five others
    assert BASELINES["running"](rewards, torch.tensor(0.5)).tolist() == [[0.5] * 3] * 2
    assert BASELINES["greedy"](rewards, torch.tensor([4.0, -1.0])).tolist() == [[4.0] * 3, [-1.0] * 3]
    with pytest.raises(ValueError, match="greedy completions"):
        BASELINES["greedy"](rewards)


def test_normalised_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 3.0], [2.0, 10.0]], dtype=torch.float64)
    centred = torch.tensor([[-1.0, 1.0], [-4.0, 4.0]], dtype=torch.float64)
    baseline = BASELINES["group"](rewards)
    torch.testing.assert_close(advantages(rewards, baseline, "none"), centred)
    # variances with ddof 1: 2 and 32 in the groups; about the mean 4, (9 + 1 + 4 + 36) / 3 in the batch
    spread = torch.tensor([[2.0], [32.0]], dtype=torch.float64).sqrt()
    torch.testing.assert_close(advantages(rewards, baseline, "group", eps=0.5), centred / (spread + 0.5))
    torch.testing.assert_close(advantages(rewards, baseline, "batch", eps=0.5), centred / ((50 / 3) ** 0.5 + 0.5))
    same = torch.ones(2, 2, dtype=torch.float64)
    assert advantages(same, BASELINES["group"](same), "group").tolist() == [[0, 0], [0, 0]]


def test_the_running_mean_is_pandas_s_exponential_one() -> None:
    steps, mean, decay = random(6, 2, 3, seed=4), None, 0.8
    seen = [mean := next_running_mean(mean, rewards, decay) for rewards in steps]
    truth = pd.Series(steps.mean((1, 2)).tolist()).ewm(alpha=1 - decay, adjust=False).mean()
    assert seen == pytest.approx(truth.tolist(), rel=1e-12)


OTHER_WEIGHTS: list[dict[str, Any]] = [
    {"norm": "group"},
    {"aggregation": "sequence_mean"},
    {"aggregation": "token_mean"},
]


@pytest.mark.parametrize("weights", OTHER_WEIGHTS)
def test_other_weights_give_another_direction(weights: dict[str, Any]) -> None:
    """Spread, lengths of completions, lengths of the batch: none is the policy gradient, nor parallel to it."""
    measured, truth = world().expected(reinforce("rloo", **weights), group=2), -world().policy_gradient()
    assert torch.cosine_similarity(measured, truth, dim=0) < 0.999  # rounding would leave 1 - 1e-15


def test_a_constant_length_shortens_the_policy_gradient_and_nothing_else() -> None:
    measured = world().expected(reinforce("rloo", aggregation="constant_length"), group=2)
    assert difference(measured, -world().policy_gradient() / 2) < 1e-12  # completions of at most two tokens


# --- what the loss scores


def expected_gradient(
    model: PreTrainedModel, chosen: Recipe, p: Tensor, advantage: Tensor, ref_logprobs: Tensor
) -> Tensor:
    """Of the recipe's loss on every completion of at most two tokens, each as often as `p` [K] says."""
    ids, lengths = all_completions(4, 2)
    total = torch.zeros(())
    for k in range(len(ids)):
        model.zero_grad()
        rollout = rollout_of([PROMPT], ids[[k]], lengths[[k]])
        mask = rollout.completion_mask
        batch = Batch(rollout, advantage[[k]], mask, ref_logprobs[[k]], size_of(mask), chosen.kl_coef)
        backward(model, batch, chosen, 1)
        total = total + p[k].item() * gradient(model)
    return total


PROMPT = [2, 1]


@pytest.mark.parametrize(("alignment", "temperature"), [("correct", 1.0), ("correct", 0.6), ("shifted", 1.0)])
def test_only_the_correct_alignment_is_the_policy_gradient(alignment: str, temperature: float) -> None:
    """A GPT-NeoX of four tokens."""
    model, (ids, lengths) = tiny_neox(vocabulary=4), all_completions(4, 2)
    reward = random(len(ids), seed=5)
    rows = [row[:n].tolist() for row, n in zip(ids, lengths.tolist(), strict=True)]
    p = torch.stack([plain_logprobs(model, PROMPT, row, temperature).sum().exp() for row in rows])
    (p * reward).sum().backward()
    truth = -gradient(model)

    chosen = recipe("stable", alignment=alignment, temperature=temperature, kl="none")
    for baseline in (0.0, (p * reward).sum().item()):  # a constant leaves a policy gradient unchanged
        measured = expected_gradient(model, chosen, p, reward - baseline, torch.zeros(ids.shape))
        if alignment == "correct":
            assert difference(measured, truth) < 1e-10
        else:  # far off in length, and in direction
            assert difference(measured, truth) > 0.5
            assert torch.cosine_similarity(measured, truth, dim=0) < 0.9


@pytest.mark.parametrize("truncation", [{"top_k": 2}, {"top_p": 0.7}, {"top_k": 3, "top_p": 0.8}])
def test_a_truncated_sampler_wants_to_be_scored_as_it_samples(truncation: dict[str, Any]) -> None:
    """J and KL of the truncated policy mu; a loss that scores the full softmax has another gradient.

    mu comes from transformers' own warpers.
    """
    model, (ids, lengths), temperature = tiny_neox(vocabulary=4), all_completions(4, 2), 0.8
    warpers = [TopKLogitsWarper(truncation.get("top_k", 4)), TopPLogitsWarper(truncation.get("top_p", 1.0))]
    ref = -2 + random(*ids.shape, seed=7)
    reward, log_mu = random(len(ids), seed=5), []
    for row, n in zip(ids, lengths.tolist(), strict=True):
        logits = plain_logits(model, PROMPT, row[:n].tolist())[:-1] / temperature
        for warp in warpers:
            logits = warp(None, logits)
        log_mu.append(logits.log_softmax(-1).gather(1, row[:n, None]).sum())
    possible = [k for k, value in enumerate(log_mu) if value > -torch.inf]
    assert 1 < len(possible) < len(ids)
    inside = torch.stack([log_mu[k] for k in possible])
    log_ref = torch.stack([ref[k, : lengths[k]].sum() for k in possible])
    (inside.exp() * (reward[possible] - COEF * (inside - log_ref))).sum().backward()
    truth = -gradient(model)

    p = torch.tensor([value.exp().item() for value in log_mu], dtype=torch.float64)
    for distribution, right in (("sampler", True), ("full", False)):
        chosen = recipe(
            "stable", loss_distribution=distribution, temperature=temperature, kl="loss_k2", kl_coef=COEF, **truncation
        )
        measured = expected_gradient(model, chosen, p, reward, ref)
        assert difference(measured, truth) < 1e-10 if right else difference(measured, truth) > 0.1
