"""The record of one run, read from the files that `train` and the other stages wrote: what MLflow shows of it."""

import base64
import math
import os
import re
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import file_io
from pipeline.errors import UserError
from pipeline.paths import CHECKPOINT, REPORTS, RUN_FILES, TRAIN_PROMPTS
from pipeline.runs import consistency, provenance, workspace
from pipeline.runs.dvc_git import git
from pipeline.tracking.mlflow_store import Point, Scalar

TABLES = [
    RUN_FILES.run, RUN_FILES.history, RUN_FILES.summary, RUN_FILES.samples, RUN_FILES.calibration, RUN_FILES.diagnosis,
    RUN_FILES.metrics, RUN_FILES.measured, RUN_FILES.completions,
]  # fmt: skip


@dataclass(frozen=True)
class Record:
    """What the files say about one run."""

    train_key: str
    status: str  # MLflow's: RUNNING, FINISHED, FAILED, KILLED
    params: dict[str, Scalar]
    steps: int
    points: list[Point]  # train/ and time/
    tags: dict[str, str]
    # of a finished run, with what the stages behind `train` made:
    evaluation: dict[str, float] = field(default_factory=dict)
    # name, digest, place, profile, what it is to the run
    datasets: list[tuple[str, str, str, Any, str]] = field(default_factory=list)
    artifacts: dict[str, list[Path]] = field(default_factory=dict)  # folder of the artifact store -> files


def read_growing(folder: Path, pid: int, status: str) -> Record:
    """What a run at work in `.checkpoints/<train_key>/` has come to: the steps up to its last state. Its process is in the
    tags, so that `track` can tell whether it is still there."""
    run = _json(folder / "run.json")
    files = folder / "history.csv", folder / "timings.csv"
    history, timings = (_rows(file) if file.exists() else {} for file in files)
    history = {step: row for step, row in history.items() if step in timings}  # written one after the other
    tags = _digests(run) | {"host": socket.gethostname(), "pid": str(pid)}
    return Record(run["train_key"], status, run["params"], len(history), _points(history, timings, 0), tags)


def read_record() -> Record:
    """The record of a finished run. Reads every file before anything is written. Raises UserError naming a file that is missing, broken, or of another
    run than the others: `dvc repro train` alone leaves those of the stages behind it as they were."""
    figures = sorted(RUN_FILES.figures.glob("*.png"))
    files = {"tables": TABLES, "figures": figures, "": [RUN_FILES.page]}
    for file in [*TABLES, RUN_FILES.prepare, RUN_FILES.page]:
        if not file.is_file():
            raise UserError(f"{file}: no such file; `dvc repro` makes it")
    run, prompts, evaluation, summary = (
        _json(RUN_FILES.run),
        _json(RUN_FILES.prepare),
        _json(RUN_FILES.metrics),
        _json(RUN_FILES.summary),
    )
    key, params = str(run.get("train_key")), run.get("params")
    if not re.fullmatch("[0-9a-f]{64}", key) or not isinstance(params, dict):
        raise UserError(
            f"{RUN_FILES.run}: should hold train_key, 64 hexadecimal digits, and params; {consistency.how_to_remake('train')}"
        )
    timings_file = workspace.resume_folder(key) / "timings.csv"
    timings = _timings(timings_file)
    written_ms = RUN_FILES.history.stat().st_mtime_ns // 1_000_000
    history, diagnosis = _rows(RUN_FILES.history), _json(RUN_FILES.diagnosis)
    if (steps := summary.get("steps")) != len(history):
        raise UserError(
            f"{RUN_FILES.history}: {len(history)} rows, and {RUN_FILES.summary} says {steps} steps; {consistency.how_to_remake('train')}"
        )
    if missing := {"verdict", "onset", "findings", "cure", "history"} - diagnosis.keys():
        raise UserError(f"{RUN_FILES.diagnosis}: has no {min(missing)}; {consistency.how_to_remake('diagnose')}")
    measured = consistency.measured_in(_read(RUN_FILES.measured))
    if not measured:
        raise UserError(
            f"{RUN_FILES.measured}: does not say what was evaluated; {consistency.how_to_remake('evaluate')}"
        )
    consistency.raise_if_mixed("train", "diagnose", "evaluate", "plot")
    page = RUN_FILES.page.read_text(encoding="utf-8", errors="replace")
    if wrong := [file for file in figures if base64.b64encode(file.read_bytes()).decode() not in page]:
        raise UserError(f"{wrong[0]}: is not the figure in {RUN_FILES.page}; {consistency.how_to_remake('plot')}")
    name, model = f"prompts-{params.get('prompts')}", f"checkpoint-{params.get('model')}"
    return Record(
        train_key=key,
        status="FINISHED",
        params={**params, "processes": ", then ".join(map(str, run.get("processes", [1])))},
        steps=len(history),
        points=_points(history, timings, written_ms),
        tags=_tags(run, diagnosis, provenance.digest([measured["prompts"], measured["params"]])),
        evaluation={
            f"evaluate/{path.replace('.', '/')}": float(value)
            for path, value in file_io.flatten(evaluation).items()
            if value is not None
        },
        datasets=[
            (name, str(run["prompts"]), TRAIN_PROMPTS.as_posix(), prompts, "training"),
            (model, str(run["checkpoint"]), (CHECKPOINT / "policy").as_posix(), {}, "checkpoint"),
        ],
        artifacts=files,
    )


