"""Baselines and advantages: what a completion's reward is compared with.

B prompts, G samples a prompt; rewards are [B, G]. A baseline is one function (rewards [B, G], outside) -> baseline
[B, G]; it leaves the expected gradient unchanged as long as it does not depend on the sample it is subtracted from
(Williams 1992). `outside` is for baselines that need more than the batch's own rewards; the others ignore it.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pipeline.file_io import total

KL_STEEPNESS = 4  # how fast kl_coef rises where the KL is above kl_target: docs/THEORY.md, section 8


def reward_scale(calibration: Sequence[Mapping[str, float]]) -> float:
    """Returns s, the spread of rewards within a prompt before training; `scale_rewards: calibration` divides by it.

    s^2 = mean over the calibration batches of reward_std_within^2, which is the mean variance of a prompt's rewards.
    s is a constant of the run, so the objective is E[R] / s - kl_coef * KL: the same for R and for a R + c, a > 0.
    s = 1 where no prompt's rewards differ, or where they overflow. With `combine: normalized`, s is the spread of the
    normalised sum that replaces the rewards (signal_std_within).
    """
    spreads = [row.get("signal_std_within", row["reward_std_within"]) for row in calibration]
    # products, not powers: Python's ** raises where floats overflow
    variance = total(spread * spread for spread in spreads) / len(calibration)
    return math.sqrt(variance) if variance > 0 and math.isfinite(variance) else 1.0


def no_baseline(rewards: Tensor, outside: Tensor | None = None) -> Tensor:
    """b = 0. Unbiased, and noisy."""
    return torch.zeros_like(rewards)


def batch_mean(rewards: Tensor, outside: Tensor | None = None) -> Tensor:
    """b = mean over all samples, each sample itself included: the expected gradient shrinks by (BG - 1) / BG."""
    return rewards.mean().expand_as(rewards)


def group_mean(rewards: Tensor, outside: Tensor | None = None) -> Tensor:
    """b = mean over all of the prompt's samples, as in the notebook: its advantages are (G - 1) / G of RLOO's."""
    return rewards.mean(1, keepdim=True).expand_as(rewards)


def leave_one_out(rewards: Tensor, outside: Tensor | None = None) -> Tensor:
    """b_i = mean over the prompt's other samples: unbiased (RLOO; Kool et al. 2019; Ahmadian et al. 2402.14740)."""
    group = rewards.shape[1]
    return (rewards.sum(1, keepdim=True) - rewards) / (group - 1)


def running_mean(rewards: Tensor, outside: Tensor | None = None) -> Tensor:
    """b = `outside` [], the running mean of the steps before (`next_running_mean`): unbiased.

    The first step has no running mean: b is then the mean over the batch's other samples, also unbiased.
    """
    if outside is not None:
        return outside.to(rewards).expand_as(rewards)
    return leave_one_out(rewards.view(1, -1)).view_as(rewards)


def greedy_baseline(rewards: Tensor, outside: Tensor | None = None) -> Tensor:
    """b = `outside` [B], the reward of the prompt's greedy completion: unbiased (ReMax; Li et al. 2310.10505)."""
    if outside is None:
        raise ValueError("the greedy baseline needs the rewards of the greedy completions")
    return outside.to(rewards)[:, None].expand_as(rewards)


def next_running_mean(before: float | None, rewards: Tensor, decay: float) -> float | None:
    """decay * before + (1 - decay) * mean of this step's rewards; that mean itself at the first step.

    Rewards that are not finite leave the running mean unchanged. The KL penalty of a diverged policy can cause them.
    """
    mean = rewards.mean().item()
    if not math.isfinite(mean):
        return before
    return mean if before is None else decay * before + (1 - decay) * mean


BASELINES: dict[str, Callable[..., Tensor]] = {
    "none": no_baseline,
    "batch": batch_mean,
    "group": group_mean,
    "rloo": leave_one_out,
    "running": running_mean,
    "greedy": greedy_baseline,
}


def advantages(rewards: Tensor, baseline: Tensor, norm: str, eps: float = 1e-6) -> Tensor:
    """A = R - b, divided by the standard deviation of the group's or the batch's rewards (ddof 1) where `norm` says so.

    Dividing by the group's spread weighs prompts by their difficulty and is biased (Liu et al., arXiv 2503.20783).
    """
    centred = rewards - baseline
    if norm == "group":
        return centred / (rewards.std(1, keepdim=True) + eps)
    if norm == "batch":
        return centred / (rewards.std() + eps)
    return centred


def normalized_terms(terms: Tensor, eps: float = 1e-6) -> Tensor:
    """z_k = (R_k - mean_k) / (std_k + eps), with mean and std (ddof 1) over those samples of the prompt that k scores.

    Each term of a sum is normalised in the group before the terms are added up (GDPO, arXiv 2601.05242). terms
    [K, B, G] is NaN where a term gives no score; z is 0 there, and where all of a term's values are equal. Biased like
    `advantages` with norm "group": docs/THEORY.md, section 4.
    """
    scored = ~terms.isnan()
    count = scored.sum(2, keepdim=True)
    # subtract the smallest value first, so that equal values become exactly 0
    least = torch.where(scored, terms, torch.inf).amin(2, keepdim=True)
    values = torch.where(scored, terms - least, 0.0)
    centred = torch.where(scored, values - values.sum(2, keepdim=True) / count.clamp(min=1), 0.0)
    variance = centred.square().sum(2, keepdim=True) / (count - 1).clamp(min=1)
    return centred / (variance.sqrt() + eps)


def with_kl_penalty(rewards: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, coef: float) -> Tensor:
    """R'(y) = R(y) - coef * sum_t [log pi(y_t) - log ref(y_t)]: the k1 estimate of the reverse KL, in the reward.

    The policy gradient of R' is the gradient of E[R] - coef * KL(pi || ref) (arXiv 2510.01555).
    rewards [B, G]; logprobs, ref_logprobs, mask [B * G, T].
    """
    log_ratio = log_ratios(logprobs, ref_logprobs, mask).view_as(rewards)
    return rewards - coef * log_ratio.to(rewards.dtype).detach()


def overlong_penalties(lengths: Tensor, longest: int, buffer: int, penalty: float) -> Tensor:
    """penalty * max(0, length - (longest - buffer)) / buffer of each completion, [N].

    It rises from 0 at the start of the buffer to the whole penalty at the limit: the soft overlong punishment of DAPO
    (arXiv 2503.14476, equation 13).

    lengths [N]: tokens, at most the limit `longest`; 0 < buffer <= longest; penalty: in units of the reward.
    """
    return penalty * (lengths.double() - (longest - buffer)).clamp(min=0) / buffer


def log_ratios(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """sum_t [log pi(y_t) - log ref(y_t)] of each completion, [N]; the mean estimates the KL (k1). Arguments: [N, T]."""
    return torch.where(mask, logprobs - ref_logprobs, 0.0).sum(1)


def adaptive_kl_coef(coef: float, kl: float, target: float) -> float:
    """coef * max(1, kl / target)^4: coef itself while kl <= target, 5 times coef at kl = 1.5 * target.

    kl: nats per completion, of this step's samples. A target of 0 or a kl of NaN leaves coef unchanged. The result is
    the slope of a convex penalty g(KL), so training maximises E[R] - g(KL). It has no memory: a coefficient that rises
    step by step (Ziegler et al., arXiv 1909.08593, section 2.2) keeps rising while the policy already turns back.
    """
    return coef * max(1.0, kl / target) ** KL_STEEPNESS if target > 0 and not math.isnan(kl) else coef
