"""What portable arithmetic costs: a training step beside native arithmetic, and beside native limited to AVX2.

python -m benchmarks.arithmetic  # a quarter of an hour of two free cores, after `dvc repro`; the table of SPEED.md
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
ARMS = {"native": ("native", {}), "native, AVX2": ("native", AVX2), "portable": ("portable", {})}
STEPS = {"pocket": 6, "pythia-70m": 2}


def main() -> None:
    print("| policy | threads | native, s a step | native limited to AVX2 | portable | portable / AVX2 | / native |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for shape in STEPS:
            place = ROOT if shape == "pocket" else made(Path(folder) / shape, shape)
            for threads in (1, 2):
                rounds = [{arm: timed(place, shape, arm, threads) for arm in ARMS} for _ in range(2)]
                native, avx2, portable = (statistics.mean(each[arm] for each in rounds) for arm in ARMS)
                ratios = f"{portable / avx2:.2f} | {portable / native:.2f}"
                print(f"| {shape} | {threads} | {native:.2f} | {avx2:.2f} | {portable:.2f} | {ratios} |", flush=True)


def made(folder: Path, shape: str) -> Path:
    from benchmarks.real_steps import stage_in

    stage_in(folder, shape, {})
    return folder


def timed(folder: Path, shape: str, arm: str, threads: int) -> float:
    """Seconds of a step, in a process of its own."""
    arithmetic, variables = ARMS[arm]
    command = [sys.executable, "-m", "benchmarks.arithmetic", "--step", shape, arithmetic, str(threads)]
    environment = {**os.environ, **variables, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def step(shape: str, arithmetic: str, threads: int) -> float:
    from pipeline.arithmetic.environment import choose_kernels

    if arithmetic == "portable":
        choose_kernels()
    from pipeline.config.load import load_params
    from pipeline.distributed.device import configure_torch
    from pipeline.rl.context import build_context
    from pipeline.rl.optimizer import make_optimizer
    from pipeline.rl.state import TrainState
    from pipeline.rl.train_step import train_step

    params, run = load_params(), TrainState()
    context, policy = build_context(params, configure_torch("cpu", threads, arithmetic))  # type: ignore[arg-type]
    optimizer = make_optimizer(policy.parameters(), params.selected_recipe)
    train_step(run, context, policy, optimizer)  # the first one allocates
    start = time.perf_counter()
    for _ in range(STEPS[shape]):
        train_step(run, context, policy, optimizer)
    return (time.perf_counter() - start) / STEPS[shape]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", nargs=3, metavar=("POLICY", "ARITHMETIC", "THREADS"), help=argparse.SUPPRESS)
    chosen = parser.parse_args().step
    if chosen:
        print(step(chosen[0], chosen[1], int(chosen[2])))
    else:
        main()
