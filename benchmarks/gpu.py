"""What SPEED.md and SCALE.md promise of one GPU, in one command of less than ten minutes, without DVC and MLflow.

python -m benchmarks.gpu run --out FOLDER          # -> FOLDER/gpu.json after every part, and the tables
python -m benchmarks.gpu tables FOLDER/gpu.json

The parts, in their order: the notebook's experiment (50 steps of 1024 completions, BERT-base's shape as the reward),
twice with one seed; a step of the notebook's loop and of trl's; the rate of matrix multiplication; steps of larger
policies, their memory beside the formula of SCALE.md. Each is a process of its own. A part that fails keeps its last
line, and one that would begin after --minutes is left out and named.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import material
from benchmarks.memory_formula import Step, predicted
from benchmarks.speed import Arm, flop_rate, measure, rate
from pipeline.distributed.device import gpu_description
from pipeline.report.table import markdown_table

EXPERIMENT = ("experiment", "experiment, again")
LARGER = ("pythia-410m", "pythia-1b", "pythia-2_8b")
STEP = Step((8,) * 128)  # that of FULL, as the formula wants it
SECONDS = 60  # the goal for the experiment


def parts(steps: int, prompts: int, few: int, shape: str, larger: tuple[str, ...], size: int = 0) -> dict[str, Arm]:
    """By name, what `benchmarks.speed_arms` is called with."""
    ours: Arm = ("ours", "--shape", shape, "--prompts", str(prompts))
    embedding: Arm = ("--reward", "embedding", "--encoder-precision", "bfloat16")
    half: Arm = ("--precision", "bfloat16")
    matmul: Arm = ("matmul", "--size", str(size))
    return {
        **dict.fromkeys(EXPERIMENT, (*ours, *half, *embedding, "--steps", str(steps), "--count-flops")),
        "notebook's loop": ("notebook", "--shape", shape, "--prompts", str(few), "--reward", "embedding"),
        "matmul bfloat16": (*matmul, *half),
        "float32": (*ours, "--reward", "embedding", "--count-flops"),
        "trl": ("trl", "--shape", shape, "--prompts", str(few), *half),
        "ours, length": (*ours, *half),
        "matmul float32": matmul,
        **{name: ("ours", "--shape", name, "--prompts", str(prompts), *half) for name in larger},
    }


FULL = parts(steps=50, prompts=128, few=16, shape="pythia-70m", larger=LARGER)
TINY = parts(steps=1, prompts=2, few=1, shape="pythia-14m", larger=("pythia-14m",), size=256)


def run(arms: dict[str, Arm], device: str, out: Path, minutes: float) -> dict[str, Any]:
    """All parts; the file is written anew after each."""
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"gpu": gpu_description(torch.device(device)) if device == "cuda" else "none", "arms": {}}
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        material.write_encoder(Path(folder))
        for name, arm in arms.items():
            if time.monotonic() - begun > 60 * minutes:
                result = {"failed": f"left out: {minutes:g} minutes were over"}
            else:
                result = part((*arm, "--device", device, "--encoder", folder))
            found["arms"][name] = result
            print(name, json.dumps(result)[:160], file=sys.stderr, flush=True)
            (out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def part(arm: Arm) -> dict[str, Any]:
    try:
        return measure(arm)
    except subprocess.CalledProcessError as error:
        return {"failed": (error.stderr.strip() or "no output").splitlines()[-1]}


def tables(found: dict[str, Any]) -> list[str]:
    """The experiment, the loops side by side, and memory beside the formula."""
    arms = {name: result for name, result in found["arms"].items() if "failed" not in result}
    lines = [f"On {found['gpu']}.", "", *_experiment(arms), ""]
    cells = [["loop", "samples/s", "share of the rate of matrix multiplication"]]
    for name in ("notebook's loop", EXPERIMENT[0], "float32", "ours, length", "trl"):
        if result := arms.get(name):
            cells.append([name, f"{rate([result]):.0f}", _share(result, arms, name)])
    lines += [markdown_table(cells), ""]
    cells = [["policy", "seconds a step", "memory, GB", "formula, GB"]]
    for name in material.SHAPES:
        if result := arms.get(name):
            cells.append([name, f"{result['seconds'][0]:.2f}", f"{result['peak_mib'] * 2**20 / 1e9:.2f}",
                          f"{predicted(name, {'precision': 'bfloat16'}, STEP)['all'] / 1e9:.2f}"])  # fmt: skip
    lines.append(markdown_table(cells))
    lines += [f"* {name}: {result['failed']}" for name, result in found["arms"].items() if "failed" in result]
    return lines


def _experiment(arms: dict[str, Any]) -> list[str]:
    made = [arms[name] for name in EXPERIMENT if name in arms]
    lines = [f"* {len(run['seconds'])} steps in {sum(run['seconds']):.1f} s (goal: {SECONDS} s)" for run in made]
    if len(made) == len(EXPERIMENT):
        same = made[0]["digest"] == made[1]["digest"]
        lines.append("* both runs have the same bytes" if same else "* **the two runs differ**")
    return lines


def _share(result: dict[str, Any], arms: dict[str, Any], name: str) -> str:
    limit = arms.get("matmul float32" if name == "float32" else "matmul bfloat16")
    if "flops" not in result or limit is None:
        return ""
    return f"{flop_rate([result]) / limit['flops_per_second']:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("run")
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    made.add_argument("--minutes", type=float, default=8.0, help="no part begins later")
    made.add_argument("--tiny", action="store_true", help="to see whether everything runs")
    commands.add_parser("tables").add_argument("file", type=Path)
    options = parser.parse_args()
    if options.command == "run":
        found = run(TINY if options.tiny else FULL, options.device, options.out, options.minutes)
    else:
        found = json.loads(options.file.read_text(encoding="utf-8"))
    print("\n".join(tables(found)))


if __name__ == "__main__":
    main()
