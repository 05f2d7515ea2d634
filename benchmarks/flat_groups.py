"""What it saves to leave completions without advantage out of the backward pass: a gradient beside that of all rows.

python -m benchmarks.flat_groups   # the table of docs/SPEED.md; minutes on two free cores

Pythia-70M's shape, a batch of 32 prompts x 8 completions; the advantages of randomly chosen groups are zero. Both
gradients in turn, medians of three.
"""

import dataclasses
import random
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from transformers import PreTrainedModel

from benchmarks import material
from pipeline.config.load import load_params
from pipeline.config.schema import Recipe
from pipeline.distributed.device import configure_torch
from pipeline.models.sampling import pad_prompts, sample
from pipeline.report.table import markdown_table
from pipeline.rl import update
from pipeline.rl.loss import LossNormalizers
from pipeline.rl.micro_batch import Batch

SHAPE = "pythia-70m"
PROMPTS, SAMPLES, TOKENS, MICRO_BATCH, ROUNDS = 32, 8, 20, 64, 3
SHARES = (0.0, 0.25, 0.5, 0.75)


def main() -> None:
    device = configure_torch("cpu", 2)
    policy = material.policy(SHAPE)
    batch = whole_batch(policy, device)
    rows = {}
    for precision in ("float32", "bfloat16"):
        recipe = load_params().recipes["rloo"].model_copy(update={"precision": precision})
        rows[precision] = [saving(policy, with_flat_groups(batch, share), recipe) for share in SHARES]
    table = [["precision", *(f"{share:.0%} without advantage" for share in SHARES)]]
    table += [[precision, *(f"{ratio:.0%}" for ratio in ratios)] for precision, ratios in rows.items()]
    print(markdown_table(table), end="")


def whole_batch(policy: PreTrainedModel, device: torch.device) -> Batch:
    """Completions that the policy sampled, with advantages that are never zero."""
    tokenizer, prompts = material.tokenizer()[0], material.prompts()[0]
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts[:PROMPTS]]
    uniforms = torch.rand(PROMPTS * SAMPLES, TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    limits = torch.tensor([max(1, TOKENS - len(prompt)) for prompt in ids])
    rollout = sample(policy, *pad_prompts(ids, 0, device), limits, uniforms, (tokenizer.eos_token_id,))
    mask = rollout.completion_mask
    normalizers = LossNormalizers(len(mask), int(mask.sum()), TOKENS)
    return Batch(rollout, torch.tensor([1.0, -1.0]).repeat(len(mask) // 2), mask, None, normalizers)


def with_flat_groups(batch: Batch, share: float) -> Batch:
    flat = torch.zeros(PROMPTS, dtype=torch.bool)
    flat[random.Random(0).sample(range(PROMPTS), round(share * PROMPTS))] = True
    return dataclasses.replace(batch, advantages=batch.advantages.masked_fill(flat.repeat_interleave(SAMPLES), 0.0))


def saving(policy: PreTrainedModel, batch: Batch, recipe: Recipe) -> float:
    """Seconds of the gradient over those of one that goes through all rows."""

    def seconds() -> float:
        policy.zero_grad()
        start = time.perf_counter()
        update.backward(policy, batch, recipe, MICRO_BATCH, SAMPLES)
        return time.perf_counter() - start

    def through_all() -> float:
        with mock.patch.object(update, "rows_without_gradient", lambda batch, *_: batch.advantages != batch.advantages):
            return seconds()

    arms: list[Callable[[], float]] = [through_all, seconds]
    seconds()
    times = [[arm() for arm in arms] for _ in range(ROUNDS)]
    whole, ours = (statistics.median(column) for column in zip(*times, strict=True))
    return ours / whole


if __name__ == "__main__":
    main()
