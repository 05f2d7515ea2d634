"""The metrics of a training step: what each is, and how it is computed. Imports no torch, since reports read what they
are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Metric(NamedTuple):
    """A column of history.csv. docs/METRICS.md has its formula and what to expect of it."""

    name: str
    unit: str  # a share is shown in percent
    label: str
    calibrated: bool = False  # also measured without learning: a column of calibration.csv

    @property
    def title(self) -> str:
        """The label, with the unit where the label does not imply it."""
        shown = self.unit.startswith(("nats", "tokens"))
        return f"{self.label}, {self.unit.replace(' per ', ' a ')}" if shown else self.label


METRICS = {metric.name: metric for metric in (
    Metric("step", "steps", "training step"),
    Metric("reward_mean", "reward units", "mean reward", calibrated=True),
    Metric("reward_se", "reward units", "standard error of the mean reward", calibrated=True),
    Metric("reward_std_within", "reward units", "spread of the reward within a prompt", calibrated=True),
    Metric("reward_std_between", "reward units", "spread of the reward between prompts"),
    Metric("baseline", "reward units", "baseline"),
    Metric("advantage_std", "reward units (1 where advantages are normalised)", "spread of the advantages"),
    Metric("zero_spread_share", "share", "prompts whose samples all have the same reward", calibrated=True),
    Metric("loss", "reward units · nats", "loss"),
    Metric("entropy", "nats per token", "entropy of the policy", calibrated=True),
    Metric("ref_kl_k1", "nats per token", "KL to the reference"),
    Metric("ref_kl_se", "nats per token", "standard error of the KL to the reference"),
    Metric("ref_kl_k3", "nats per token", "KL to the reference (k3)"),
    Metric("ref_kl_sequence", "nats per completion", "KL to the reference"),
    Metric("ref_logprob", "nats per token", "logprob by the reference", calibrated=True),
    Metric("policy_logprob", "nats per token", "logprob by the policy"),
    Metric("certain_run", "tokens", "longest certain run"),
    Metric("logprob_gap", "nats", "largest |sampled − scored| logprob"),
    Metric("truncation_gap", "nats", "largest |sampled − full softmax| logprob"),
    Metric("grad_norm", "reward units · nats per unit of parameter", "gradient norm before clipping"),
    Metric("grad_snr", "ratio", "signal over noise of the gradient"),
    Metric("update_kl", "nats per token", "change by one update"),
    Metric("update_kl_se", "nats per token", "standard error of the change by one update"),
    Metric("relative_update", "ratio", "change of the weights by one update, relative"),
    Metric("lr", "per step", "learning rate"),
    Metric("kl_coef", "reward units per nat", "factor of the KL term"),
    Metric("clip_share", "share", "tokens whose importance ratio was clipped"),
    Metric("completion_tokens", "tokens", "length of a completion", calibrated=True),
    Metric("ended_share", "share", "completions that end by themselves", calibrated=True),
    Metric("empty_share", "share", "empty completions", calibrated=True),
    Metric("distinct_completions", "share", "different completions", calibrated=True),
    Metric("distinct_within", "share", "different completions of a prompt", calibrated=True),
    Metric("distinct_1", "share", "different tokens"),
    Metric("distinct_2", "share", "different token pairs"),
    Metric("repeated_3grams", "share", "repeated 3-grams", calibrated=True),
    Metric("top_token_share", "share", "share of the most frequent token", calibrated=True),
    Metric("nonfinite", "0 or 1", "loss or gradient not finite (1 = yes)"),
    Metric("nonfinite_logprobs", "share", "tokens whose logprob is not finite"),
)}  # fmt: skip
HISTORY_COLUMNS = tuple(METRICS)
CALIBRATION_COLUMNS = ("batch", *(metric.name for metric in METRICS.values() if metric.calibrated))
CERTAIN = math.log(0.99)  # a token above this log-probability is near-certain


def reward_metrics(rewards: Tensor, baseline: Tensor, advantages: Tensor) -> dict[str, float]:
    """rewards, baseline, advantages: [B, G], B prompts and G samples of each."""
    means = rewards.mean(1)
    one = len(rewards) == 1  # the spread between prompts needs two of them
    between = means.new_tensor(math.nan) if one else means.std()
    return {
        "reward_mean": rewards.mean().item(),
        "reward_se": (between / len(rewards) ** 0.5).item(),
        "reward_std_within": rewards.var(1).mean().sqrt().item(),
        "reward_std_between": between.item(),
        "baseline": baseline.mean().item(),
        "advantage_std": advantages.std(correction=0).item(),
        "zero_spread_share": zero_spread(rewards).double().mean().item(),
    }


def zero_spread(rewards: Tensor) -> Tensor:
    """[B] True = all samples of the prompt have one reward, so that it teaches nothing under a group baseline."""
    return rewards.eq(rewards[:, :1]).all(1)


def policy_metrics(
    logprobs: Tensor,  # [N, T] of the policy that sampled
    entropy: Tensor,  # [N, T] of the policy
    mask: Tensor,  # [N, T] True = a token of the completion
) -> dict[str, float]:
    return {
        "entropy": entropy[mask].mean().item(),
        "policy_logprob": logprobs[mask].mean().item(),
        "certain_run": longest_runs(logprobs.masked_fill(~mask, -math.inf) > CERTAIN).double().mean().item(),
    }


def nonfinite_share(before: Tensor, after: Tensor) -> float:
    """Share of the completions' logprobs, before and after an update, that are not finite. Those after it show that a
    run's last update broke the policy."""
    return sum(int((~part.isfinite()).sum()) for part in (before, after)) / (len(before) + len(after))


