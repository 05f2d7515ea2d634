"""What a completion's reward is compared with: baselines and advantages.

B prompts, G samples a prompt; rewards are [B, G]. A baseline is one function (rewards [B, G], outside) -> baseline
[B, G]; it leaves the expected gradient unchanged as long as it does not depend on the sample it is subtracted from
(Williams 1992). `outside` is what some of them know beyond the batch's own rewards; the others ignore it.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pipeline.file_io import total

KL_STEEPNESS = 4  # how fast kl_coef rises above kl_target: docs/THEORY.md, section 8


def reward_scale(calibration: Sequence[Mapping[str, float]]) -> float:
    """What `scale_rewards: calibration` divides rewards by: s, their spread within a prompt before training.

    s^2 = mean over the calibration batches of reward_std_within^2, which is the mean variance of a prompt's rewards.
    s is a constant of the run, so the objective is E[R] / s - kl_coef * KL: the same for R and for a R + c, a > 0.
    1 where no prompt's rewards differ, or where they overflow. With `combine: normalized` it is the spread of what
    takes the rewards' place, signal_std_within.
    """
    spreads = [row.get("signal_std_within", row["reward_std_within"]) for row in calibration]
    # products, not powers: Python's ** raises where floats overflow
    variance = total(spread * spread for spread in spreads) / len(calibration)
    return math.sqrt(variance) if variance > 0 and math.isfinite(variance) else 1.0


def no_baseline(rewards: Tensor, outside: Tensor | None = None) -> Tensor:
    """b = 0. Unbiased, and the most noisy."""
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

    Without one, at the first step, the mean over the batch's other samples, unbiased as well.
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

    Rewards that are not finite, as a penalty with a diverged policy can make them, leave it as it is.
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
    """z_k = (R_k - mean_k) / (std_k + eps), over the samples of the prompt of which term k says something (ddof 1).

    The terms of a sum, each normalised in the group by itself before they are added up (GDPO, arXiv 2601.05242). terms
    [K, B, G], NaN where a term says nothing: there z is 0, as where all its values are equal. Biased as `advantages`
    with `group`: docs/THEORY.md, section 4.
    """
    scored = ~terms.isnan()
    count = scored.sum(2, keepdim=True)
    # less the smallest, so that equal values are 0 without any rounding
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

    From 0 where the buffer before the limit begins to the whole penalty at the limit: the soft overlong punishment of
    DAPO (arXiv 2503.14476, equation 13).

    lengths [N] in tokens, at most `longest`, the limit; 0 < buffer <= longest; penalty in units of the reward.
    """
    return penalty * (lengths.double() - (longest - buffer)).clamp(min=0) / buffer


def log_ratios(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """sum_t [log pi(y_t) - log ref(y_t)] of each completion, [N]; its mean estimates their KL (k1). All else [N, T]."""
    return torch.where(mask, logprobs - ref_logprobs, 0.0).sum(1)


def adaptive_kl_coef(coef: float, kl: float, target: float) -> float:
    """coef * max(1, kl / target)^4: the recipe's within the target, 5 times it at 1.5 times the target.

    kl: nats per completion, of this step's samples; target: 0 leaves coef as it is, and so does a kl that is no number.
    It is the slope of a convex penalty g(KL), so that E[R] - g(KL) is what is maximised, and it has no memory: one that
    rises step by step, as in Ziegler et al. (arXiv 1909.08593, section 2.2), goes on rising while the policy turns.
    """
    return coef * max(1.0, kl / target) ** KL_STEEPNESS if target > 0 and not math.isnan(kl) else coef
