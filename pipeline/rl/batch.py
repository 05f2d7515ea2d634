"""One batch: B prompts, G samples of each, N = B * G completions of up to T tokens, their rewards and statistics."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.config.schema import Recipe, SamplingParams
from pipeline.data.prompts import Prompt
from pipeline.diagnosis.text import ending_shares, text_statistics
from pipeline.models.memory import bf16_copy
from pipeline.models.rollout import completion_limits, completion_texts, read_completions
from pipeline.models.sampling import Rollout, pad_prompts, sample
from pipeline.models.scoring import Scores, score_microbatched
from pipeline.models.stop_strings import stop_check
from pipeline.models.tokenization import encode_prompt
from pipeline.rewards.batch import RewardBatch
from pipeline.rl.context import TrainContext
from pipeline.rl.metrics import text_cost


@dataclass(frozen=True)
class Groups:
    """G completions of each of B prompts with their rewards."""

    indices: list[int]  # [B] places of the prompts among the training prompts
    prompts: list[Prompt]  # [B]
    rollout: Rollout  # [B * G]
    completions: list[str]  # [B * G] texts as the reward reads them
    rewards: Tensor  # [B, G]
    terms: Tensor  # [K, B, G] scores by the K terms of a sum


def sample_batch(
    prompts: Sequence[Prompt],
    context: TrainContext,
    policy: PreTrainedModel,
    uniforms: Tensor,
    sampling_params: SamplingParams | None = None,
) -> Rollout:
    """Samples G = N / B completions of each of B prompts, for `uniforms` [N, T]. Each process samples its share.
    sampling_params: None takes the recipe's."""
    params, device = context.params, context.device
    recipe, group = params.selected_recipe, len(uniforms) // len(prompts)
    ids = [encode_prompt(context.tokenizer, prompt.content, params.selected_model.chat) for prompt in prompts]
    prompt_ids, prompt_mask = pad_prompts(ids, context.eos[0], device)
    limits = completion_limits([len(p) for p in ids], params.train.max_tokens, recipe.length_limit)
    mine, rows = context.processes.shard_slice(len(prompts)), context.processes.group_slice(len(uniforms), group)
    rollout = sample(
        bf16_copy(policy) if recipe.precision == "bfloat16" else policy,
        prompt_ids[mine],
        prompt_mask[mine],
        limits[mine].to(device),
        uniforms[rows].to(device),
        context.eos,
        sampling_params or recipe.sampling_params,
        context.layout.sampling,
        stop_check(context.tokenizer, recipe.stop_strings),
    )
    gather = context.processes.gather
    return Rollout(
        prompt_ids.repeat_interleave(group, 0),
        prompt_mask.repeat_interleave(group, 0),
        gather(rollout.completions, context.eos[0]),
        gather(rollout.lengths),
        gather(rollout.sampler_logprobs),
        gather(rollout.logprobs),
    )


def reward_batch(
    prompts: Sequence[Prompt], rollout: Rollout, context: TrainContext, step: int = 0
) -> tuple[list[str], Tensor, Tensor]:
    """Returns the texts [N] as the reward reads them, their rewards [B, G] in float64, and the scores [K, B, G] by the
    K terms of a sum, NaN where a term gives none. K is 0 for other rewards.

    Each process scores the completions of its own prompts. step: number of updates that the policy has had.
    """
    recipe, group = context.params.selected_recipe, len(rollout.lengths) // len(prompts)
    completions = completion_texts(
        rollout, context.tokenizer, recipe.special_tokens, group, context.eos, recipe.stop_strings
    )
    repeated = [prompt for prompt in prompts for _ in range(group)]
    rows = context.processes.group_slice(len(completions), group)
    asked = RewardBatch(repeated[rows], completions[rows], rollout.token_lists()[rows], step)
    scored = context.reward.score(asked)
    values = torch.tensor([scored.rewards, *scored.terms], dtype=torch.float64, device=context.device)
    every = context.processes.gather(values.T).T.reshape(len(values), len(prompts), group)
    return completions, every[0], every[1:]


def score_batch(model: PreTrainedModel, rollout: Rollout, context: TrainContext) -> Scores:
    """Scores completions by a model, in the recipe's precision, without gradient. Each process scores its share."""
    recipe = context.params.selected_recipe
    rows = torch.arange(len(rollout.lengths), device=context.device)[
        context.processes.shard_slice(len(rollout.lengths))
    ]
    nothing = torch.zeros(0, rollout.completions.shape[1], device=context.device)
    scores = Scores(nothing, nothing, nothing)
    if len(rows):  # there may be more processes than rows
        with half_precision(recipe, context.device):
            scores = score_microbatched(
                model, rollout.take(rows), context.params.train.micro_batch, recipe.temperature, context.layout.packing
            )
    gather = context.processes.gather
    return Scores(gather(scores.logprobs), gather(scores.scored), gather(scores.entropy))


def rollout_metrics(rollout: Rollout, context: TrainContext) -> dict[str, float]:
    """Statistics of the completions as texts and tokens."""
    group, ends = context.params.train.samples_per_prompt, (context.eos, context.params.selected_recipe.stop_strings)
    plain = completion_texts(rollout, context.tokenizer, "strip", group, *ends)
    read = read_completions(rollout, context.tokenizer, *ends)
    return {
        **text_statistics(plain, [completion.tokens for completion in read], group),
        **ending_shares([completion.ending for completion in read]),
        "completion_tokens": rollout.lengths.double().mean().item(),
    }


def text_costs(
    rollout: Rollout, scores: Scores, context: TrainContext, texts: list[str] | None = None
) -> dict[str, float]:
    """`text_cost` of completions by the model that scored them. texts: their bytes count; None: the completions'."""
    eos = context.eos
    if texts is None:
        texts = completion_texts(rollout, context.tokenizer, "strip", 1, eos)
    mask = rollout.text_mask(eos)
    return text_cost(scores.logprobs[mask], scores.entropy[mask], texts)


def half_precision(recipe: Recipe, device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 where the recipe says so; the weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16")
