"""Baselines, weights of tokens and the scores themselves against the policy gradient by enumeration."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, TopKLogitsWarper, TopPLogitsWarper

from pipeline.config.schema import Recipe
from pipeline.rl.advantages import BASELINES, advantages, next_running_mean, normalized_terms
from pipeline.rl.micro_batch import Batch
from pipeline.rl.terms import signals
from pipeline.rl.update import backward
from tests.enumeration import COEF, World, random, reinforce, size_of, world
from tests.models import all_completions, difference, gradient, plain_logits, recipe, rollout_of, tiny_neox

pytestmark = pytest.mark.numeric


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


def test_normalised_terms_are_numpy_s_z_scores() -> None:
    """Of the samples that a term says something of; nothing of none, of one, or of equal ones."""
    terms = random(2, 5, 4, seed=9)
    terms[0, 0, 1], terms[1, 0], terms[1, 1, 1:], terms[1, 2] = torch.nan, torch.nan, torch.nan, 0.1
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        each = terms.numpy() - np.nanmean(terms, 2, keepdims=True)
        truth = torch.from_numpy(each / (np.nanstd(terms, 2, ddof=1, keepdims=True) + 0.5))
    truth[1, :3] = 0
    torch.testing.assert_close(normalized_terms(terms, eps=0.5), truth.nan_to_num(0))
    same = torch.full((1, 1, 7), 0.1, dtype=torch.float64)
    assert same.mean() != 0.1, "rounding"
    assert normalized_terms(same).tolist() == [[[0.0] * 7]]


# --- combine: normalized

WEIGHTS = {"one": 1.0, "other": -0.5}


def world_of_terms(factor: float = 1.0, shift: float = 0.0) -> World:
    """Two rewards for each completion [B, C, K]; the second one in any unit."""
    found = copy.copy(world(2, 2))
    found.rewards = torch.stack([found.rewards, factor * random(*found.rewards.shape, seed=11) + shift], 2)
    return found


def of_terms(combine: str, baseline: str = "none") -> Callable[..., Tensor]:
    """The loss of rewards [B, G, K], as `train_step` puts it together."""
    inner = reinforce(baseline)

    def loss(rewards: Tensor, *arguments: Tensor) -> Tensor:
        return inner(signals(rewards.permute(2, 0, 1), WEIGHTS, combine).sum(0), *arguments)

    return loss


def test_two_normalised_samples_follow_the_chance_to_win() -> None:
    """G = 2: z is 1 / sqrt(2) for the better one. So the ascent is that of sum_k w_k E[sign(R_k(y) - R_k(y'))] in y, y'
    being drawn by the same policy as it was, over sqrt(2)."""
    one = world_of_terms()
    wins = torch.zeros((), dtype=torch.float64)
    for weight, rewards in zip(WEIGHTS.values(), one.rewards.unbind(2), strict=True):  # rewards [B, C]
        better = (rewards[:, :, None] - rewards[:, None, :]).sign()
        wins = wins + weight * (one.p[:, :, None] * one.p.detach()[:, None, :] * better).sum((1, 2)).mean()
    assert difference(one.expected(of_terms("normalized"), 2), -one.grad(wins) / 2**0.5) < 1e-5


def test_normalised_terms_are_no_policy_gradient_and_know_no_unit() -> None:
    plain, other = world_of_terms(), world_of_terms(100, 7)
    of_the_sum = [one.expected(of_terms("sum"), 2) for one in (plain, other)]
    normalised = [one.expected(of_terms("normalized"), 2) for one in (plain, other)]
    weighted = (plain.rewards * torch.tensor([*WEIGHTS.values()])).sum(2)
    truth = -plain.grad((plain.p * weighted).sum(1).mean())
    assert difference(of_the_sum[0], truth) < 1e-12
    assert torch.cosine_similarity(*of_the_sum, dim=0) < 0.9
    assert difference(*normalised) < 1e-5
    assert torch.cosine_similarity(normalised[0], truth, dim=0) < 0.999


def test_a_leave_one_out_baseline_lengthens_what_is_normalised() -> None:
    """The group's own mean has been subtracted from each term."""
    plain, rloo = (world_of_terms().expected(of_terms("normalized", baseline), 2) for baseline in ("none", "rloo"))
    assert difference(rloo, 2 * plain) < 1e-12


def test_the_running_mean_is_pandas_s_exponential_one() -> None:
    steps, mean, decay = random(6, 2, 3, seed=4), None, 0.8
    seen = [mean := next_running_mean(mean, rewards, decay) for rewards in steps]
    truth = pd.Series(steps.mean((1, 2)).tolist()).ewm(alpha=1 - decay, adjust=False).mean()
    assert seen == pytest.approx(truth.tolist(), rel=1e-12)


@pytest.mark.parametrize(
    "weights", [{"norm": "group"}, {"aggregation": "sequence_mean"}, {"aggregation": "token_mean"}]
)
def test_other_weights_give_another_direction(weights: dict[str, Any]) -> None:
    """Spread, lengths of completions, lengths of the batch: none is the policy gradient, nor parallel to it."""
    measured, truth = world().expected(reinforce("rloo", **weights), group=2), -world().policy_gradient()
    assert torch.cosine_similarity(measured, truth, dim=0) < 0.999  # rounding would leave 1 - 1e-15


def test_a_constant_length_shortens_the_policy_gradient_and_nothing_else() -> None:
    measured = world().expected(reinforce("rloo", aggregation="constant_length"), group=2)
    assert difference(measured, -world().policy_gradient() / 2) < 1e-12  # completions of at most two tokens


# --- what the loss scores: a GPT-NeoX of four tokens, its completions of at most two, a reward for each

PROMPT = [2, 1]
ROWS = [row[:n].tolist() for row, n in zip(*all_completions(4, 2), strict=True)]
REWARDS, REF_LOGPROBS = random(len(ROWS), seed=5), -2 + random(len(ROWS), 2, seed=7)


def log_policy(model: PreTrainedModel, chosen: Recipe) -> Tensor:
    """[K] log mu(y) of each completion; top-k and top-p by transformers' own warpers."""
    logprobs = []
    for row in ROWS:
        logits = plain_logits(model, PROMPT, row)[:-1] / chosen.temperature
        for warp in (TopKLogitsWarper(chosen.top_k or 4), TopPLogitsWarper(chosen.top_p)):
            logits = warp(None, logits)
        logprobs.append(logits.log_softmax(-1).gather(1, torch.tensor(row)[:, None]).sum())
    return torch.stack(logprobs)


def expected_gradient(model: PreTrainedModel, chosen: Recipe, p: Tensor, advantage: Tensor) -> Tensor:
    """Of the recipe's loss on every completion, each as often as `p` [K] says."""
    total = torch.zeros(())
    for k, row in enumerate(ROWS):
        model.zero_grad()
        rollout = rollout_of([PROMPT], [row])
        mask, ref = rollout.completion_mask, REF_LOGPROBS[[k], : len(row)]
        backward(model, Batch(rollout, advantage[[k]], mask, ref, size_of(mask), chosen.kl_coef), chosen, 1)
        total = total + p[k].item() * gradient(model)
    return total


@pytest.mark.parametrize(("alignment", "temperature"), [("correct", 1.0), ("correct", 0.6), ("shifted", 1.0)])
def test_only_the_correct_alignment_is_the_policy_gradient(alignment: str, temperature: float) -> None:
    model = tiny_neox(vocabulary=4)
    chosen = recipe("stable", alignment=alignment, temperature=temperature, kl="none")
    p = log_policy(model, chosen).exp()
    (p * REWARDS).sum().backward()
    truth = -gradient(model)
    for baseline in (0.0, (p * REWARDS).sum().item()):  # a constant leaves a policy gradient unchanged
        measured = expected_gradient(model, chosen, p, REWARDS - baseline)
        if alignment == "correct":
            assert difference(measured, truth) < 1e-10
        else:  # far off in length, and in direction
            assert difference(measured, truth) > 0.5
            assert torch.cosine_similarity(measured, truth, dim=0) < 0.9


@pytest.mark.parametrize("truncation", [{"top_k": 2}, {"top_p": 0.7}, {"top_k": 3, "top_p": 0.8}])
def test_a_truncated_sampler_wants_to_be_scored_as_it_samples(truncation: dict[str, Any]) -> None:
    """J and KL of the truncated policy mu; a loss that scores the full softmax has another gradient."""
    model, changes = tiny_neox(vocabulary=4), {"temperature": 0.8, "kl": "loss_k2", "kl_coef": COEF, **truncation}
    log_mu = log_policy(model, recipe("stable", **changes))
    possible = log_mu > -torch.inf
    assert 1 < possible.sum() < len(ROWS)
    log_ref = torch.stack([ref[: len(row)].sum() for ref, row in zip(REF_LOGPROBS, ROWS, strict=True)])
    inside = log_mu[possible]
    (inside.exp() * (REWARDS[possible] - COEF * (inside - log_ref[possible]))).sum().backward()
    truth = -gradient(model)
    for distribution, right in (("sampler", True), ("full", False)):
        chosen = recipe("stable", loss_distribution=distribution, **changes)
        measured = expected_gradient(model, chosen, log_mu.exp(), REWARDS)
        assert difference(measured, truth) < 1e-10 if right else difference(measured, truth) > 0.1
