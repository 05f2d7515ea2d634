"""The verdict as a detector: healthy and collapsed runs over rewards, recipes and seeds, judged by docs/DETECTOR.md.

python -m benchmarks.detector run choose     # the runs that thresholds were chosen on (resumes; --jobs 2)
python -m benchmarks.detector run measure    # those that it is measured on: other seeds, more recipes
python -m benchmarks.detector collect        # runs -> docs/detector.csv; pip install -e '.[benchmarks]' first
python -m benchmarks.detector scan           # other thresholds on the runs to choose on
python -m benchmarks.detector tables         # docs/detector.csv -> the tables of docs/DETECTOR.md

Run `dvc repro prepare cache` first. Every policy along a run is evaluated on held-out prompts as soon as it exists,
which saves storing it; the labels come from these evaluations alone (`benchmarks/labels.py`).
"""

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

RUNS = Path("benchmarks/runs/detector")
STEPS, HELD_OUT, SAMPLES = 20, 24, 2
SIZES = {"train.steps": STEPS, "train.prompts_per_step": 6, "train.samples_per_prompt": 6, "train.threads": 1}

STABLE: dict[str, Any] = {"recipe": "stable"}
NOTEBOOK: dict[str, Any] = {"recipe": "notebook"}
CLEAN = NOTEBOOK | {"alignment": "correct", "special_tokens": "strip"}
LOOSE = STABLE | {"kl": "none", "warmup_steps": 0}
LENGTH, WORDS, QUESTIONS = {"reward": "length"}, {"reward": "words"}, {"reward": "questions"}
UNKNOWN_WORDS = WORDS | {"rewards.words.words": ["zyzzyva", "syzygy"]}


def huge(weight: float) -> dict[str, Any]:
    """The length reward times a factor that float32 cannot carry for long."""
    terms = [{"weight": weight, "reward": {"kind": "length", "target": 40}}]
    return {"reward": "short_greeting", "rewards.short_greeting.terms": terms}


class Plan(NamedTuple):
    """A run: what is changed in params.yaml (a plain key is one of the recipe's) and the seeds of each set."""

    name: str
    changes: dict[str, Any]
    choose: tuple[int, ...]
    measure: tuple[int, ...]


