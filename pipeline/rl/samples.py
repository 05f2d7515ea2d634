"""The completions of a step with their rewards, advantages and logprobs, as rows of files.

B prompts, G samples of each, N = B * G completions of up to T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pipeline.file_io import finite_or_none
from pipeline.models.rollout import Completion, read_completions
from pipeline.rl.batch import Groups
from pipeline.rl.context import TrainContext

PROMPTS_KEPT, SAMPLES_KEPT = 4, 2  # of each step, in samples.jsonl


@dataclass(frozen=True)
class StepSamples:
    """The completions of a step, prompt by prompt, with the logprobs of the policy that sampled them."""

    step: int
    groups: Groups
    advantages: Tensor  # [B, G]
    logprobs: Tensor  # [N, T]
    ref_rows: Tensor  # [n] which of the N the reference has scored
    ref_log_ratios: Tensor  # [n] log pi(y | x) - log pi_ref(y | x), nats


def first_samples(samples: StepSamples, context: TrainContext) -> list[dict[str, Any]]:
    """The first completions of the first prompts, as rows of samples.jsonl. If the reward is a sum, each row holds the
    weighted terms, which add up to the reward."""
    groups, weights, rows = samples.groups, context.reward.weights, []
    group = groups.rewards.shape[1]
    read = _read(samples, context)
    for b in range(min(PROMPTS_KEPT, len(groups.prompts))):
        for g in range(min(SAMPLES_KEPT, group)):
            i = b * group + g
            tokens = groups.rollout.completions[i, : int(groups.rollout.lengths[i])].tolist()
            rows.append({
                "step": samples.step, "prompt": groups.prompts[b].text, "completion": groups.completions[i],
                "reward": groups.rewards[b, g].item(), "advantage": finite_or_none(samples.advantages[b, g].item()),
                "tokens": tokens, "pieces": [context.tokenizer.decode([token]) for token in tokens],
                "token_logprobs": [finite_or_none(x) for x in samples.logprobs[i, : len(tokens)].tolist()],
                "ended": read[i].ending != "limit",
                **({"terms": weighted_terms(groups.terms[:, b, g].tolist(), weights)} if weights else {}),
            })  # fmt: skip
    return rows


def sample_columns(samples: StepSamples, context: TrainContext) -> dict[str, list[Any]]:
    """All completions [N] of the step, as columns of all.parquet (`runs.sample_files.schema`)."""
    groups = samples.groups
    tokens, group = groups.rollout.token_lists(), groups.rewards.shape[1]
    places = [(b, g) for b in range(len(groups.prompts)) for g in range(group)]
    pieces = {token: context.tokenizer.decode([token]) for token in {token for row in tokens for token in row}}
    weights = context.reward.weights
    terms = [weighted_terms(groups.terms[:, b, g].tolist(), weights) if weights else None for b, g in places]
    ratios = dict(zip(samples.ref_rows.tolist(), samples.ref_log_ratios.tolist(), strict=True))
    return {
        "step": [samples.step] * len(tokens),
        "prompt_index": [groups.indices[b] for b, _ in places],
        "group": [b for b, _ in places],
        "sample": [g for _, g in places],
        "prompt": [groups.prompts[b].text for b, _ in places],
        "completion": groups.completions,
        "reward": groups.rewards.flatten().tolist(),
        "terms": terms,
        "advantage": samples.advantages.flatten().tolist(),
        "ending": [completion.ending for completion in _read(samples, context)],
        "ref_log_ratio": [ratios.get(i) for i in range(len(tokens))],
        "tokens": tokens,
        "pieces": [[pieces[token] for token in row] for row in tokens],
        "token_logprobs": [row[: len(ids)] for row, ids in zip(samples.logprobs.tolist(), tokens, strict=True)],
    }


def weighted_terms(values: Sequence[float], weights: Mapping[str, float]) -> dict[str, float | None]:
    """What each term adds to the reward of a completion, by the term's name; None where the term gives no score."""
    return {name: finite_or_none(weight * value) for (name, weight), value in zip(weights.items(), values, strict=True)}


def _read(samples: StepSamples, context: TrainContext) -> list[Completion]:
    ends = context.eos, context.params.selected_recipe.stop_strings
    return read_completions(samples.groups.rollout, context.tokenizer, *ends)
