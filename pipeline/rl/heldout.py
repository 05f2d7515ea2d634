"""The held-out curve: one completion of each held-out prompt, every `evaluate.every` steps, and the best step by it.

One completion a prompt: at the same cost, more prompts tell more than more samples per prompt. Each prompt has its own
random numbers, the same at every step, so that steps differ only by their policies. Nothing here changes the random
numbers of training.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from pipeline.diagnosis.bootstrap import interval, mean
from pipeline.diagnosis.calibration import Row, Spread
from pipeline.diagnosis.thresholds import THRESHOLDS, Thresholds
from pipeline.diagnosis.verdict import Finding, confirmed_healthy_steps, findings
from pipeline.file_io import finite_or_none
from pipeline.models.rollout import completion_texts
from pipeline.rl.batch import reward_batch, sample_batch, score_batch
from pipeline.rl.context import TrainContext
from pipeline.rl.seeding import draw_uniforms, generator

RESAMPLES = 2000  # bootstrap resamples of the prompts, for the interval of data/best


def measure(context: TrainContext, step: int) -> list[dict[str, Any]]:
    """Rows of heldout.jsonl: the policy after `step` updates. Collective call."""
    prompts, most = context.heldout, context.params.train.prompts_per_step * context.params.train.samples_per_prompt
    parts = -(-len(prompts) // most)  # each no larger than the batch of a step
    ends = [len(prompts) * part // parts for part in range(parts + 1)]
    return [row for start, end in itertools.pairwise(ends) for row in _measure(context, step, start, end)]


def _measure(context: TrainContext, step: int, start: int, end: int) -> list[dict[str, Any]]:
    """The rows of the prompts `start` to `end` - 1.

    kl: log pi(y | x) - log pi_ref(y | x), whose mean estimates the KL of whole completions (k1). text_*: sums over the
    tokens of the text, without EOS, from which `diagnosis.curve` computes bits a byte and typicality.
    """
    params, prompts = context.params, list(context.heldout[start:end])
    uniforms = torch.cat([
        draw_uniforms(params.seed, place, "heldout", 1, params.train.max_tokens) for place in range(start, end)
    ])  # fmt: skip
    rollout = sample_batch(prompts, context, context.rollout_model, uniforms)
    completions, rewards, _ = reward_batch(prompts, rollout, context)
    with context.reference() as reference:
        scores = score_batch(reference, rollout, context)
    texts = completion_texts(rollout, context.tokenizer, "strip", 1, context.eos)
    mask, text = rollout.completion_mask, rollout.text_mask(context.eos)
    logprobs, ref_logprobs, ref_entropy = (x.double() for x in (rollout.logprobs, scores.logprobs, scores.entropy))
    sums = {
        "kl": (logprobs - ref_logprobs).masked_fill(~mask, 0),
        "ref_logprob": ref_logprobs.masked_fill(~mask, 0),
        "text_ref_logprob": ref_logprobs.masked_fill(~text, 0),
        "text_ref_entropy": ref_entropy.masked_fill(~text, 0),
    }
    token_ids = rollout.token_lists()
    totals = {name: values.sum(1).tolist() for name, values in sums.items()}
    counts = {"tokens": rollout.lengths.tolist(), "text_tokens": text.sum(1).tolist()}
    return [
        {
            "step": step, "prompt": prompt.text, "completion": completions[i], "reward": rewards[i, 0].item(),
            **{name: finite_or_none(values[i]) for name, values in totals.items()},
            **{name: values[i] for name, values in counts.items()}, "text_bytes": len(texts[i].encode()),
            "completion_ids": token_ids[i],
        }
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip


def record_steps(rows: Sequence[dict[str, Any]]) -> list[int]:
    """The measured steps whose reward is above that of all earlier measured steps. A step's reward is its mean over the
    prompts at even places, the half that chooses. Step 0 is always one; a later step is none if its KL is not finite.

    rows: of heldout.jsonl.
    """
    best, found = -math.inf, []
    for step, measured in rows_by_step(rows).items():
        half = mean([row["reward"] for row in measured[::2]])
        finite = all(row["kl"] is not None for row in measured)
        if step == 0 or (finite and half > best):
            best = half
            found.append(step)
    return found


def rows_by_step(rows: Sequence[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["step"], []).append(row)
    return found


def candidate_steps(
    rows: Sequence[dict[str, Any]], found: Sequence[Finding], done: int, thresholds: Thresholds = THRESHOLDS
) -> set[int]:
    """The steps whose policies may still become the best one, after `done` steps: the best of the steps confirmed
    healthy, and better later steps, which a collapse may still include. Step 0 needs no stored policy."""
    healthy = confirmed_healthy_steps(found, done, thresholds)
    records = _before_collapse(rows, found)
    known = [step for step in records if step == 0 or step < healthy]
    return {*known[-1:], *records[len(known) :]} - {0}


def needed_candidates(
    rows: Sequence[dict[str, Any]],
    history: Sequence[Row],
    states: Iterable[int],
    spreads: dict[str, Spread],
    steps: int,
) -> set[int]:
    """The steps whose policies a run may need when it resumes from any of the states. A resumed run measures later
    steps again, and the numbers may differ in the last digits.

    states: steps done in each. rows: of heldout.jsonl. history: of history.csv. steps: planned length of the run.
    """
    needed: set[int] = set()
    for done in states:
        found = findings(history[:done], spreads, steps)
        needed |= candidate_steps([row for row in rows if row["step"] <= done], found, done)
    return needed


def best_step(rows: Sequence[dict[str, Any]], found: Sequence[Finding]) -> int:
    """The best measured step before any collapse; the earliest of equal ones. `starved` is no collapse here: nothing
    was learnt, and nothing is broken."""
    return _before_collapse(rows, found)[-1]


def _before_collapse(rows: Sequence[dict[str, Any]], found: Sequence[Finding]) -> list[int]:
    onset = min((finding.onset for finding in found if finding.kind != "starved"), default=math.inf)
    return [step for step in record_steps(rows) if step == 0 or step < onset]


def best_report(rows: Sequence[dict[str, Any]], step: int, seed: int) -> dict[str, Any]:
    """Contents of best.json: the best step's mean reward on the half of the prompts that chose it, and its difference
    to step 0 on the other half. The mean on the first half is too high, being the maximum of several noisy means."""
    start, best = ([row["reward"] for row in rows_by_step(rows)[at]] for at in (0, step))
    chosen, reported = best[::2], torch.tensor([best[1::2], start[1::2]], dtype=torch.float64)
    prompts = reported.shape[1]
    indices = torch.randint(prompts, (RESAMPLES, prompts), generator=generator(seed, 0, "bootstrap"))
    return {
        "chosen_on": {"prompts": len(chosen), "mean": mean(chosen)},
        "reported_on": {"prompts": prompts, "difference": interval(reported[0] - reported[1], indices)},
    }