# Meant to collapse or not; whether they do is for `labels` to say.
PLANS = [
    # seeds 100.. choose, seeds 200.. measure; plans without seeds to choose on are new to the measured set
    Plan("notebook", NOTEBOOK, (100,), (200, 201, 202, 203)),
    Plan("notebook, correct", NOTEBOOK | {"alignment": "correct"}, (100,), (200, 201, 202, 203)),
    Plan("notebook, correct, sgd", NOTEBOOK | {"alignment": "correct", "optimizer": "sgd", "lr": 0.08}, (),
    (200, 201, 202)),
    Plan("clean, lr 1e-3", CLEAN | {"lr": 1e-3}, (100,), (200, 201, 202, 203)),
    Plan("clean, lr 5e-4", CLEAN | {"lr": 5e-4}, (), (200, 201, 202)),
    Plan("clean, no baseline", CLEAN | {"baseline": "none"}, (100,), (200, 201, 202, 203)),
    Plan("notebook, no baseline", NOTEBOOK | {"alignment": "correct", "baseline": "none"}, (), (200, 201, 202)),
    Plan("length 0, lr 1e-3", LOOSE | {"reward": "length", "rewards.length.target": 0, "lr": 1e-3}, (100,),
    (200, 201, 202, 203)),
    Plan("length, lr 1e-3", LOOSE | LENGTH | {"lr": 1e-3}, (100,), (200, 201, 202)),
    Plan("questions, lr 1e-3", LOOSE | QUESTIONS | {"lr": 1e-3}, (100,), (200, 201, 202, 203)),
    Plan("questions, lr 5e-4", LOOSE | QUESTIONS | {"lr": 5e-4}, (), (200, 201, 202)),
    Plan("words, lr 1e-3", LOOSE | WORDS | {"lr": 1e-3}, (100,), (200, 201, 202)),
    Plan("embedding, lr 1e-2, no clipping", LOOSE | {"lr": 1e-2, "max_grad_norm": 0.0}, (100,), (200, 201, 202, 203)),
    Plan("embedding, lr 3e-3, no clipping", LOOSE | {"lr": 3e-3, "max_grad_norm": 0.0}, (), (200, 201, 202, 203)),
    Plan("length, lr 1e-2", LOOSE | LENGTH | {"lr": 1e-2}, (100,), (200, 201, 202, 203)),
    Plan("shifted", STABLE | {"alignment": "shifted"}, (100,), (200, 201, 202, 203)),
    Plan("length, shifted", STABLE | LENGTH | {"alignment": "shifted"}, (), (200, 201)),
    Plan("no such words", STABLE | UNKNOWN_WORDS, (100,), (200, 201, 202, 203)),
    Plan("sgd, lr 1000", LOOSE | {"optimizer": "sgd", "lr": 1000.0, "max_grad_norm": 0.0}, (100,), (200, 201, 202)),
    Plan("length, sgd lr 900", LOOSE | LENGTH | {"optimizer": "sgd", "lr": 900.0, "max_grad_norm": 0.0}, (),
    (200, 201)),
    Plan("reward times 1e38", STABLE | huge(1e38), (100,), (200, 201, 202)),
    Plan("reward times 1e12, sgd", LOOSE | huge(1e12) | {"optimizer": "sgd", "lr": 1.0, "max_grad_norm": 0.0}, (100,),
    (200, 201)),
    Plan("length 0, lr 3e-3", LOOSE | {"reward": "length", "rewards.length.target": 0, "lr": 3e-3}, (),
    (200, 201, 202, 203)),
    Plan("length, lr 3e-3", LOOSE | LENGTH | {"lr": 3e-3}, (), (200, 201, 202, 203)),
    Plan("questions, lr 1e-2", LOOSE | QUESTIONS | {"lr": 1e-2}, (), (200, 201, 202, 203)),
    Plan("embedding, lr 1e-2", LOOSE | {"lr": 1e-2}, (), (200, 201, 202, 203)),
    Plan("stable", STABLE, (100,), (200, 201, 202)),
    Plan("stable, length", STABLE | LENGTH, (100,), (200, 201, 202)),
    Plan("stable, words", STABLE | WORDS, (100,), (200, 201, 202)),
    Plan("stable, questions", STABLE | QUESTIONS, (100,), (200, 201, 202)),
    Plan("short greeting", STABLE | {"reward": "short_greeting"}, (), (200, 201, 202)),
    Plan("lr 3e-4", STABLE | {"lr": 3e-4}, (100,), (200, 201, 202)),
    Plan("length, lr 3e-4", STABLE | LENGTH | {"lr": 3e-4}, (100,), (200, 201, 202)),
    Plan("words, lr 3e-4", STABLE | WORDS | {"lr": 3e-4}, (), (200, 201, 202)),
    Plan("no KL", LOOSE, (100,), (200, 201, 202)),
    Plan("length, no KL", LOOSE | LENGTH, (), (200, 201, 202)),
    Plan("words, no KL", LOOSE | WORDS, (), (200, 201, 202)),
    Plan("top-k 50", STABLE | {"top_k": 50}, (100,), (200, 201, 202)),
    Plan("length, top-k 50", STABLE | LENGTH | {"top_k": 50}, (), (200, 201, 202)),
    Plan("bfloat16", STABLE | {"precision": "bfloat16"}, (100,), (200, 201, 202)),
    Plan("batch baseline, norm", STABLE | {"baseline": "batch", "advantage_norm": "batch"}, (), (200, 201, 202)),
    Plan("k2 loss, length", STABLE | LENGTH | {"kl": "loss_k2"}, (), (200, 201, 202)),
    Plan("clean, lr 3e-5", CLEAN | {"lr": 3e-5}, (100,), (200, 201, 202)),
    Plan("temperature 0.7", STABLE | {"temperature": 0.7}, (), (200, 201, 202)),
    Plan("3 prompts", STABLE | {"train.prompts_per_step": 3}, (), (200, 201, 202)),
]  # fmt: skip


def params_of(changes: dict[str, Any], seed: int) -> Any:
    """params.yaml with changes; a key without a dot that is no selector is the recipe's."""
    from ruamel.yaml import YAML

    from pipeline.config.load import PARAMS_FILE, validate_params
    from pipeline.config.schema import SELECTORS

    tree = YAML(typ="safe", pure=True).load(PARAMS_FILE.read_text(encoding="utf-8"))
    tree["seed"] = seed
    for key, value in {**SIZES, **changes}.items():
        path = key if "." in key or key in SELECTORS else f"recipes.{changes['recipe']}.{key}"
        *tables, name = path.split(".")
        table = tree
        for part in tables:
            table = table[part]
        table[name] = value
    return validate_params(tree)


