"""DVC experiments of a clone, and that each of them is complete and its own."""

import json
import re
import sqlite3
import time
from contextlib import closing
from typing import Any

from ruamel.yaml import YAML

from tests.clones import Clone, processes_in

PATIENCE_SECONDS = 480


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
