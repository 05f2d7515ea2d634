"""Experiments that run at the same time, in a workspace without a database: each is complete and its own, and its numbers
are those of a run that had the machine to itself."""

import json
import re
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from ruamel.yaml import YAML

from tests.clones import Clone
from tests.faults import FULL, fault

pytestmark = [pytest.mark.slow, pytest.mark.faults]
PATIENCE_SECONDS = 480


def processes_in(folder: Path) -> list[psutil.Process]:
    """Those that work in a folder, `dvc queue`'s workers among them."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(folder):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def end(clone: Clone) -> None:
    """No process of a test outlives it, whatever became of the test."""
    for process in processes_in(clone.root):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes_in(clone.root), timeout=10)
    assert not processes_in(clone.root)


def tiny(base: Path, cache: Path) -> Clone:
    """One reward, which needs no encoder; prompts and checkpoint made; no database."""
    made = Clone(base / "project", cache)
    made.keep_rewards("length")
    made("dvc", "repro", "check", "prepare", "cache")
    made.commit()
    assert not (made.root / "mlflow.db").exists()
    return made


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Clone]:
    made = tiny(tmp_path, tmp_path / "cache")
    yield made
    end(made)


def experiments(clone: Clone) -> dict[str, dict[str, Any]]:
    """By name: parameters, history and identity of each experiment, as DVC holds them."""
    found = {}
    for line in clone("git", "for-each-ref", "refs/exps", "--format=%(refname)").splitlines():
        if "stash" in line or "/exec/" in line or "celery" in line:
            continue
        shown = {name: clone("git", "show", f"{line}:{name}") for name in ("params.yaml", "dvc.lock")}
        lock = YAML(typ="safe", pure=True).load(shown["dvc.lock"])
        outputs = {out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage.get("outs", [])}
        digest = outputs["reports/train/run.json"]
        cached = clone.root.parent / "cache/dvc/files/md5" / digest[:2] / digest[2:]
        found[line.rpartition("/")[2]] = {
            "seed": YAML(typ="safe", pure=True).load(shown["params.yaml"])["seed"],
            "history": clone("git", "show", f"{line}:reports/train/history.csv"),
            "run": json.loads(cached.read_text()),
            "outputs": outputs,
        }
    return found


def in_mlflow(clone: Clone) -> dict[str, dict[str, Any]]:
    """By train_key: status, tags, parameters and points of every run in the store, read without mlflow."""
    found: dict[str, dict[str, Any]] = {}
    with closing(sqlite3.connect(clone.root / "mlflow.db")) as store:
        for run, status in store.execute("select run_uuid, status from runs where lifecycle_stage = 'active'"):
            tags = dict(store.execute("select key, value from tags where run_uuid = ?", [run]))
            assert tags["train_key"] not in found, "two runs of one training"
            found[tags["train_key"]] = {
                "status": status,
                "tags": tags,
                "params": dict(store.execute("select key, value from params where run_uuid = ?", [run])),
                "points": sorted(
                    store.execute("select key, step, value from metrics where run_uuid = ? and is_nan = 0", [run])
                ),
            }
    return found


def points(history: str) -> list[tuple[str, int, float]]:
    """What MLflow has to hold of a history.csv."""
    header, *lines = [line.split(",") for line in history.strip().split("\n")]
    rows = [dict(zip(header, cells, strict=True)) for cells in lines]
    return sorted(
        (f"train/{name}", int(row["step"]), float(cell))
        for row in rows
        for name, cell in row.items()
        if name != "step" and cell not in ("", "nan")
    )


def assert_complete(clone: Clone, seeds: list[int]) -> dict[int, str]:
    """One experiment and one whole MLflow run a seed, each with its own values; gives the histories by seed."""
    found, runs = experiments(clone), in_mlflow(clone)
    assert sorted(experiment["seed"] for experiment in found.values()) == seeds
    assert len(runs) == len(seeds)
    for name, experiment in found.items():
        run = runs[experiment["run"]["train_key"]]
        assert experiment["run"]["params"]["seed"] == experiment["seed"] == int(run["params"]["seed"])
        assert (run["status"], run["tags"]["dvc_exp_name"]) == ("FINISHED", name)
        training = [point for point in run["points"] if point[0].startswith("train/")]
        assert training == points(experiment["history"])
        assert any(key.startswith("evaluate/length/") for key, _, _ in run["points"])
    assert not list((clone.root / ".checkpoints").glob("*/.*.tmp"))
    return {experiment["seed"]: experiment["history"] for experiment in found.values()}


def queue_states(clone: Clone) -> list[str]:
    """Success, Failed, Running or Queued, an experiment each. `dvc queue start` and --run-all exit with 0 whatever
    becomes of the experiments."""
    return re.findall(r"\b(Success|Failed|Running|Queued)\b", clone("dvc", "queue", "status"))


def run_queue(clone: Clone, experiments: int) -> None:
    """Two at a time, until all have succeeded."""
    clone("dvc", "queue", "start", "--jobs", "2")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while set(queue_states(clone)) & {"Queued", "Running"} and processes_in(clone.root):
        assert time.monotonic() < deadline, processes_in(clone.root)
        time.sleep(5)
    assert queue_states(clone) == ["Success"] * experiments, clone("dvc", "queue", "status")


@pytest.mark.skipif(not FULL, reason="tests/test_sweep.py queues four; six under FAULTS=full")
def test_a_queue_of_experiments_at_two_jobs(clone: Clone) -> None:
    seeds = [1, 2, 3, 4, 5, 6]
    with fault("experiments of a queue at the same time"):
        clone("dvc", "exp", "run", "--queue", "-S", f"seed=range(1,{1 + len(seeds)})")
        run_queue(clone, len(seeds))
        histories = assert_complete(clone, seeds)
        assert len(set(histories.values())) == len(seeds)
    with fault("the same experiment alone gives the same bytes"):
        alone = tiny(clone.root.parent / "alone", clone.root.parent / "alone/cache")
        alone("dvc", "exp", "run", "-S", "seed=2")
        assert alone.read("reports/train/history.csv") == histories[2]


@pytest.mark.skipif(not FULL, reason="minutes on two cores: under FAULTS=full")
def test_experiments_in_folders_of_their_own_at_once(clone: Clone) -> None:
    seeds = [1, 2, 3, 4]
    with fault("--temp experiments at the same time"):
        with ThreadPoolExecutor(len(seeds)) as at_once:
            list(at_once.map(lambda seed: run_temp(clone, seed), seeds))
        assert_complete(clone, seeds)


def run_temp(clone: Clone, seed: int) -> None:
    """DVC sets up one experiment at a time and refuses another one meanwhile, before it runs: the command is repeated."""
    command = ["dvc", "exp", "run", "--temp", "-S", f"seed={seed}"]
    for _ in range(30):
        done = subprocess.run(command, cwd=clone.root, env=clone.environment, capture_output=True, text=True)
        if done.returncode == 0 or "Unable to acquire lock" not in done.stderr:
            break
        assert "Running stage" not in done.stdout, done.stdout + done.stderr
        time.sleep(seed)
    assert done.returncode == 0, done.stdout + done.stderr
