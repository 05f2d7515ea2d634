"""Metrics in words, and numbers as text that says its unit."""

import math

from pipeline.report.style import signed

MEANING = {  # of the columns of history.csv that a verdict can rest on; docs/METRICS.md has the formulas
    "reward_mean": "mean reward",
    "reward_std_within": "spread of the reward within a prompt",
    "reward_std_between": "spread of the reward between prompts",
    "advantage_std": "spread of the advantages",
    "zero_spread_share": "prompts whose samples all have the same reward",
    "loss": "loss",
    "entropy": "entropy of the policy, nats a token",
    "ref_kl_k1": "KL to the checkpoint, nats a token",
    "ref_kl_k3": "KL to the checkpoint (k3), nats a token",
    "ref_kl_sequence": "KL to the checkpoint, nats a completion",
    "ref_logprob": "logprob by the checkpoint, nats a token",
    "policy_logprob": "logprob by the policy, nats a token",
    "certain_run": "longest row of certain tokens",
    "logprob_gap": "largest |sampled − scored| logprob, nats",
    "grad_norm": "gradient norm before clipping",
    "grad_snr": "signal over noise of the gradient",
    "update_kl": "change by one update, nats a token",
    "relative_update": "change of the weights by one update, relative",
    "clip_share": "tokens whose importance ratio was clipped",
    "completion_tokens": "length of a completion, tokens",
    "ended_share": "completions that end by themselves",
    "empty_share": "empty completions",
    "distinct_completions": "different completions",
    "distinct_within": "different completions of a prompt",
    "distinct_1": "different tokens",
    "distinct_2": "different token pairs",
    "repeated_3grams": "repeated 3-grams",
    "top_token_share": "share of the most frequent token",
    "nonfinite": "loss or gradient not finite (1 = yes)",
    "nonfinite_logprobs": "tokens whose logprob is not finite",
}
SHARES = (
    "zero_spread_share", "clip_share", "ended_share", "empty_share", "distinct_completions", "distinct_within",
    "distinct_1", "distinct_2", "repeated_3grams", "top_token_share", "nonfinite_logprobs",
)  # fmt: skip


def measured(value: float | None, metric: str) -> str:
    """A value of the metric: shares in percent, everything else as a number; what is not finite is undefined."""
    if value is not None and not math.isfinite(value):
        value = None
    return percent(value) if metric in SHARES else signed(value)


def percent(share: float | None) -> str:
    return "undefined" if share is None else f"{100 * share:.1f}%"
