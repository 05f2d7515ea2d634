"""`stable`, the verdict and its changes on a real model: SmolLM2-135M-Instruct over rewards, recipes and seeds.

python -m benchmarks.real_models list                 # the runs, in their order
python -m benchmarks.real_models run --jobs 2         # resumes where it stopped; about 5 minutes a run
python -m benchmarks.real_models cures --jobs 2       # the recommended change of every run that is not healthy
python -m benchmarks.real_models collect              # finished runs -> docs/real_models.jsonl, a row a run
python -m benchmarks.real_models tables               # prints the tables of docs/REAL_MODELS.md
python -m benchmarks.real_models texts                # prints its completions

Needs models/local/smollm2 (`benchmarks/smollm2.py`) and the messages of OASST1 in data/local (docs/REAL_MODELS.md).
The stages themselves make a run, in a clone of the current commit, one a job.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks import real_models_tables as results
from benchmarks.clones import MADE, environment, make_clone
from pipeline.config.load import PARAMS_FILE
from pipeline.file_io import atomic_folder, read_json
from pipeline.paths import REPORTS, RUN_FILES

RUNS = Path("benchmarks/runs/real_models")  # a folder a run: params.yaml and reports/
SOURCES = ("models/local/smollm2", "data/local")
BEFORE, STAGES = ("prepare", "cache"), ("check", "train", "evaluate", "diagnose")
SETTING = (
    "prompts=oasst1_short",
    "++prompt_sets.oasst1_short={source: data/local, language: en, min_characters: 1, max_characters: 31, "
    "first_character: upper, deduplicate: false}",
    "++models.smollm2.source=models/local/smollm2",
    "++models.smollm2_chat={source: models/local/smollm2, chat_template: auto}",
    "train.steps=15", "train.prompts_per_step=8", "train.threads=1", "train.arithmetic=native",
    "evaluate.prompts=60", "evaluate.samples_per_prompt=2",
    "recipes.stable.precision=bfloat16", "recipes.notebook.precision=bfloat16",
)  # fmt: skip
MODELS = ("smollm2", "smollm2_chat")
REWARDS = ("embedding", "length", "words", "short_greeting")

UNSCALED = ("recipe=stable", "recipes.stable.lr_base_width=0")  # lr as it is, 2.25 times as much for this model
LOOSE = (*UNSCALED, "recipes.stable.kl=none", "recipes.stable.warmup_steps=0", "recipes.stable.lr=0.0003")
FAST = (*UNSCALED, "recipes.stable.lr=0.001")
CLEAN = ("recipe=notebook", "recipes.notebook.alignment=correct", "recipes.notebook.special_tokens=strip")
REWARD_UNITS = (  # `stable` at first
    *UNSCALED, "recipes.stable.scale_rewards=none", "recipes.stable.kl_coef=0.1", "recipes.stable.kl_target=0.0",
)  # fmt: skip
NOTEBOOK = ("recipe=notebook",)


class Plan(NamedTuple):
    """A run: what is changed in params.yaml besides SETTING."""

    group: str  # stable: the recipe as it is; other: meant to collapse; cure: of another run
    name: str
    changes: tuple[str, ...]

    @property
    def checkpoint(self) -> str:
        """What `prepare` and `cache` depend on."""
        recipe = next((change for change in self.changes if change.startswith("recipe=")), "recipe=stable")
        return f"{self.changes[0]} {recipe}"


def planned(group: str, name: str, model: str, reward: str, seed: int, changes: tuple[str, ...] = ()) -> Plan:
    chosen = (f"model={model}", f"reward={reward}", f"seed={seed}")
    return Plan(group, f"{name}-{model}-{reward}-{seed}", chosen + changes)


# Meant to collapse or not; whether they do is for the labels to say.
OTHERS = [
    planned("other", name, model, reward, 10, changes)
    for name, changes, model, reward in (
        ("loose", LOOSE, "smollm2", "length"),
        ("loose", LOOSE, "smollm2_chat", "embedding"),
        ("reward_units", REWARD_UNITS, "smollm2", "length"),
        ("clean", CLEAN, "smollm2", "embedding"),
        ("fast", FAST, "smollm2", "short_greeting"),
        ("clean", CLEAN, "smollm2_chat", "length"),
        ("notebook", NOTEBOOK, "smollm2", "embedding"),
        ("fast", FAST, "smollm2", "length"),
        ("loose", LOOSE, "smollm2", "short_greeting"),
        ("fast", FAST, "smollm2_chat", "embedding"),
        ("clean", CLEAN, "smollm2", "length"),
        ("reward_units", REWARD_UNITS, "smollm2_chat", "length"),
        ("loose", LOOSE, "smollm2", "embedding"),
        ("fast", FAST, "smollm2", "words"),
        ("notebook", NOTEBOOK, "smollm2_chat", "length"),
        ("loose", LOOSE, "smollm2_chat", "length"),
    )
]
STABLE = [
    planned("stable", "stable", model, reward, seed) for seed in range(3) for model in MODELS for reward in REWARDS
]
UNSCALED_STABLE = [  # `stable` without lr_base_width, as it was before
    planned("other", "unscaled", model, reward, seed, UNSCALED)
    for seed in range(2) for model in MODELS for reward in REWARDS
]  # fmt: skip
HARDEST = [  # the hardest of those: other KL targets in nats a completion, 0 = none, and smaller steps
    planned("other", name, "smollm2_chat", "embedding", seed, (*UNSCALED, f"recipes.stable.{change}"))
    for name, change in (
        ("target0", "kl_target=0.0"), ("target3", "kl_target=3.0"), ("target4", "kl_target=4.0"),
        ("slow", "lr=0.00003"),
    )
    for seed in (0, 1)
]  # fmt: skip


def plans() -> list[Plan]:
    """In the order in which they are made: so that the first ones say something of everything."""
    first = len(MODELS) * len(REWARDS)
    return [*STABLE[:first], *OTHERS[:8], *STABLE[first:], *OTHERS[8:], *HARDEST, *UNSCALED_STABLE]


def cure_plans() -> Iterator[Plan]:
    """For each collected run with a change to try, the same run with that change; and so on where that was collected
    and has a change to try itself."""
    found = {row["name"]: row["cure"] for row in results.read_rows()}
    tried = plans()
    for plan in tried:  # it grows
        if changes := found.get(plan.name):
            added = tuple(f"{key}={value}" for key, value in changes.items())
            tried.append(Plan("cure", f"cure-{plan.name}", plan.changes + added))
            yield tried[-1]


def run(plan: Plan, clone: Path) -> None:
    """Makes one run in a clone: an interrupted one goes on from its resume states, if the clone gets it again."""
    from dvc.utils.hydra import apply_overrides

    subprocess.run(["git", "checkout", "--quiet", "--force", "HEAD"], cwd=clone, check=True)
    apply_overrides(clone / PARAMS_FILE.name, [*SETTING, *plan.changes])
    log, made = RUNS / f"{plan.name}.log", clone / MADE
    stages = STAGES if made.exists() and made.read_text() == plan.checkpoint else (*BEFORE, *STAGES)
    made.unlink(missing_ok=True)
    with log.open("w") as output:
        for stage in stages:
            command = [sys.executable, "-m", f"pipeline.stages.{stage}"]
            done = subprocess.run(command, cwd=clone, env=environment(clone), stdout=output, stderr=output)
            if done.returncode:
                print(f"failed: {plan.name}, stage {stage}: {log}", flush=True)
                return
    made.write_text(plan.checkpoint)
    with atomic_folder(RUNS / plan.name) as target:
        shutil.copytree(clone / REPORTS, target / REPORTS)
        shutil.copyfile(clone / PARAMS_FILE.name, target / PARAMS_FILE.name)
    shutil.rmtree(clone / ".checkpoints", ignore_errors=True)
    diagnosis = read_json(clone / RUN_FILES.diagnosis)
    print(f"{plan.name}: {diagnosis['verdict']}: {diagnosis['headline']}", flush=True)


def run_all(wanted: Iterable[Plan], jobs: int) -> None:
    collected = {row["name"] for row in results.read_rows()}
    todo = [plan for plan in wanted if plan.name not in collected and not results.is_finished(plan, RUNS)]
    clones = [with_sources(make_clone((RUNS / f"clone-{job}").resolve())) for job in range(min(jobs, len(todo)))]

    def work(clone: Path) -> None:
        while todo:
            run(todo.pop(0), clone)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, clones))


def with_sources(clone: Path) -> Path:
    """The clone, with the model and the prompts."""
    for source in SOURCES:
        shutil.copytree(source, clone / source, dirs_exist_ok=True)
    return clone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("list", "run", "cures", "collect", "tables", "texts"))
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    match arguments.command:
        case "list":
            for plan in plans():
                print(plan.name, *plan.changes)
        case "run":
            run_all(plans(), arguments.jobs)
        case "cures":
            run_all(cure_plans(), arguments.jobs)
        case "collect":
            results.collect([*plans(), *cure_plans()], RUNS)
        case "tables":
            results.tables()
        case "texts":
            results.texts()


if __name__ == "__main__":
    main()
