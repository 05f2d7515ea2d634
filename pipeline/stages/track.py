"""Stage `track`: the complete record of the run in MLflow, made from the files of the earlier stages.

The files are the record and MLflow is a view of them, so running this again changes nothing, and running it by hand
(`reinforce track`) repairs a lost database and ends runs whose process has died. One content key is one run:
evaluating the same policy with other `evaluate` parameters adds newer values to the same metrics of the same run.
"""

import json
import math
import os
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from pipeline import file_io
from pipeline.errors import UserError, run_stage
from pipeline.runs import provenance, workspace
from pipeline.runs.dvc_git import git
from pipeline.tracking import mlflow_store
from pipeline.tracking.mlflow_store import Point
from pipeline.tracking.record import EVALUATION, HISTORY, REPORTS, RUN, Record, read_record

if TYPE_CHECKING:
    from mlflow import MlflowClient

DIGEST_CHARACTERS = 16  # MLflow allows 36; a person reads them in the run table


def main() -> None:
    """Raises UserError when a file is missing, or when the store cannot be reached or written."""
    record = read_record()
    mlflow_store.defaults(timeout=30, retries=3)
    try:
        from alembic.util import CommandError
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError as error:
        raise UserError(f"track needs mlflow, which is not installed ({error}): pip install -e '.[pipeline]'") from None
    try:
        client, experiment = mlflow_store.open_store()
        with mlflow_store.lock(f"run-{record.train_key[:16]}"):
            write_record(client, experiment, record)
        if "DVC_STAGE" not in os.environ:
            end_dead_runs(client, experiment)
    except (MlflowException, SQLAlchemyError, CommandError, OSError, ImportError) as error:
        raise UserError(f"MLflow store {mlflow_store.describe_error(error)}; then run `reinforce track`") from None
    names = sorted(
        (Path(folder) / file.name).as_posix() for folder, files in record.artifacts.items() for file in files
    )
    file_io.write_json(
        REPORTS / "track/track.json",
        {
            "train_key": record.train_key,
            "metrics_logged": len(record.training) + len(record.evaluation),
            "steps": record.steps,
            "artifacts": names,
        },
    )
    drop_resume_state(record.train_key)


def write_record(client: "MlflowClient", experiment: str, record: Record) -> None:
    """Makes the run of this train_key say what the files say, whatever part of it is there already."""
    run = mlflow_store.find_run(client, experiment, record.train_key)
    logged = mlflow_store.logged_points(client, run) if run else []
    if run and _contradict(logged, record.training):
        # Points cannot be corrected. Rounding on another type of CPU, or a run edited by hand.
        print(f"note: MLflow run {run.info.run_name} differs from {HISTORY}; deleted and made anew", file=sys.stderr)
        client.delete_run(run.info.run_id)
        run, logged = None, []
    if run is None:
        start_ms = min(point.timestamp_ms for point in record.training)
        run = mlflow_store.create_run(client, experiment, record.train_key, record.params, start_ms)
    run_id, known = run.info.run_id, {(point.key, point.step) for point in logged}
    mlflow_store.log_params(client, run, record.params)
    missing = [point for point in record.training + record.timings if (point.key, point.step) not in known]
    mlflow_store.log_points(client, run_id, missing + _new_evaluation(record, logged))
    client.log_inputs(run_id, datasets=_inputs(record))
    for folder, files in record.artifacts.items():
        for file in files:
            client.log_artifact(run_id, str(file), folder or None)
    for key, value in _tags(record).items():
        client.set_tag(run_id, key, value)
    if os.environ.get("DVC_EXP_NAME"):
        client.update_run(run_id, name=mlflow_store.run_name(record.params, record.train_key))
    if run.info.status != "FINISHED":
        end_ms = max(point.timestamp_ms for point in record.training)
        client.set_terminated(run_id, "FINISHED", max(end_ms, run.info.start_time))