def reference_metrics(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, group: int) -> dict[str, float]:
    """Estimates of KL(policy || reference), d = log pi - log ref: k1 = d, k3 = exp(-d) - 1 + d (Schulman 2020).

    logprobs, ref_logprobs, mask: [n, T] of whole prompts, `group` completions of each.
    """
    log_ratio = (logprobs - ref_logprobs).double()
    k3 = (-log_ratio).expm1() + log_ratio
    return {
        "ref_kl_k1": log_ratio[mask].mean().item(),
        "ref_kl_se": token_mean_error(log_ratio, mask, group),
        "ref_kl_k3": k3[mask].mean().item(),
        "ref_kl_sequence": log_ratio.masked_fill(~mask, 0).sum(1).mean().item(),
        "ref_logprob": ref_logprobs[mask].mean().item(),
    }


def update_metrics(before: Tensor, after: Tensor, mask: Tensor, group: int) -> dict[str, float]:
    """KL(before || after) of one update, on completions sampled before it: k3, r - 1 - log r with r = after / before.

    before, after, mask: [n, T] of whole prompts, `group` completions of each.
    """
    log_ratio = (after - before).double()
    k3 = log_ratio.expm1() - log_ratio
    return {"update_kl": k3[mask].mean().item(), "update_kl_se": token_mean_error(k3, mask, group)}


def token_mean_error(values: Tensor, mask: Tensor, group: int) -> float:
    """Standard error of the mean over tokens, with whole prompts as the independent units. NaN for a single prompt.

    The mean is r = sum_b D_b / sum_b n_b, a ratio of totals over B prompts; linearised (Cochran 1977, section 6.3),
    se = sqrt(B / (B - 1) sum_b (D_b - r n_b)^2) / sum_b n_b. values, mask: [n, T].
    """
    totals = values.masked_fill(~mask, 0).sum(1).view(-1, group).sum(1).double()
    tokens = mask.sum(1).view(-1, group).sum(1).double()
    prompts = len(totals)
    if prompts == 1:
        return math.nan
    rest = totals - totals.sum() / tokens.sum() * tokens
    return ((prompts / (prompts - 1) * rest.square().sum()).sqrt() / tokens.sum()).item()


def longest_runs(marked: Tensor) -> Tensor:
    """[N] the longest run of True in each row of [N, T]."""
    current = longest = marked.new_zeros(len(marked)).long()
    for column in marked.T:
        current = (current + 1) * column
        longest = longest.maximum(current)
    return longest


def largest_gap(logprobs: Tensor, others: Tensor, mask: Tensor) -> float:
    """max |difference| in nats over the tokens of the completions. All [N, T].

    Between the sampler's and what the loss scores, rounding leaves about 1e-5; a misaligned objective or a truncated
    sampler leaves nats.
    """
    return (logprobs - others)[mask].abs().max().item()
