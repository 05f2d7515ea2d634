"""Numbers of one training step. docs/METRICS.md defines each; its columns are HISTORY_COLUMNS, in this order."""

import torch
from torch import Tensor

from pipeline.reinforce.advantages import zero_spread

HISTORY_COLUMNS = (
    "step", "reward_mean", "reward_se", "reward_std_within", "reward_std_between", "baseline", "advantage_std",
    "zero_spread_share", "loss", "entropy", "ref_kl_k1", "ref_kl_k3", "ref_kl_sequence", "ref_logprob",
    "policy_logprob", "logprob_gap", "grad_norm", "lr", "kl_coef", "clip_share", "completion_tokens",
    "ended_share", "empty_share", "distinct_completions", "distinct_within", "distinct_1", "distinct_2",
    "repeated_3grams", "top_token_share", "nonfinite",
)  # fmt: skip


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
    ref_logprobs: Tensor,  # [N, T] of the untouched checkpoint
    entropy: Tensor,  # [N, T] of the policy
    mask: Tensor,  # [N, T] True = a token of the completion
) -> dict[str, float]:
    """KL estimates are of KL(policy || reference), d = log pi - log ref: k1 = d, k3 = exp(-d) - 1 + d (Schulman 2020)."""
    log_ratio = (logprobs - ref_logprobs).double()
    k3 = torch.expm1(-log_ratio) + log_ratio
    return {
        "entropy": entropy[mask].mean().item(),
        "ref_kl_k1": log_ratio[mask].mean().item(),
        "ref_kl_k3": k3[mask].mean().item(),
        "ref_kl_sequence": log_ratio.masked_fill(~mask, 0).sum(1).mean().item(),
        "ref_logprob": ref_logprobs[mask].mean().item(),
        "policy_logprob": logprobs[mask].mean().item(),
    }


def logprob_gap(sampler_logprobs: Tensor, scored_logprobs: Tensor, mask: Tensor) -> float:
    """max |sampled - scored| in nats over the tokens of the completions; what the loss scores must be what was sampled.

    Rounding leaves about 1e-5; a misaligned objective or a truncated sampler leaves nats. All [N, T].
    """
    return (sampler_logprobs - scored_logprobs)[mask].abs().max().item()
