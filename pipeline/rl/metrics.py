"""Numbers of one training step. docs/METRICS.md defines each; its columns are HISTORY_COLUMNS, in this order."""

import math

import torch
from torch import Tensor

from pipeline.rl.advantages import zero_spread

HISTORY_COLUMNS = (
    "step", "reward_mean", "reward_se", "reward_std_within", "reward_std_between", "baseline", "advantage_std",
    "zero_spread_share", "loss", "entropy", "ref_kl_k1", "ref_kl_se", "ref_kl_k3", "ref_kl_sequence", "ref_logprob",
    "policy_logprob", "certain_run", "logprob_gap", "truncation_gap", "grad_norm", "grad_snr", "update_kl",
    "update_kl_se", "relative_update", "lr", "kl_coef", "clip_share", "completion_tokens", "ended_share", "empty_share",
    "distinct_completions", "distinct_within", "distinct_1", "distinct_2", "repeated_3grams", "top_token_share",
    "nonfinite", "nonfinite_logprobs",
)  # fmt: skip
CERTAIN = math.log(0.99)  # a token above this log-probability is near-certain


def reward_metrics(rewards: Tensor, baseline: Tensor, advantages: Tensor) -> dict[str, float]:
    """rewards, baseline, advantages: [B, G], B prompts and G samples of each."""
    means = rewards.mean(1)
    one = len(rewards) == 1  # the spread between prompts needs two of them
    between = torch.tensor(torch.nan) if one else means.std()
    return {
        "reward_mean": rewards.mean().item(),
        "reward_se": (between / len(rewards) ** 0.5).item(),
        "reward_std_within": rewards.var(1).mean().sqrt().item(),
        "reward_std_between": between.item(),
        "baseline": baseline.mean().item(),
        "advantage_std": advantages.std(correction=0).item(),
        "zero_spread_share": zero_spread(rewards).double().mean().item(),
    }


def policy_metrics(
    logprobs: Tensor,  # [N, T] of the policy that sampled
    entropy: Tensor,  # [N, T] of the policy
    mask: Tensor,  # [N, T] True = a token of the completion
) -> dict[str, float]:
    return {
        "entropy": entropy[mask].mean().item(),
        "policy_logprob": logprobs[mask].mean().item(),
        "certain_run": longest_runs(torch.where(mask, logprobs, -torch.inf) > CERTAIN).double().mean().item(),
    }


def nonfinite_share(before: Tensor, after: Tensor) -> float:
    """Share of logprobs that are not finite, before or after an update: the latter show a last update that broke it."""
    return (~torch.isfinite(torch.cat([before, after]))).double().mean().item()


def reference_metrics(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, group: int) -> dict[str, float]:
    """Estimates of KL(policy || reference), d = log pi - log ref: k1 = d, k3 = exp(-d) - 1 + d (Schulman 2020).

    logprobs, ref_logprobs, mask: [n, T] of whole prompts, `group` completions of each.
    """
    log_ratio = (logprobs - ref_logprobs).double()
    k3 = torch.expm1(-log_ratio) + log_ratio
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
    k3 = torch.expm1(log_ratio) - log_ratio
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
    current = longest = torch.zeros(len(marked), dtype=torch.int64, device=marked.device)
    for column in marked.T:
        current = (current + 1) * column
        longest = torch.maximum(longest, current)
    return longest


def largest_gap(logprobs: Tensor, others: Tensor, mask: Tensor) -> float:
    """max |difference| in nats over the tokens of the completions. All [N, T].

    Between the sampler's and what the loss scores, rounding leaves about 1e-5; a misaligned objective or a truncated
    sampler leaves nats.
    """
    return (logprobs - others)[mask].abs().max().item()