def end_dead_runs(client: "MlflowClient", experiment: str) -> None:
    """Ends as KILLED the RUNNING runs of this host whose process is gone; says how many it cannot judge."""
    elsewhere = 0
    for run in client.search_runs([experiment], "attributes.status = 'RUNNING'"):
        if run.data.tags.get("host") != socket.gethostname():
            elsewhere += 1
        elif not _alive(int(run.data.tags.get("pid", 0))):
            times = [point.timestamp_ms for point in mlflow_store.logged_points(client, run)]
            client.set_terminated(run.info.run_id, "KILLED", max([run.info.start_time, *times]))
            print(f"run {run.info.run_name}: its process is gone, marked KILLED")
    if elsewhere:
        print(f"note: {elsewhere} runs are RUNNING on other hosts; only there can it be seen whether they still are")


def drop_resume_state(train_key: str) -> None:
    """Deletes the resume state once dvc.lock says that the outputs of this training are committed. The timings stay:
    they are nowhere else but in MLflow."""
    folder = workspace.root() / ".checkpoints" / train_key
    if not folder.is_dir() or not workspace.is_committed(RUN.read_text(encoding="utf-8")):
        return
    try:
        with FileLock(folder.with_suffix(".lock"), timeout=0):  # the trainer's
            for state in sorted(folder.glob("state-*.pt")):  # the oldest first: a kill leaves the newest, whole
                state.unlink()
    except Timeout:
        print("note: this very run is being trained again; its resume state is left alone", file=sys.stderr)


def _contradict(logged: list[Point], training: list[Point]) -> bool:
    """Whether the run holds a training value twice, or one that the files do not."""
    values = {(point.key, point.step): point.value for point in training}
    columns = {point.key for point in training}
    found = [point for point in logged if point.key in columns]
    different = any(not math.isclose(point.value, values.get((point.key, point.step), math.nan)) for point in found)
    return different or len({(point.key, point.step) for point in found}) < len(found)


def _new_evaluation(record: Record, logged: list[Point]) -> list[Point]:
    """The evaluation metrics whose newest logged value is another one, at the last step and a later time."""
    last_step, now_ms = max(point.step for point in record.training), time.time_ns() // 1_000_000
    newest: dict[str, Point] = {}
    for point in sorted(logged, key=lambda point: (point.step, point.timestamp_ms, point.value)):
        newest[point.key] = point
    points = []
    for key, value in record.evaluation.items():
        before = newest.get(key)
        if before is None or before.value != value:
            later_ms = max(now_ms, before.timestamp_ms + 1) if before else now_ms
            points.append(Point(key, last_step, value, later_ms))
    return points


def _inputs(record: Record) -> list[Any]:
    """The prompts and the checkpoint as MLflow datasets."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    def dataset(name: str, digest: str, source: str, profile: Any, context: str) -> DatasetInput:
        entity = Dataset(
            name, digest[:DIGEST_CHARACTERS], "local", json.dumps({"uri": source}), profile=json.dumps(profile)
        )
        return DatasetInput(entity, [InputTag("mlflow.data.context", context)])

    prompts, model = f"prompts-{record.params.get('prompts')}", f"checkpoint-{record.params.get('model')}"
    return [
        dataset(prompts, str(record.run["prompts"]), "data/prompts/train.jsonl", record.prompts, "training"),
        dataset(model, str(record.run["checkpoint"]), "data/checkpoint/policy", {}, "checkpoint"),
    ]


def _tags(record: Record) -> dict[str, str]:
    """Where the run came from, as of now; what is unknown (no git, no experiment) keeps its earlier value."""
    commit, changes = _commit()
    tags = {
        "evaluate_key": file_io.sha256(EVALUATION),
        "measured": record.measured,
        **{name: str(record.run.get(name, "")) for name in provenance.DIGESTS},
        "git_commit": commit,
        "mlflow.source.git.commit": commit,
        "git_dirty": None if changes is None else str(bool(changes)).lower(),
        "verdict": record.diagnosis["verdict"],
        "collapse_onset": str(record.diagnosis["onset"]).lower(),  # none: healthy
        "collapse_kinds": ", ".join(finding["kind"] for finding in record.diagnosis["findings"]) or "none",
        "cure": record.diagnosis["cure"]["command"] if record.diagnosis["cure"] else "none",
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


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return pid > 0


if __name__ == "__main__":
    run_stage(main)
