"""Sample the reference model before training, to estimate each metric's mean and variance without learning."""

import dataclasses
from collections.abc import Iterable, Sequence

import torch

from pipeline.models.rollout import completion_texts
from pipeline.models.sampling import Rollout
from pipeline.models.scoring import Scores
from pipeline.rl.batch import reward_batch, rollout_metrics, sample_batch, score_batch, text_costs
from pipeline.rl.context import TrainContext
from pipeline.rl.metrics import CALIBRATION_COLUMNS, SHUFFLED, policy_metrics, reward_metrics
from pipeline.rl.seeding import draw_prompts, draw_uniforms, generator
from pipeline.rl.terms import signals, std_within


def calibrate(context: TrainContext, batches: Iterable[int] | None = None) -> list[dict[str, float]]:
    """Rows of calibration.csv. batches: their numbers, in an iterable that may show progress; None takes all."""
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
        # as many completions as a step scores with the reference: fewer have a larger variance
        rows = slice(len(noise) if recipe.kl != "none" else sizes.kl_probe_prompts * sizes.samples_per_prompt)
        scored = rollout.take(torch.arange(len(noise), device=context.device)[rows])
        shuffled = shuffle_tokens(scored, context.eos, generator(params.seed, batch, "shuffle"))
        shuffled_scores = score_batch(reference, shuffled, context)
    _, rewards, terms = reward_batch(prompts, rollout, context)
    nothing = torch.zeros_like(rewards)  # no baseline, no advantages: nothing is learnt
    mask = rollout.completion_mask
    ref_scores = Scores(scores.logprobs[rows], scores.scored[rows], scores.entropy[rows])
    texts = completion_texts(scored, context.tokenizer, "strip", 1, context.eos)
    broken = text_costs(shuffled, shuffled_scores, context, texts)
    measured = {
        **reward_metrics(rewards, nothing, nothing),
        **policy_metrics(scores.logprobs, scores.entropy, mask),
        **rollout_metrics(rollout, context),
        **text_costs(scored, ref_scores, context, texts),
        **{column: broken[name] for name, column in SHUFFLED.items()},
        "batch": batch, "ref_logprob": ref_scores.logprobs[mask[rows]].mean().item(),
    }  # fmt: skip
    row = {column: measured[column] for column in CALIBRATION_COLUMNS}
    if context.reward.combine == "normalized":
        row["signal_std_within"] = std_within(signals(terms, context.reward.weights, "normalized").sum(0))
    return row


def shuffle_tokens(rollout: Rollout, eos: Sequence[int], generator: torch.Generator) -> Rollout:
    """The same completions with the tokens of each text in random order; its EOS stays in place. The result has as many
    tokens and bytes of the same kind, but is no language."""
    completions, sizes = rollout.completions.clone(), rollout.text_mask(eos).sum(1).tolist()
    for row, size in enumerate(sizes):
        order = torch.randperm(size, generator=generator).to(completions.device)
        completions[row, :size] = completions[row, :size][order]
    return dataclasses.replace(rollout, completions=completions)
