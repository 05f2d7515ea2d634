"""Made-up trainings, and what MLflow holds of them."""

import base64
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from pipeline.file_io import write_csv
from pipeline.runs import consistency
from pipeline.tracking import follow, mlflow_store
from tests.project import ROOT
from tests.seal import seal

KEY = "1f" * 32
START_MS = 1_700_000_000_000
PARAMS = {
    "reward": "embedding",
    "recipe": "stable",
    "model": "pocket",
    "prompts": "pocket",
    "encoder": "minilm",
    "seed": 0,
    "recipe.lr": 1e-4,
}
COLUMNS = ["reward_mean", "loss", "entropy", "nonfinite"]
STEPS = 12


def value(column, step):
    return 1.0 / (3 + step) - COLUMNS.index(column) if column != "nonfinite" else 0.0


def row(step):
    """The history of a step, as training holds it; the loss of step 0 is undefined."""
    return {name: float("nan") if (name, step) == ("loss", 0) else value(name, step) for name in COLUMNS}


def timestamp(step):
    return START_MS + 1000 * step


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def make_reports(key=KEY, steps=STEPS, params=PARAMS, timings=True):
    """The files of the earlier stages in the current directory, as the stages write them."""
    write(Path("reports/train/run.json"), json.dumps(identity(key, params)))
    rows = [",".join("" if cell != cell else repr(cell) for cell in row(step).values()) for step in range(steps)]
    lines = [",".join(["step", *COLUMNS]), *(f"{step},{cells}" for step, cells in enumerate(rows))]
    write(Path("reports/train/history.csv"), "\n".join(lines) + "\n")
    write(Path("reports/train/summary.json"), json.dumps({"steps": steps, "first": {}, "last": {}}))
    write(Path("reports/train/samples.jsonl"), '{"step": 0, "prompt": "Hi", "completion": "you"}\n')
    write(Path("reports/train/samples/kept.json"), '{"keep_samples": "some", "completions": 8}')
    write(Path("reports/evaluate/metrics.json"), json.dumps(evaluation(-6.5)))
    write(Path("reports/evaluate/completions.jsonl"), '{"prompt": "Hi", "sample": 0}\n')
    write(Path("reports/train/terms.jsonl"), "")
    write(Path("reports/train/heldout.jsonl"), "")
    write(Path("reports/evaluate/curve.jsonl"), "")
    write(Path("reports/train/calibration.csv"), "batch,entropy\n0,3.5\n")
    write(Path("reports/prepare.json"), json.dumps({"train": {"read": 500, "kept": 300}}))
    write(Path("reports/figures/reward.png"), "png")
    write_diagnosis()
    if timings:
        lines = ["step,timestamp_ms,seconds_sample", *(f"{step},{timestamp(step)},0.5" for step in range(steps))]
        write(Path(f".checkpoints/{key}/timings.csv"), "\n".join(lines) + "\n")


def evaluation(mean, reward="embedding"):
    """metrics.json of one reward: four defined numbers."""
    nothing, sides = {"mean": None, "low": None, "high": None}, {"checkpoint": None, "policy": None}
    policy = {"mean": mean, "low": mean - 0.25, "high": mean + 0.25}
    of_reward = {"checkpoint": nothing, "policy": policy, "difference": nothing, "win_rate": 0.75}
    return {reward: of_reward, "text": sides, "ref_logprob_per_token": sides}


def write_diagnosis(verdict="healthy", onset=None, kinds=(), command=None, headline="The verdict in words."):
    finding = {
        "title": "",
        "onset": 8,
        "summary": "",
        "evidence": [],
        "completions": [],
        "changes": {},
        "reason": "",
        "source": "",
    }
    diagnosis = {"verdict": verdict, "onset": onset, "headline": headline, "steps": STEPS, "healthy_step": 0,
                 "independent": "reference", "over_optimisation": "", "best": None,
                 "findings": [{"kind": kind, **finding} for kind in kinds]}  # fmt: skip
    diagnosis["notes"] = []
    diagnosis["cure"] = {"changes": {"seed": 1}, "command": command} if command else None
    write(Path("reports/diagnosis.json"), json.dumps(diagnosis))
    belong_together()


def belong_together(title="Report", **measured):
    """Makes the files those of one run, and the page and its figure show them."""
    seal(Path("reports"), **measured)
    figure = base64.b64encode(Path("reports/figures/reward.png").read_bytes()).decode()
    write(Path("reports/page/report.html"), f'<h1>{title}</h1><meta content="{consistency.sources()}">{figure}')


def identity(key=KEY, params=PARAMS):
    own = {"train_key": key, "code": "c0" * 32, "prompts": "a1" * 32, "checkpoint": "b2" * 32, "params": params}
    return {**own, "processes": [1]}


def grow(steps, key=KEY, params=PARAMS):
    """The folder of a run at work after so many steps, as `train` writes it at each state."""
    folder = Path(f".checkpoints/{key}")
    write(folder / "run.json", json.dumps(identity(key, params)))
    if steps:
        write_csv(folder / "history.csv", [{"step": step, **row(step)} for step in range(steps)])
        timings = [{"step": step, "timestamp_ms": timestamp(step), "seconds_sample": 0.5} for step in range(steps)]
        write_csv(folder / "timings.csv", timings)
    return folder


def train_live(steps, flush_every=5, status="KILLED", key=KEY, start=0, params=PARAMS, meanwhile=lambda step: None):
    """A run from its step `start` to its end, whose states the follower sees one by one."""
    saved = [*(step for step in range(start, steps) if step and step % flush_every == 0), steps]
    mlflow_store.defaults(timeout=5, retries=1)

    def wait():
        if not saved:
            return status
        meanwhile(saved[0])
        grow(saved.pop(0), key=key, params=params)
        return "RUNNING"

    follow.follow(grow(start, key=key, params=params), os.getpid(), wait)


def wait_until(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def lose_database():
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    Path("mlflow.db").unlink()
    for engine in SqlAlchemyStore._engine_map.values():
        engine.dispose()  # a later `track` is another process, without open connections to the lost file


def stored_runs(key=KEY):
    client, experiment = mlflow_store.open_store()
    return client, client.search_runs([experiment], f"tags.train_key = '{key}'")


def assert_complete(steps=STEPS, columns=COLUMNS):
    """One run, with every defined value of the history once, at its step."""
    client, runs = stored_runs()
    assert len(runs) == 1
    for column in columns:
        history = client.get_metric_history(runs[0].info.run_id, f"train/{column}")
        expected = {step: value(column, step) for step in range(steps) if (column, step) != ("loss", 0)}
        assert len(history) == len(expected)
        assert {metric.step: metric.value for metric in history} == expected
    assert runs[0].info.status == "FINISHED"
    return client, runs[0]


TRAINER = """
import os, signal, sys, time
from pipeline.runs import follower
from tests.mlflow_runs import STEPS, grow, identity

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
seconds, follower.CLOSE_SECONDS, end = float(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
with follower.follower(grow(0), identity()):
    for steps in (5, 10, STEPS):
        time.sleep(seconds)
        grow(steps)
    if end == "waits":
        time.sleep(600)
    if end == "signal":
        sys.exit(143)
    closing = time.monotonic()
assert time.monotonic() - closing < follower.CLOSE_SECONDS + 1
"""


def start_trainer(end="", seconds=0.0, close_seconds=15.0):
    """A process that trains as `train` does: it writes its states, each after `seconds`, and starts the follower."""
    return subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(seconds), str(close_seconds), end], text=True, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
    )  # fmt: skip
