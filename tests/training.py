"""Projects in which `train` runs in seconds, on a tiny model, and what it leaves in them."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from pipeline.distributed.launch import CONFIG
from pipeline.file_io import folder_digests, read_json, read_jsonl
from pipeline.stages import train
from pipeline.stages.cache import name_float32
from tests.project import Project

OUTPUTS = ("data/policy", "data/healthy", "data/best", "reports/train")


def with_encoder(policy: Path, encoder: Path) -> Path:
    folder = policy.parent
    shutil.copytree(encoder, folder / "encoder")
    name_float32(policy / "config.json")
    write_manifest(folder)
    layout = {"layout": {"sampling": "left_padding", "packing": True}, "longest": 128}
    (folder / "layout.json").write_text(json.dumps(layout))
    return folder


def write_manifest(folder: Path) -> None:
    """As `cache` writes it, for a checkpoint from a directory."""
    origin = {"origin": "models/local/policy", "revision": None, "commit": None}
    manifest = {"policy": {**origin, "files": folder_digests(folder / "policy")}}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def make_ready(project: Project, checkpoint: Path) -> Project:
    shutil.copytree(checkpoint, project.root / "data/checkpoint")
    prompts = ["Hello there!", "Who are you?", "Thanks a lot.", "Tell me about rain, please."]
    for name in ("train", "heldout"):
        lines = [json.dumps({"prompt": prompt, "message_id": None}) + "\n" for prompt in prompts]
        (project.root / "data/prompts").mkdir(exist_ok=True)
        (project.root / f"data/prompts/{name}.jsonl").write_text("".join(lines))
    # A machine without mlflow: training needs none, and is quicker for it.
    (project.root / "mlflow.py").write_text("raise ImportError('not here', name='mlflow')\n")
    sizes = {
        "steps": 6,
        "prompts_per_step": 3,
        "samples_per_prompt": 2,
        "max_tokens": 6,
        "checkpoint_every": 1,
        "threads": 1,
    }
    project.edit(reward="length", **{f"train__{key}": value for key, value in sizes.items()})
    project.edit(evaluate__prompts=0, evaluate__samples_per_prompt=2, evaluate__bootstrap=100)
    return project


def contents(project: Project) -> dict[str, bytes]:
    files = [path for folder in OUTPUTS for path in sorted((project.root / folder).rglob("*")) if path.is_file()]
    return {path.relative_to(project.root).as_posix(): path.read_bytes() for path in files}


def history(project: Project) -> list[dict[str, float]]:
    with (project.root / "reports/train/history.csv").open(newline="") as lines:
        return [{key: float(cell) for key, cell in row.items()} for row in csv.DictReader(lines)]


def forget(project: Project) -> None:
    """As DVC before it runs the stage, and without resume states."""
    for folder in (*OUTPUTS, ".checkpoints"):
        shutil.rmtree(project.root / folder, ignore_errors=True)


def succeed(project: Project, **environment: str) -> str:
    """The stage as a process of its own; gives what it said on stderr."""
    done = project.run("train", **environment)
    assert done.returncode == 0, done.stderr
    return done.stderr


def end_before(step: int) -> None:
    """The stage in this process, ended by Ctrl-C before this step."""
    real = train.train_step

    def ending(run: Any, *arguments: Any) -> Any:
        if run.step == step:
            raise KeyboardInterrupt
        return real(run, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", ending)
        with pytest.raises(KeyboardInterrupt):
            train.main()


def states(project: Project) -> list[Path]:
    return sorted(project.root.glob(".checkpoints/*/state-*.pt"))


def interrupted(project: Project, environment: dict[str, str], number: signal.Signals) -> str:
    """The stage, ended by a signal as soon as there is a state, to its launcher, or, if it is to be killed, to all;
    what it said on stderr."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.stages.train"], cwd=project.root, env=project.environment | environment,
        text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    while not states(project):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.005)
    if number == signal.SIGKILL:  # torch's launcher gives each process a session of its own, and they would live on
        (owner,) = project.root.glob(".checkpoints/*/owner")
        os.kill(int(owner.read_text()), number)  # without it the other ones fail
        process.kill()
    else:
        process.send_signal(number)
    _, said = process.communicate(timeout=300)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert number == signal.SIGKILL or "Traceback" not in said
    return said


def configured(project: Project, count: int) -> dict[str, str]:
    """The environment that has accelerate start so many processes; the file as `accelerate config` writes it."""
    lines = ["compute_environment: LOCAL_MACHINE", "distributed_type: MULTI_GPU", f"num_processes: {count}",
        "num_machines: 1",
             "machine_rank: 0", "mixed_precision: 'no'", "main_process_port: 0", "use_cpu: false",
             "gpu_ids: all"]  # fmt: skip
    (project.root / "processes.yaml").write_text("\n".join(lines) + "\n")
    return {CONFIG: "processes.yaml"}


def recorded(project: Project) -> dict[str, object]:
    return json.loads((project.root / "reports/train/run.json").read_text())


STEPS = 12  # enough for a run to be ended in the midst of them
SMOOTH_ADAM = {"recipes__stable__adam_eps": 1.0, "recipes__stable__lr": 0.1}


SUM = """
def vowels(completions):
    found = [sum(character in "aeiouAEIOU" for character in text) for text in completions]
    return [float(count) if count else None for count in found]
"""


def exactly(project: Project) -> Project:
    (project.root / "custom/vowels.py").write_text(SUM)
    vowels = {"weight": 3.0, "reward": {"kind": "custom", "function": "custom/vowels.py:vowels"}}
    length = {"weight": 1.0, "reward": {"kind": "length", "target": 40}}
    project.edit(reward="both", rewards__both={"kind": "sum", "terms": [length, vowels]})
    project.edit(recipes__stable__precision="float32", train__prompts_per_step=4, train__steps=STEPS, **SMOOTH_ADAM)
    project.edit(evaluate__every=5, evaluate__curve_prompts=4, train__keep_samples="all")
    return project


def sampled(project: Project) -> bytes:
    return contents(project)["reports/train/samples.jsonl"]


def all_tokens(project: Project) -> list[list[int]]:
    return list(map(list, pd.read_parquet(project.root / "reports/train/samples/all.parquet")["tokens"]))


def assert_same_curve(project: Project, rows: list[dict[str, Any]], best: dict[str, Any]) -> None:
    """Of another number of processes: the same completions, distances to rounding."""
    found = read_jsonl(project.root / "reports/train/heldout.jsonl")
    words = [(row["step"], row["prompt"], row["completion"], row["reward"]) for row in rows]
    assert [(row["step"], row["prompt"], row["completion"], row["reward"]) for row in found] == words
    assert [row["kl"] for row in found] == pytest.approx([row["kl"] for row in rows], rel=1e-2, abs=1e-4)
    assert read_json(project.root / "data/best/best.json") == best


def curve(project: Project) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    root = project.root
    return read_jsonl(root / "reports/train/heldout.jsonl"), read_json(root / "data/best/best.json")
