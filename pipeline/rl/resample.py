"""Dynamic sampling: replaces groups whose rewards are all the same (DAPO, arXiv 2503.14476, section 3.2)."""

import dataclasses

import torch
from torch.nn.functional import pad

from pipeline.models.sampling import Rollout
from pipeline.rl.batch import Groups, reward_batch, sample_batch
from pipeline.rl.context import TrainContext
from pipeline.rl.metrics import zero_spread
from pipeline.rl.seeding import draw_prompts, draw_uniforms


def replace_flat_groups(groups: Groups, context: TrainContext, step: int) -> tuple[Groups, int]:
    """Replaces flat groups, whose rewards are all the same, by groups of other prompts whose rewards differ.

    Flat groups teach nothing under a group baseline. The batch's first flat group is replaced by the first such group
    that is drawn, and so on.

    Each of `resample_rounds` rounds draws one prompt from all for every group that is still flat. Groups that are flat
    after the last round stay. Returns the groups, and how many completions were sampled to replace them.
    """
    sampled, group = 0, groups.rewards.shape[1]
    for attempt in range(context.params.selected_recipe.resample_rounds):
        flat = zero_spread(groups.rewards).nonzero().flatten().tolist()
        if not flat:
            break
        # every process needs a prompt
        drawn = draw_groups(max(len(flat), context.processes.world_size), attempt, context, step)
        sampled += drawn.rewards.numel()
        found = (~zero_spread(drawn.rewards[: len(flat)])).nonzero().flatten().tolist()
        source = list(range(len(groups.prompts)))
        for place, new in zip(flat, found, strict=False):
            source[place] = len(groups.prompts) + new
        groups = _chosen(groups, drawn, source, group, context.eos[0])
    return groups, sampled


def draw_groups(count: int, attempt: int, context: TrainContext, step: int) -> Groups:
    """Groups of `count` prompts, each drawn from all prompts. The first groups are the same whatever the count."""
    params, purpose = context.params, f"resample {attempt}"
    sizes = params.train
    most = max(sizes.prompts_per_step, count)
    indices = draw_prompts(params.seed, step, most, len(context.prompts), "replacement", purpose)[:count]
    prompts = [context.prompts[i] for i in indices]
    uniforms = draw_uniforms(params.seed, step, purpose, most * sizes.samples_per_prompt, sizes.max_tokens)
    rollout = sample_batch(prompts, context, context.rollout_model, uniforms[: count * sizes.samples_per_prompt])
    return Groups(indices, prompts, rollout, *reward_batch(prompts, rollout, context, step))


def _chosen(first: Groups, second: Groups, source: list[int], group: int, filler: int) -> Groups:
    """The groups at the places `source` of the sequence `first`, then `second`."""
    rows = [place * group + g for place in source for g in range(group)]
    prompts, texts = first.prompts + second.prompts, first.completions + second.completions
    rollout = joined(first.rollout, second.rollout, filler)
    return Groups(
        [(first.indices + second.indices)[place] for place in source],
        [prompts[place] for place in source],
        rollout.take(torch.tensor(rows, device=rollout.lengths.device)),
        [texts[row] for row in rows],
        torch.cat([first.rewards, second.rewards])[source],
        torch.cat([first.terms, second.terms], dim=1)[:, source],
    )


def joined(first: Rollout, second: Rollout, filler: int) -> Rollout:
    """`first`, then `second`. Prompts are padded on the left, all else on the right; ids are padded with `filler`."""
    parts = {}
    for field in dataclasses.fields(Rollout):
        pair = [getattr(rollout, field.name) for rollout in (first, second)]
        if field.name != "lengths":
            width, value = max(part.shape[1] for part in pair), filler if pair[0].dtype == torch.long else 0
            gaps = [(width - part.shape[1], 0) for part in pair]
            sides = gaps if field.name.startswith("prompt") else [gap[::-1] for gap in gaps]
            pair = [pad(part, side, value=value) for part, side in zip(pair, sides, strict=True)]
        parts[field.name] = torch.cat(pair)
    return Rollout(**parts)
