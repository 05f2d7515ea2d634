"""The algorithms of params.yaml side by side, on sums (`arithmetic`) and on `length`: docs/ALGORITHMS.md.

python -m benchmarks.algorithms list             # the runs that are left, in their order
python -m benchmarks.algorithms run [--jobs 2]   # makes them; goes on where it stopped
python -m benchmarks.algorithms time             # seconds a step of each, in short runs: on a machine that is idle
python -m benchmarks.algorithms page             # docs/algorithms.jsonl -> the tables and the figure of the page

Each algorithm's learning rate is the one of the task's RATES with the best held-out reward at the end, mean over TUNING
seeds; the page reports runs with that rate on SEEDS, which are others. A run is a line of docs/algorithms.jsonl. The
stages themselves make it, in a clone of the current commit.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.clones import MADE, environment, make_clone
from pipeline.config.load import PARAMS_FILE
from pipeline.file_io import read_csv, read_jsonl, write_jsonl
from pipeline.paths import RUN_FILES
from pipeline.runs.dvc_git import head_commit

FOUND = Path("docs/algorithms.jsonl")
CLONE = Path("benchmarks/runs/algorithms")
RECIPES = ("rloo", "reinforce", "reinforce_running_mean", "remax", "grpo", "dr_grpo", "ppo_clip", "dapo")
RATES = {"arithmetic": (0.00001, 0.00003, 0.0001, 0.0003), "length": (0.0001, 0.0003, 0.001, 0.003)}
TUNING, SEEDS = (100, 101), (0, 1, 2, 3, 4)
COMMON = ("train.samples_per_prompt=8", "train.threads=1", "train.checkpoint_every=1000", "evaluate.independent=none")
TASKS = {
    "arithmetic": (
        "model=pocket-math", "prompts=arithmetic", "reward=answer", "train.steps=200", "train.prompts_per_step=32",
        "train.max_tokens=12", "evaluate.every=25", "evaluate.prompts=0", "evaluate.curve_prompts=256",
    ),
    "length": (
        "reward=length", "train.steps=30", "train.prompts_per_step=8", "train.max_tokens=20", "evaluate.every=10",
        "evaluate.prompts=128", "evaluate.curve_prompts=128",
    ),
}  # fmt: skip
TIMED_STEPS = 12


class Plan(NamedTuple):
    """A run."""

    group: str  # tuning, report or time
    task: str
    recipe: str
    lr: float
    seed: int

    def overrides(self) -> list[str]:
        chosen = [f"recipe={self.recipe}", f"recipes.{self.recipe}.lr={self.lr}", f"seed={self.seed}"]
        short = [f"train.steps={TIMED_STEPS}", "evaluate.every=0"] if self.group == "time" else []
        return [*TASKS[self.task], *COMMON, *chosen, *short]


def read_rows() -> list[dict[str, Any]]:
    return read_jsonl(FOUND) if FOUND.exists() else []


def done(rows: Sequence[dict[str, Any]]) -> set[Plan]:
    return {Plan(*(row[name] for name in Plan._fields)) for row in rows}


def chosen_rate(rows: Sequence[dict[str, Any]], task: str, recipe: str) -> float | None:
    """The rate with the best mean of the held-out rewards at the end; None until all tuning runs are there."""
    ends: dict[float, list[float]] = {}
    for row in rows:
        if (row["group"], row["task"], row["recipe"]) == ("tuning", task, recipe) and row["seed"] in TUNING:
            ends.setdefault(row["lr"], []).append(row["heldout"][-1][1])
    if any(len(ends.get(rate, ())) < len(TUNING) for rate in RATES[task]):
        return None
    return max(RATES[task], key=lambda rate: statistics.fmean(ends[rate]))


def plans(rows: Sequence[dict[str, Any]]) -> Iterator[Plan]:
    """All runs that can be named by now: those of the report once the rate is chosen. Task by task."""
    for task in TASKS:
        for seed in TUNING:
            for recipe in RECIPES:
                yield from (Plan("tuning", task, recipe, rate, seed) for rate in RATES[task])
        for seed in SEEDS:
            for recipe in RECIPES:
                if (rate := chosen_rate(rows, task, recipe)) is not None:
                    yield Plan("report", task, recipe, rate, seed)


def timed_plans(rows: Sequence[dict[str, Any]]) -> Iterator[Plan]:
    for task in TASKS:
        for recipe in RECIPES:
            yield Plan("time", task, recipe, chosen_rate(rows, task, recipe) or RATES[task][1], SEEDS[0])


def run(plan: Plan, clone: Path) -> dict[str, Any]:
    """Makes one run in the clone. Raises CalledProcessError where a stage fails."""
    from dvc.utils.hydra import apply_overrides

    subprocess.run(["git", "checkout", "--quiet", "--force", "HEAD"], cwd=clone, check=True)
    apply_overrides(clone / PARAMS_FILE.name, plan.overrides())
    made = clone / MADE  # the task that data/checkpoint is of
    before = [] if made.exists() and made.read_text() == plan.task else ["prepare", "cache"]
    made.unlink(missing_ok=True)
    shutil.rmtree(clone / ".checkpoints", ignore_errors=True)
    with (clone / "log.txt").open("w") as log:
        for stage in (*before, "check", "train"):
            command = [sys.executable, "-m", f"pipeline.stages.{stage}"]
            subprocess.run(command, cwd=clone, env=environment(clone), stdout=log, stderr=log, check=True)
    made.write_text(plan.task)
    return row(plan, clone)


def row(plan: Plan, clone: Path) -> dict[str, Any]:
    """What is kept of a run: rewards and samples by step, held-out rewards [updates, mean]; seconds where timed."""
    history = read_csv(clone / RUN_FILES.history)
    (folder,) = (clone / ".checkpoints").glob("*/timings.csv")
    timings = read_csv(folder)
    heldout: dict[int, list[float]] = {}
    for measured in read_jsonl(clone / RUN_FILES.heldout):
        heldout.setdefault(measured["step"], []).append(measured["reward"])
    kept: dict[str, Any] = {
        **plan._asdict(), "commit": head_commit()[:10],
        "reward": [round(step["reward_mean"], 5) for step in history],
        "samples": [int(step["samples"]) for step in timings],
        "heldout": [[step, round(statistics.fmean(rewards), 5)] for step, rewards in heldout.items()],
    }  # fmt: skip
    if plan.group == "time":  # the first steps allocate
        seconds = [sum(v for name, v in step.items() if name.startswith("seconds_")) for step in timings[2:]]
        kept["seconds"] = round(statistics.median(seconds), 4)
    return kept


def left(rows: Sequence[dict[str, Any]], timed: bool) -> list[Plan]:
    wanted = timed_plans(rows) if timed else plans(rows)
    return [plan for plan in wanted if plan not in done(rows)]


def run_all(timed: bool, jobs: int) -> None:
    """Each finished run is on file before its job begins another one. CalledProcessError: a stage of one failed."""
    clones = [make_clone((CLONE / f"clone-{job}").resolve()) for job in range(jobs)]
    begun: set[Plan] = set()
    lock = threading.Lock()  # of the file and of what is begun

    def work(clone: Path) -> None:
        while True:
            with lock:
                plan = next((plan for plan in left(read_rows(), timed) if plan not in begun), None)
                if plan is None:
                    return
                begun.add(plan)
            made = run(plan, clone)
            with lock:
                write_jsonl(FOUND, [*read_rows(), made])
            print(*plan, f"held-out {made['heldout'][-1][1]}" if made["heldout"] else made["seconds"], flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, clones))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("list", "run", "time", "page"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each")
    arguments = parser.parse_args()
    if arguments.command == "list":
        for plan in left(read_rows(), timed=False):
            print(*plan)
    elif arguments.command == "page":
        from benchmarks.algorithms_page import write_page

        write_page(read_rows())
    else:
        timed = arguments.command == "time"
        run_all(timed, jobs=1 if timed else arguments.jobs)


if __name__ == "__main__":
    main()