def _json(file: Path) -> dict[str, Any]:
    value = _read(file)
    if not isinstance(value, dict):
        raise UserError(f"{file}: should hold a JSON object, not {type(value).__name__}{_again(file)}")
    return value


def _read(file: Path) -> Any:
    try:
        return file_io.read_json(file)
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON: {error}{_again(file)}") from None


def _again(file: Path) -> str:
    """The advice for a file in reports/, whose folders are named as the stages; nothing for others."""
    if REPORTS not in file.parents:
        return ""
    stage = {RUN_FILES.prepare: "prepare", RUN_FILES.diagnosis: "diagnose", RUN_FILES.page: "plot"}.get(
        file, file.parent.name
    )
    return f"; {consistency.how_to_remake(stage)}"


def _rows(file: Path) -> dict[int, dict[str, float]]:
    """Rows of a CSV file by step; an empty cell is left out. The last row of a step counts."""
    try:
        return {int(row.pop("step")): row for row in file_io.read_csv(file)}
    except (KeyError, ValueError) as error:
        raise UserError(f"{file}: should hold a step and numbers: {error!r}{_again(file)}") from None


def _timings(file: Path) -> dict[int, dict[str, float]]:
    """Clock times of the steps, as far as they are known: nothing that is right depends on them."""
    try:
        return _rows(file) if file.is_file() else {}
    except UserError as error:
        print(f"warning: {error}; the times of the steps are left out", file=sys.stderr)
        return {}


def _points(
    history: dict[int, dict[str, float]], timings: dict[int, dict[str, float]], otherwise_ms: int
) -> list[Point]:
    """The finite values of the steps of the history, at the time of the step or else at `otherwise_ms`: in MLflow's charts
    an undefined value is a gap."""
    times = {step: int(row.get("timestamp_ms", otherwise_ms)) for step, row in timings.items()}
    return [
        Point(f"{group}/{name}", step, value, times.get(step, otherwise_ms))
        for group, rows in (("train", history), ("time", timings))
        for step in history
        for name, value in rows.get(step, {}).items()
        if name != "timestamp_ms" and math.isfinite(value)
    ]


def _digests(run: dict[str, Any]) -> dict[str, str]:
    return {name: str(run.get(name, "")) for name in provenance.DIGESTS}


def _tags(run: dict[str, Any], diagnosis: dict[str, Any], measured: str) -> dict[str, str]:
    """Where the run came from, as of now; what is unknown (no git, no experiment) keeps its earlier value."""
    commit, changes = _commit()
    tags = {
        "evaluate_key": file_io.sha256(RUN_FILES.metrics),
        "measured": measured,  # what was evaluated on, and how
        **_digests(run),
        "git_commit": commit,
        "mlflow.source.git.commit": commit,
        "git_dirty": None if changes is None else str(bool(changes)).lower(),
        "verdict": diagnosis["verdict"],
        "collapse_onset": str(diagnosis["onset"]).lower(),  # none: healthy
        "collapse_kinds": ", ".join(finding["kind"] for finding in diagnosis["findings"]) or "none",
        "cure": diagnosis["cure"]["command"] if diagnosis["cure"] else "none",
        "dvc_exp_name": os.environ.get("DVC_EXP_NAME"),
        "dvc_exp_baseline_rev": os.environ.get("DVC_EXP_BASELINE_REV"),
    }
    return {key: value for key, value in tags.items() if value}


def _commit() -> tuple[str | None, str | None]:
    """HEAD and what differs from it. None, and a note of what git says, where it tells neither."""
    try:
        changes = git("status", "--porcelain", "--untracked-files=normal", "--", ".", ":!reports", ":!dvc.lock")
        return git("rev-parse", "--verify", "HEAD"), changes
    except UserError as error:
        print(f"note: the run's commit is not recorded: {error}", file=sys.stderr)
        return None, None
