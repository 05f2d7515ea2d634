"""What the diagnostics cost, as shares of a training step at the notebook's 128 prompts with 8 samples.

python -m benchmarks.diagnostics_cost [steps]     # after `dvc repro prepare cache`; recipe notebook, without KL

Phases that training needs anyway are told from those that only measure: `reference`, `rescore` and `diagnostics` are
laps of the step itself; the signal-to-noise ratio is the difference between updates with and without it, taken in turn;
the entropy is timed alone, on logits of the same shape. Ratios of one run: seconds are of this machine at this moment.
"""

import statistics
import sys
import time
from typing import Any
from unittest import mock

import torch

from benchmarks.detector import params_of
from pipeline.distributed.device import configure_torch
from pipeline.rl import train_step
from pipeline.rl.calibrate import calibrate
from pipeline.rl.context import build_context
from pipeline.rl.optimizer import make_optimizer
from pipeline.rl.state import TrainState

SIZES = {"train.prompts_per_step": 128, "train.samples_per_prompt": 8, "train.steps": 50, "train.threads": 2}


def main(steps: int) -> None:
    params = params_of({"recipe": "notebook"} | SIZES, seed=0)
    device = configure_torch("auto", params.train.threads)
    setting, policy = build_context(params, device)
    optimizer = make_optimizer(policy.parameters(), params.selected_recipe)
    run, real = TrainState(), train_step.update_policy

    def without_ratio(*arguments: Any) -> Any:
        changed = list(arguments)
        changed[5] -= 1  # the micro-batch
        return real(*changed)  # no micro-batch holds whole groups: no ratio

    with mock.patch.object(train_step, "update_policy", without_ratio):
        train_step.train_step(run, setting, policy, optimizer)  # the first one is slower
    plain, full = [], []
    for _ in range(steps):
        with mock.patch.object(train_step, "update_policy", without_ratio):
            train_step.train_step(run, setting, policy, optimizer)
        plain.append(run.timings[-1])
        train_step.train_step(run, setting, policy, optimizer)
        full.append(run.timings[-1])

    def median(rows: list[dict[str, float]], phase: str) -> float:
        return statistics.median(row[f"seconds_{phase}"] for row in rows)

    phases = [key.removeprefix("seconds_") for key in full[0] if key.startswith("seconds_")]
    whole = sum(median(full, phase) for phase in phases)
    costs = {
        "reference, on an eighth of the prompts": median(full, "reference"),
        "second scoring, on the same eighth": median(full, "rescore"),
        "metrics of tensors and texts": median(full, "diagnostics"),
        "signal-to-noise ratio": median(full, "update") - median(plain, "update"),
        "entropy": entropy_seconds(policy.config.vocab_size, params, device),
    }
    print(f"| what | seconds | share of the step of {whole:.1f} s |\n|---|---|---|")
    for name, seconds in costs.items():
        print(f"| {name} | {seconds:.3f} | {seconds / whole:.1%} |")
    print(f"| all diagnostics | {sum(costs.values()):.3f} | {sum(costs.values()) / whole:.1%} |")
    start = time.perf_counter()
    rows = calibrate(setting)
    seconds = time.perf_counter() - start
    print(
        f"| calibration, once: {len(rows)} batches | {seconds:.3f} "
        f"| {seconds / whole / params.train.steps:.1%} of {params.train.steps} steps |"
    )


def entropy_seconds(vocabulary: int, params: Any, device: torch.device) -> float:
    """Of all micro-batches of a step."""
    sizes = params.train
    logits = torch.randn(sizes.micro_batch, sizes.max_tokens, vocabulary, device=device)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        full = logits.log_softmax(-1)
        (full.exp() * full).sum(-1).sum().item()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * sizes.prompts_per_step * sizes.samples_per_prompt / sizes.micro_batch


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
