"""How fast, beside the notebook's own loop and trl's RLOOTrainer: one run, arms in turn, medians and ratios.

python -m benchmarks.speed run [--rounds 2]    # -> docs/speed.json, 20 minutes on two cores; nothing else should run
python -m benchmarks.speed tables              # docs/speed.json -> the tables of docs/SPEED.md, on the terminal

Where torch sees a GPU, that is measured, into docs/speed_gpu.json; `--device cpu` measures the CPU there, too.
Needs trl: pip install -e '.[benchmarks]'. Every measurement is a process of its own (`benchmarks.speed_arms`).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import material
from pipeline.distributed.device import gpu_description

RESULTS = Path("docs/speed.json")
RESULTS_OF_A_GPU = Path("docs/speed_gpu.json")
FEW, MANY = 16, 128  # prompts a step: the slow loops take as long for each prompt of few as of many, but see MEMORY
SCALING = (16, 32, 64, 256, 512)
Arm = tuple[str, ...]
NOTEBOOK: Arm = ("notebook", "--prompts", str(FEW))
TRL: Arm = ("trl", "--prompts", str(FEW))
OURS: Arm = ("ours", "--prompts", str(MANY))
EMBEDDING: Arm = ("--reward", "embedding")
HALF: Arm = ("--precision", "bfloat16")
ROUND: dict[str, Arm] = {
    "matmul bfloat16": ("matmul", *HALF),
    "matmul float32": ("matmul",),
    "notebook, length": NOTEBOOK,
    "ours bfloat16, length": OURS + HALF + ("--count-flops",),
    "trl float32, length": TRL,
    "trl bfloat16, length": TRL + HALF,
    "ours float32, length": OURS,
    "notebook, embedding": NOTEBOOK + EMBEDDING,
    "ours bfloat16, embedding": OURS + HALF + EMBEDDING,
    "ours bfloat16, embedding, encoder too": (
        *OURS,
        *HALF,
        *EMBEDDING,
        "--encoder-precision",
        "bfloat16",
        "--count-flops",
    ),
}
ONCE: dict[str, Arm] = {"ours bfloat16, length, with KL": (*OURS, *HALF, "--kl", "reward_k1")}
MEMORY: dict[str, Arm] = {"notebook, length, 128 prompts": ("notebook", "--prompts", str(MANY))} | {
    f"ours bfloat16, length, {prompts} prompts": ("ours", "--prompts", str(prompts), *HALF) for prompts in SCALING
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "tables"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.what == "run":
        run(options.rounds, options.device)
    print("\n".join(tables(json.loads(results(options.device).read_text(encoding="utf-8")))))


def results(device: str) -> Path:
    return RESULTS if device == "cpu" else RESULTS_OF_A_GPU


def run(rounds: int, device: str) -> None:
    found: dict[str, Any] = {"prompts": material.prompts()[1], "tokenizer": material.tokenizer()[1], "arms": {}}
    found |= {"gpu": gpu_description(torch.device(device))} if device == "cuda" else {}
    with tempfile.TemporaryDirectory() as folder:
        material.write_encoder(Path(folder))
        plan = [ROUND] * rounds + [ONCE, MEMORY]
        for name, arm in (pair for part in plan for pair in part.items()):
            found["arms"].setdefault(name, []).append(measure((*arm, "--device", device, "--encoder", folder)))
            print(name, json.dumps(found["arms"][name][-1])[:160], file=sys.stderr, flush=True)
            results(device).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def measure(arm: Arm, variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """An arm in a process of its own, with these variables in its environment."""
    command = [sys.executable, "-m", "benchmarks.speed_arms", *arm]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", **(variables or {})}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.strip().splitlines()[-1])


def rate(runs: list[dict[str, Any]]) -> float:
    """Samples a second, the median over rounds and steps."""
    return statistics.median(run["samples"] / seconds for run in runs for seconds in run["seconds"])


def flop_rate(runs: list[dict[str, Any]]) -> float:
    """Operations a second in a step, the median over rounds and steps of runs whose operations were counted."""
    return statistics.median(run["flops"] / seconds for run in runs for seconds in run["seconds"])


def tables(found: dict[str, Any]) -> list[str]:
    arms = found["arms"]
    where = [f"On a GPU: {found['gpu']}.", ""] if "gpu" in found else []
    return [*where, *_rates(arms), "", *_phases(arms), "", *_scaling(arms)]


def _rates(arms: dict[str, Any]) -> list[str]:
    matmul = {
        name: statistics.median(r["flops_per_second"] for r in arms[f"matmul {name}"])
        for name in ("bfloat16", "float32")
    }
    lines = [
        f"Matrix multiplication: {matmul['bfloat16'] / 1e9:.0f} GFLOP/s in bfloat16, "
        f"{matmul['float32'] / 1e9:.0f} in float32.", "",
        "| loop | samples/s | over the notebook's loop | over trl float32 | peak memory, MiB |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, runs in arms.items():
        if name.startswith("matmul") or name in MEMORY:
            continue
        base = "notebook, embedding" if "embedding" in name else "notebook, length"
        beside = f"{rate(runs) / rate(arms['trl float32, length']):.1f}" if "length" in name else ""
        peak = max(run["peak_mib"] for run in runs)
        lines.append(f"| {name} | {rate(runs):.1f} | {rate(runs) / rate(arms[base]):.1f} | {beside} | {peak} |")
    lines.append("")
    for name, base in (
        ("ours bfloat16, length", "notebook, length"),
        ("ours bfloat16, embedding, encoder too", "notebook, embedding"),
    ):
        share = flop_rate(arms[name]) / matmul["bfloat16"]
        per_sample = arms[name][0]["flops"] / arms[name][0]["samples"]
        limit, exact = matmul["bfloat16"] / per_sample, matmul["float32"] / per_sample
        lines.append(
            f"* {name}: a step of {MANY} x 8 does {per_sample / 1e9:.2f} GFLOP a sample, at {share:.1%} of the rate of "
            f"matrix multiplication. At all of that rate it would be {limit:.0f} samples/s, "
            f"{limit / rate(arms[base]):.1f} times the notebook's loop; "
            f"in float32 {exact:.0f}, {exact / rate(arms[base]):.1f} times."
        )
    return lines


def _phases(arms: dict[str, Any]) -> list[str]:
    names = [name for name in ROUND | ONCE if name.startswith("ours")]
    phases = list(arms[names[0]][0]["phases"])
    lines = ["| phase, seconds of a step | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for phase in phases:
        values = [statistics.median(s for run in arms[name] for s in run["phases"][phase]) for name in names]
        lines.append(f"| {phase.removeprefix('seconds_')} | " + " | ".join(f"{value:.2f}" for value in values) + " |")
    return lines


def _scaling(arms: dict[str, Any]) -> list[str]:
    lines = ["| prompts a step | seconds | samples/s | peak memory, MiB |", "|---|---|---|---|"]
    sizes = {int(name.split()[-2]): runs for name, runs in arms.items() if name in MEMORY and name.startswith("ours")}
    sizes[MANY] = arms["ours bfloat16, length"]
    for prompts, runs in sorted(sizes.items()):
        seconds = statistics.median(s for run in runs for s in run["seconds"])
        peak = max(run["peak_mib"] for run in runs)
        lines.append(f"| {prompts} | {seconds:.1f} | {rate(runs):.1f} | {peak} |")
    last = arms["notebook, length, 128 prompts"]
    lines.append(
        f"| {MANY}, the notebook's loop | {last[0]['seconds'][0]:.1f} | {rate(last):.1f} | {last[0]['peak_mib']} |"
    )
    return lines


if __name__ == "__main__":
    main()
