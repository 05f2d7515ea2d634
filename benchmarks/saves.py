"""How long training stands still for a resume state: written while it waits, and beside the next steps.

    python -m benchmarks.saves                          # pythia-70m's shape, on an idle machine; TMPDIR names the disk
    python -m benchmarks.saves --shape pythia-410m --steps 3 --saves 4

Real steps of one process, the three arms in turn, so that whatever slows the machine down slows down all: steps alone,
steps with a save that they wait for, and with one beside them. A save's stall is what a round of steps takes longer
with it than without, a slower step beside the write included. One line of JSON.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.real_steps import stage_in

BATCH = {"prompts_per_step": 16, "samples_per_prompt": 8, "max_tokens": 20, "micro_batch": 64, "precision": "float32"}
ARMS = ("alone", "waiting", "beside")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="pythia-70m")
    parser.add_argument("--steps", type=int, default=2, help="between two saves")
    parser.add_argument("--saves", type=int, default=4, help="of each arm")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stage_in(Path(folder), asked.shape, BATCH | {"threads": asked.threads})
        os.chdir(folder)
        print(json.dumps({"shape": asked.shape, "steps": asked.steps} | stalls(asked.steps, asked.saves)))
        os.chdir("/")


def stalls(steps: int, saves: int) -> dict[str, Any]:
    """Seconds of a round of `steps` steps by arm, with the save at its end; the stalls, and their ratio."""
    from pipeline.config.load import load_params
    from pipeline.distributed.device import configure_torch
    from pipeline.distributed.weights import state_bytes
    from pipeline.rl.calibrate import calibrate
    from pipeline.rl.context import build_context
    from pipeline.rl.optimizer import make_optimizer
    from pipeline.rl.state import TrainState
    from pipeline.runs.background import BackgroundWriter
    from pipeline.stages import train

    params = load_params()
    context, policy = build_context(params, configure_torch(params.train.device, params.train.threads))
    optimizer = make_optimizer(policy.parameters(), params.selected_recipe)
    run = TrainState(calibration=calibrate(context, range(2)))
    folder = Path("states").resolve()

    def one_round(arm: str, writer: BackgroundWriter) -> None:
        for _ in range(steps):
            train.train_step(run, context, policy, optimizer)
        if arm != "alone":
            train.fits = lambda *_: arm == "beside"
            train.save_checkpoint(folder, run, policy, optimizer, context, [], writer, candidate=False, due=True)

    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    with BackgroundWriter() as writer:
        one_round("waiting", writer)  # the first step makes the optimizer's state, the first save the folder
        for arm in ARMS * saves:
            one_round(arm, writer)  # its write lies beside the round that is timed
            start = time.perf_counter()
            one_round(arm, writer)
            seconds[arm].append(time.perf_counter() - start)
            writer.wait()
    of_round = {arm: mean(seconds[arm]) for arm in ARMS}
    waiting, beside = (of_round[arm] - of_round["alone"] for arm in ARMS[1:])
    return {
        "state_gb": round(state_bytes(policy, optimizer) / 1e9, 3),
        "seconds_a_round": {arm: round(value, 3) for arm, value in of_round.items()},
        "stall_waiting": round(waiting, 3), "stall_beside": round(beside, 3), "ratio": round(beside / waiting, 3),
    }  # fmt: skip


if __name__ == "__main__":
    main()
