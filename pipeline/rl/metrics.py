"""The metrics of a training step: what each is, and how it is computed. Imports no torch, since reports read only the
definitions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Metric(NamedTuple):
    """A column of history.csv. docs/METRICS.md has its formula and what to expect of it."""

    name: str
    unit: str  # a share is shown in percent
    label: str
    meaning: str  # in words, as the report's terms and docs/METRICS.md define it
    calibrated: bool = False  # also measured without learning: a column of calibration.csv

    @property
    def title(self) -> str:
        """The label, with the unit where the label does not imply it."""
        shown = self.unit.startswith(("nats", "tokens", "bits"))
        return f"{self.label}, {self.unit.replace(' per ', ' a ')}" if shown else self.label


METRICS = {metric.name: metric for metric in (
    Metric("step", "steps", "training step", "number of the update, from 0"),
    Metric("reward_mean", "reward units", "mean reward", "mean reward of the step's completions", calibrated=True),
    Metric("reward_se", "reward units", "standard error of the mean reward",
        "standard error of the mean reward, whole prompts being the independent units", calibrated=True),
    Metric("reward_std_within", "reward units", "spread of the reward within a prompt",
        "how much the rewards of one prompt's completions differ, root of the mean variance", calibrated=True),
    Metric("reward_std_between", "reward units", "spread of the reward between prompts",
        "how much the prompts differ in reward, standard deviation of their means"),
    Metric("baseline", "reward units", "baseline",
        "mean of what is subtracted from each reward, so that a completion is compared with others"),
    Metric("advantage_std", "scaled reward units (1 where advantages are normalised)", "spread of the advantages",
        "standard deviation of the advantages, reward minus baseline, scaled and normalised where the recipe says so"),
    Metric("zero_spread_share", "share", "prompts whose samples all have the same reward",
        "share of prompts whose completions all have the same reward", calibrated=True),
    Metric("loss", "scaled reward units · nats", "loss", "the loss that was differentiated, see docs/THEORY.md"),
    Metric("entropy", "nats per token", "entropy of the policy",
        "how undecided the policy is about the next token, mean over tokens, 0 being certain", calibrated=True),
    Metric("ref_kl_k1", "nats per token", "KL to the reference (k1)",
        "KL divergence of the policy from the reference model by the estimator k1, mean log-ratio of a token"),
    Metric("ref_kl_se", "nats per token", "standard error of the KL to the reference",
        "standard error of ref_kl_k1, whole prompts being the independent units"),
    Metric("ref_kl_k3", "nats per token", "KL to the reference (k3)",
        "KL divergence of the policy from the reference model, by the estimator k3, which is never negative"),
    Metric("ref_kl_sequence", "nats per completion", "KL to the reference",
        "KL divergence of the policy from the reference model, of whole completions"),
    Metric("ref_logprob", "nats per token", "logprob by the reference",
        "how likely the reference model finds what the policy said, mean log-probability a token", calibrated=True),
    Metric("ref_bits_per_byte", "bits per byte", "bits a byte by the reference",
        "bits that the reference model needs for a byte of the texts, however they are cut into tokens",
        calibrated=True),
    Metric("ref_typicality", "nats per token", "typicality by the reference",
        "log-probability of a token by the reference model plus its entropy there, mean over the texts' tokens, "
        "0 where they surprise it as it expects", calibrated=True),
    Metric("policy_logprob", "nats per token", "logprob by the policy",
        "how likely the policy finds what it said, mean log-probability a token"),
    Metric("certain_run", "tokens", "longest certain run",
        "mean over completions of the longest row of tokens whose probability is above 0.99"),
    Metric("logprob_gap", "nats", "largest |sampled − scored| logprob",
        "largest difference of a token's log-probability between sampling and the loss"),
    Metric("truncation_gap", "nats", "largest |sampled − full softmax| logprob",
        "largest difference of a token's log-probability that top-k and top-p alone make"),
    Metric("grad_norm", "scaled reward units · nats per unit of parameter", "gradient norm before clipping",
        "L2 norm of the gradient over all parameters, before clipping"),
    Metric("grad_snr", "ratio", "signal over noise of the gradient", "signal over noise of the batch's gradient"),
    Metric("update_kl", "nats per token", "change by one update",
        "how far one update moved the policy, KL divergence by the estimator k3"),
    Metric("update_kl_se", "nats per token", "standard error of the change by one update",
        "standard error of update_kl, as ref_kl_se"),
    Metric("relative_update", "ratio", "change of the weights by one update, relative",
        "size of the weights' change in the batch's first update, relative to their own"),
    Metric("lr", "per step", "learning rate", "learning rate of this update, after warm-up and decay"),
    Metric("kl_coef", "scaled reward units per nat", "factor of the KL term",
        "factor on the KL term in this step; moves only where the recipe has a kl_target"),
    Metric("clip_share", "share", "tokens whose importance ratio was clipped",
        "share of the tokens in the loss whose importance ratio was clipped, in the batch's last update"),
    Metric("completion_tokens", "tokens", "length of a completion",
        "mean length of a completion, up to and including the first EOS, or the token that completes a stop string",
        calibrated=True),
    Metric("ended_share", "share", "completions that end with EOS",
        "share of completions that hold an EOS within the limit", calibrated=True),
    Metric("stopped_share", "share", "completions that a stop string ends",
        "share of completions that a stop string of the recipe ends"),
    Metric("limit_share", "share", "completions cut off at the limit",
        "share of completions that neither an EOS nor a stop string ends within the limit"),
    Metric("empty_share", "share", "empty completions",
        "share of completions whose text without special tokens is empty or white space", calibrated=True),
    Metric("distinct_completions", "share", "different completions",
        "different texts of the batch, as a share of its completions", calibrated=True),
    Metric("distinct_within", "share", "different completions of a prompt",
        "different texts of a prompt, as a share of its completions, mean over prompts", calibrated=True),
    Metric("distinct_1", "share", "different tokens", "different tokens of the batch, as a share of all its tokens"),
    Metric("distinct_2", "share", "different token pairs",
        "different token pairs of the batch, as a share of all its token pairs"),
    Metric("repeated_3grams", "share", "repeated 3-grams",
        "share of a completion's 3-grams that it has said before, mean over completions", calibrated=True),
    Metric("top_token_share", "share", "share of the most frequent token",
        "share of the batch's completion tokens that are the most frequent one, EOS left out", calibrated=True),
    Metric("nonfinite", "0 or 1", "loss or gradient not finite (1 = yes)",
        "1 if loss or gradient was not finite and the update was not applied, else 0"),
    Metric("nonfinite_logprobs", "share", "tokens whose logprob is not finite",
        "share of the completions' log-probabilities that are not finite"),
)}  # fmt: skip
HISTORY_COLUMNS = tuple(METRICS)
# measured on the same completions with their tokens shuffled: the cost of broken text by this reference
SHUFFLED = {"ref_bits_per_byte": "shuffled_bits_per_byte", "ref_typicality": "shuffled_typicality"}
CALIBRATION_COLUMNS = (
    "batch", *(metric.name for metric in METRICS.values() if metric.calibrated), *SHUFFLED.values(),
)  # fmt: skip
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
    """[B] True = all samples of the prompt have the same reward: they teach nothing under a group baseline."""
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
    """Share of the completions' logprobs, before and after an update, that are not finite. The logprobs after it show
    whether a run's last update broke the policy."""
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


def text_cost(logprobs: Tensor, entropy: Tensor, texts: Sequence[str]) -> dict[str, float]:
    """Cost of texts by the model that gave logprobs and entropy, in nats, both [K], of all tokens of the texts.

    ref_bits_per_byte: -sum log2 p over all tokens / UTF-8 bytes of all texts, the unit of language modelling. Unlike
    the mean over tokens, it does not fall where a text is cut into more and shorter tokens. ref_typicality: mean over
    tokens of log p + H (Meister et al., arXiv 2202.00666). Empty texts add nothing; NaN if all texts are empty.
    """
    size = sum(len(text.encode()) for text in texts)
    nats = -logprobs.double().sum().item()
    return {
        "ref_bits_per_byte": nats / math.log(2) / size if size else math.nan,
        "ref_typicality": (logprobs + entropy).double().mean().item(),
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

    Between the logprobs of the sampler and of the loss, rounding leaves a gap of about 1e-5. A misaligned objective or
    a truncated sampler leaves whole nats.
    """
    return (logprobs - others)[mask].abs().max().item()
