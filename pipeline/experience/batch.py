"""One batch: B prompts, G samples of each, N = B * G completions of up to T tokens, their rewards and statistics."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.diagnostics.text import text_statistics
from pipeline.experience.setting import Setting
from pipeline.io.artifacts import finite_or_none
from pipeline.params import Recipe
from pipeline.policy.memory import half_copy
from pipeline.policy.rollout import completion_limits, completion_texts, completion_tokens
from pipeline.policy.sampling import Rollout, pad_prompts, sample
from pipeline.policy.scoring import Scores, score_whole
from pipeline.policy.tokenization import encode_prompt

PROMPTS_KEPT, SAMPLES_KEPT = 4, 2  # of a step in samples.jsonl


def sample_batch(
    prompts: list[str], setting: Setting, policy: PreTrainedModel, noise: Tensor, top_k: int, top_p: float
) -> Rollout:
    """Completions of B prompts, as many of each as `noise` [N, T] has rows for it; each process samples its share."""
    params, device = setting.params, setting.device
    recipe, group = params.selected("recipe"), len(noise) // len(prompts)
    ids = [encode_prompt(setting.tokenizer, prompt) for prompt in prompts]
    prompt_ids, prompt_mask = pad_prompts(ids, setting.eos[0], device)
    limits = completion_limits([len(p) for p in ids], params.train.max_tokens, recipe.length_limit)
    mine, rows = setting.processes.part(len(prompts)), setting.processes.rows(len(noise), group)
    rollout = sample(
        half_copy(policy) if recipe.precision == "bfloat16" else policy,
        prompt_ids[mine],
        prompt_mask[mine],
        limits[mine].to(device),
        noise[rows].to(device),
        setting.eos,
        recipe.temperature,
        top_k,
        top_p,
        setting.layout.sampling,
    )
    gather = setting.processes.gather
    return Rollout(
        prompt_ids.repeat_interleave(group, 0), prompt_mask.repeat_interleave(group, 0),
        gather(rollout.completions, setting.eos[0]), gather(rollout.lengths), gather(rollout.sampler_logprobs),
        gather(rollout.logprobs),
    )  # fmt: skip


def reward_batch(prompts: list[str], rollout: Rollout, setting: Setting) -> tuple[list[str], Tensor]:
    """Texts [N] as the recipe shows them to the reward, and their rewards [B, G] in float64, for B prompts.

    Each process asks the reward about the completions of its own prompts.
    """
    recipe, group = setting.params.selected("recipe"), len(rollout.lengths) // len(prompts)
    completions = completion_texts(rollout, setting.tokenizer, recipe.special_tokens, group, setting.eos)
    repeated = [prompt for prompt in prompts for _ in range(group)]
    rows = setting.processes.rows(len(completions), group)
    rewards = torch.tensor(
        setting.reward(repeated[rows], completions[rows]), dtype=torch.float64, device=setting.device
    )
    return completions, setting.processes.gather(rewards).view(-1, group)


def score_batch(model: PreTrainedModel, rollout: Rollout, setting: Setting) -> Scores:
    """What a model says of completions, each process of its share; in the recipe's precision, without gradient."""
    recipe = setting.params.selected("recipe")
    rows = torch.arange(len(rollout.lengths), device=setting.device)[setting.processes.part(len(rollout.lengths))]
    nothing = torch.zeros(0, rollout.completions.shape[1], device=setting.device)
    scores = Scores(nothing, nothing, nothing)
    if len(rows):  # there may be more processes than rows
        with half_precision(recipe, setting.device):
            scores = score_whole(
                model, rollout.take(rows), setting.params.train.micro_batch, recipe.temperature, setting.layout.packing
            )
    gather = setting.processes.gather
    return Scores(gather(scores.logprobs), gather(scores.scored), gather(scores.entropy))


def rollout_metrics(rollout: Rollout, setting: Setting) -> dict[str, float]:
    """Statistics of the completions as texts and tokens."""
    group, eos = setting.params.train.samples_per_prompt, setting.eos
    plain = completion_texts(rollout, setting.tokenizer, "strip", group, eos)
    return {
        **text_statistics(plain, completion_tokens(rollout, eos), group),
        "completion_tokens": rollout.lengths.double().mean().item(),
        "ended_share": rollout.ended(eos).double().mean().item(),
    }


def half_precision(recipe: Recipe, device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 where the recipe says so; the weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16")


def sample_rows(
    step: int, prompts: list[str], completions: list[str], rewards: Tensor, advantage: Tensor, rollout: Rollout,
    logprobs: Tensor, setting: Setting,
) -> list[dict[str, Any]]:  # fmt: skip
    """The first completions of the first prompts [B], as rows of samples.jsonl."""
    group, ended, rows = rewards.shape[1], rollout.ended(setting.eos), []
    for b in range(min(PROMPTS_KEPT, len(prompts))):
        for g in range(min(SAMPLES_KEPT, group)):
            i = b * group + g
            tokens = rollout.completions[i, : int(rollout.lengths[i])].tolist()
            rows.append({
                "step": step, "prompt": prompts[b], "completion": completions[i], "reward": rewards[b, g].item(),
                "advantage": finite_or_none(advantage[b, g].item()), "tokens": tokens,
                "pieces": [setting.tokenizer.decode([token]) for token in tokens],
                "token_logprobs": [finite_or_none(x) for x in logprobs[i, : len(tokens)].tolist()],
                "ended": bool(ended[i]),
            })  # fmt: skip
    return rows
