"""Sampling of long completions: ours, transformers' `generate` and trl side by side -> docs/long_completions.json.

python -m benchmarks.long_completions run       # hours on two cores; what is measured already is left out
python -m benchmarks.long_completions tables    # docs/long_completions.json -> the table of docs/SPEED.md

Each measurement is a process of its own, arms in turn. Seconds are those of sampling alone; memory is the peak while it
lasts over what the process held before it, libraries and weights; in bfloat16 ours rounds a copy of the weights, which
counts, and trl leaves rounding to autocast. trl's sampling is that of its RLOOTrainer, measured
inside a step and ended after it; without trl (pip install -e '.[benchmarks]') that arm is left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import material
from benchmarks.real_steps import forget_peak, peak
from pipeline.distributed.device import configure_torch
from pipeline.models.memory import bf16_copy
from pipeline.models.sampling import pad_prompts, sample

RESULTS = Path("docs/long_completions.json")
TOKENS = (128, 256, 512)
ARMS = ("ours", "generate", "trl")
# with arm and round: what is measured
SETTING = ("tokens", "precision", "shape", "prompts", "samples", "threads", "device")
WARM_UP = 4  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "tables", "arm"])
    parser.add_argument("--arm", choices=ARMS, help="of `arm`, which measures one in this process")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="float32")
    parser.add_argument("--shape", choices=list(material.SHAPES), default="pythia-70m")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.what == "arm":
        print(json.dumps(measure(options)))
        return
    if options.what == "run":
        run(options)
    print("\n".join(table(material.read_rows(options.results))))


def run(options: argparse.Namespace) -> None:
    rows = material.read_rows(options.results)
    arms = [arm for arm in ARMS if arm != "trl" or find_spec("trl")]
    if arms != list(ARMS):
        print("trl is not installed: left out; pip install -e '.[benchmarks]'", file=sys.stderr)
    for count, tokens, arm in ((c, t, a) for c in range(options.rounds) for t in options.tokens for a in arms):
        setting = {name: getattr(options, name) for name in SETTING} | {"tokens": tokens}
        case = {"arm": arm, "round": count} | setting
        if any(row.items() >= case.items() for row in rows):
            continue
        more = [part for name in SETTING for part in (f"--{name}", str(setting[name]))]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.long_completions", "arm", "--arm", arm, *more],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{case}: {done.stderr[-2000:]}")
        rows.append(case | json.loads(done.stdout.strip().splitlines()[-1]))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        material.write_rows(options.results, rows)


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Seconds and bytes of sampling by one arm."""
    device = configure_torch(options.device, options.threads)
    if options.arm != "ours":
        torch.use_deterministic_algorithms(False)  # not theirs
    tokenizer, prompts = material.tokenizer()[0], material.prompts()[0][: options.prompts]
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    policy: Any = material.policy(options.shape)
    policy.to(device)
    return {"ours": ours, "generate": generate, "trl": trl}[options.arm](options, policy, tokenizer, prompts)


def measured(make: Callable[[int], Any], tokens: int, device: torch.device) -> dict[str, float]:
    """Seconds and bytes of `make(tokens)`, after a few tokens whose seconds do not count."""
    forget_peak(device)
    before = peak(device)
    make(WARM_UP)
    start = time.perf_counter()
    make(tokens)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - start, "bytes": peak(device) - before}


def ours(options: argparse.Namespace, policy: Any, tokenizer: Any, prompts: list[str]) -> dict[str, float]:
    """`sample`, as a step calls it."""
    ids, mask = pad_prompts(
        [tokenizer(prompt)["input_ids"] for prompt in prompts], tokenizer.eos_token_id, policy.device
    )

    def make(tokens: int) -> None:
        model = bf16_copy(policy) if options.precision == "bfloat16" else policy
        limits = torch.full((len(prompts),), tokens, device=policy.device)
        draw = torch.Generator().manual_seed(tokens)
        uniforms = torch.rand(len(prompts) * options.samples, tokens, dtype=torch.float64, generator=draw)
        sample(model, ids, mask, limits, uniforms.to(policy.device), [tokenizer.eos_token_id])

    return measured(make, options.tokens[0], policy.device)


def generate(options: argparse.Namespace, policy: Any, tokenizer: Any, prompts: list[str]) -> dict[str, float]:
    """All completions in one call of transformers' `generate`, the weights in the precision."""
    policy = policy.to(getattr(torch, options.precision))
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False).to(policy.device)

    def make(tokens: int) -> None:
        policy.generate(
            **inputs, max_new_tokens=tokens, do_sample=True, top_k=0, top_p=1.0, num_return_sequences=options.samples,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip

    return measured(make, options.tokens[0], policy.device)


class SampledError(Exception):
    """trl has sampled its batch."""


def trl(options: argparse.Namespace, policy: Any, tokenizer: Any, prompts: list[str]) -> dict[str, float]:
    """The call of `generate` that RLOOTrainer makes for a step's batch, as it prepares model and settings for it."""
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer

    plain, found = policy.generate, {}

    def clocked(**inputs: Any) -> None:
        make = lambda tokens: plain(**inputs, max_new_tokens=tokens)  # noqa: E731
        found.update(measured(make, options.tokens[0], policy.device))
        raise SampledError

    policy.generate = clocked
    with tempfile.TemporaryDirectory() as folder:
        config = RLOOConfig(
            output_dir=folder, max_steps=1, per_device_train_batch_size=options.samples,
            gradient_accumulation_steps=options.prompts, num_generations=options.samples, beta=0.0,
            max_completion_length=options.tokens[0], temperature=1.0, gradient_checkpointing=False, report_to="none",
            save_strategy="no", use_cpu=options.device == "cpu", bf16=options.precision == "bfloat16",
            disable_tqdm=True, shuffle_dataset=False,
        )  # fmt: skip
        trainer = RLOOTrainer(
            model=policy, args=config, reward_funcs=lambda completions, **_: [0.0] * len(completions),
            processing_class=tokenizer, train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        )  # fmt: skip
        try:
            trainer.train()
        except SampledError:
            return found
    raise RuntimeError("trl did not sample by `generate`")


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Medians over the rounds of each setting; times and memory also as ratios to ours."""
    lines = [
        "| policy | completions | tokens | precision | ours, s | generate | trl | ours, MiB | generate | trl |",
        "|---" * 10 + "|",
    ]
    settings = {tuple(row[name] for name in SETTING): row for row in rows}
    for setting, row in sorted(settings.items()):
        chosen = [other for other in rows if tuple(other[name] for name in SETTING) == setting]
        cells = [row["shape"], row["prompts"] * row["samples"], row["tokens"], row["precision"]]
        for what, scale, digits in (("seconds", 1, 1), ("bytes", 2**20, 0)):
            middle = {
                arm: statistics.median(values) / scale
                for arm in ARMS
                if (values := [other[what] for other in chosen if other["arm"] == arm])
            }
            for arm in ARMS:
                ratio = f", {middle[arm] / middle['ours']:.1f} times" if {arm, "ours"} <= middle.keys() else ""
                own = f"{middle[arm]:.{digits}f}" if arm in middle else "not measured"
                cells.append(own if arm == "ours" else own + ratio)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


if __name__ == "__main__":
    main()