def run(plan: Plan, seed: int) -> None:
    """Trains, evaluating before the first update and after each; writes one JSON file."""
    from pipeline.distributed.device import configure_torch
    from pipeline.rl.calibrate import calibrate
    from pipeline.rl.context import build_context
    from pipeline.rl.optimizer import make_optimizer
    from pipeline.rl.state import TrainState
    from pipeline.stages.train import train_step

    file = RUNS / f"{plan.name.replace(' ', '_').replace(',', '')}-{seed}.json"
    if file.exists():
        return
    params = params_of(plan.changes, seed)
    device = configure_torch("cpu", params.train.threads)
    setting, policy = build_context(params, device)
    optimizer = make_optimizer(policy.parameters(), params.selected_recipe)
    progress = TrainState(calibration=calibrate(setting))
    held_out = [evaluate(setting, policy)]
    while progress.step < STEPS and not progress.stopped:
        train_step(progress, setting, policy, optimizer)
        held_out.append(evaluate(setting, policy))
    content = {"plan": plan.name, "seed": seed, "rows": progress.rows, "calibration": progress.calibration,
               "held_out": held_out, "stopped": progress.stopped, "alignment": params.selected_recipe.alignment,
               "prompts": params.train.prompts_per_step}  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".tmp").write_text(json.dumps(content))
    file.with_suffix(".tmp").rename(file)
    print(file, flush=True)


def evaluate(setting: Any, policy: Any) -> dict[str, Any]:
    """Held-out prompts with the same random numbers at every step: rewards [P][S] and statistics of the texts."""
    from pipeline.diagnosis.text import text_statistics
    from pipeline.file_io import read_jsonl
    from pipeline.models.rollout import completion_texts, completion_tokens
    from pipeline.models.scoring import score_microbatched
    from pipeline.rl.batch import half_precision, reward_batch, sample_batch
    from pipeline.rl.seeding import draw_uniforms

    params, recipe = setting.params, setting.params.selected_recipe
    prompts = [row["prompt"] for row in read_jsonl(Path("data/prompts/heldout.jsonl"))][:HELD_OUT]
    noise = draw_uniforms(params.seed, 0, "detector", len(prompts) * SAMPLES, params.train.max_tokens)
    rollout = sample_batch(prompts, setting, policy, noise)
    _, rewards, _ = reward_batch(prompts, rollout, setting)
    with half_precision(recipe, setting.device):
        with setting.reference() as checkpoint:
            reference = score_microbatched(
                checkpoint, rollout, params.train.micro_batch, recipe.temperature, setting.layout.packing
            ).logprobs
        scores = score_microbatched(
            policy, rollout, params.train.micro_batch, recipe.temperature, setting.layout.packing
        )
    mask, entropy = rollout.completion_mask, scores.entropy
    texts, tokens = (
        completion_texts(rollout, setting.tokenizer, "strip", SAMPLES, setting.eos),
        completion_tokens(rollout, setting.eos),
    )
    text = text_statistics(texts, tokens, SAMPLES)
    return {
        "rewards": rewards.tolist(), "entropy": entropy[mask].mean().item(),
        "ref_logprob": reference[mask].mean().item(),
        "empty": text["empty_share"], "repeated": text["repeated_3grams"],
        "distinct": text["distinct_completions"],
    }  # fmt: skip


def run_all(chosen: str, jobs: int) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    runs = [(plan, seed) for plan in PLANS for seed in getattr(plan, chosen)]
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        for future in [pool.submit(run, plan, seed) for plan, seed in sorted(runs, key=lambda pair: pair[1])]:
            future.result()


def main() -> None:
    from benchmarks import detector_tables

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "collect", "tables", "scan"))
    parser.add_argument("set", nargs="?", choices=("choose", "measure"), default="measure")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    match arguments.command:
        case "run":
            run_all(arguments.set, arguments.jobs)
        case "collect":
            detector_tables.collect(RUNS, {plan.name: plan.choose for plan in PLANS})
        case "tables":
            detector_tables.tables()
        case "scan":
            detector_tables.scan(RUNS, {plan.name: plan.choose for plan in PLANS})


if __name__ == "__main__":
    main()
