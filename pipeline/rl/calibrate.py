"""Sample the reference model before training, to estimate each metric's mean and variance without learning."""

from collections.abc import Iterable

import torch

from pipeline.rl.batch import reward_batch, rollout_metrics, sample_batch, score_batch
from pipeline.rl.context import TrainContext
from pipeline.rl.metrics import CALIBRATION_COLUMNS, policy_metrics, reward_metrics
from pipeline.rl.seeding import draw_prompts, draw_uniforms


def calibrate(context: TrainContext, batches: Iterable[int] | None = None) -> list[dict[str, float]]:
    """Rows of calibration.csv. batches: their numbers, which a caller may show as they go by; None takes all."""
    numbers = range(context.params.train.calibration_batches) if batches is None else batches
    return [calibration_row(batch, context) for batch in numbers]


def calibration_row(batch: int, context: TrainContext) -> dict[str, float]:
    """Row of calibration.csv: a batch as in training, of prompts that the seed would draw after the last step."""
    params, recipe = context.params, context.params.selected_recipe
    sizes = params.train
    drawn = draw_prompts(
        params.seed, sizes.steps + batch, sizes.prompts_per_step, len(context.prompts), recipe.prompt_sampling
    )
    prompts = [context.prompts[i] for i in drawn]
    noise = draw_uniforms(params.seed, batch, "calibration", len(prompts) * sizes.samples_per_prompt, sizes.max_tokens)
    with context.reference() as reference:
        rollout = sample_batch(prompts, context, reference, noise)
        scores = score_batch(reference, rollout, context)
    _, rewards = reward_batch(prompts, rollout, context)
    nothing = torch.zeros_like(rewards)  # no baseline, no advantages: nothing is learnt
    mask = rollout.completion_mask
    # as many completions as a step scores with the reference: fewer have a larger variance
    scored = len(mask) if recipe.kl != "none" else sizes.kl_probe_prompts * sizes.samples_per_prompt
    measured = {
        **reward_metrics(rewards, nothing, nothing),
        **policy_metrics(scores.logprobs, scores.entropy, mask),
        **rollout_metrics(rollout, context),
        "batch": batch, "ref_logprob": scores.logprobs[:scored][mask[:scored]].mean().item(),
    }  # fmt: skip
    return {column: measured[column] for column in CALIBRATION_COLUMNS}
