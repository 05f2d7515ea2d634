"""Stage `track`: the complete run in MLflow, from the files of the earlier stages.

The files are the truth and MLflow mirrors them: running this again changes nothing, and running it by hand (`reinforce
track`) repairs a lost database and ends runs whose process has died. One train_key is one run: evaluating the same
policy with other `evaluate` parameters adds newer values to the metrics of that run.
"""

import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from pipeline import file_io
from pipeline.errors import UserError, run_stage
from pipeline.paths import RUN_FILES, resume_files
from pipeline.runs import workspace
from pipeline.tracking import mlflow_store
from pipeline.tracking.record import read_record
from pipeline.tracking.sync import sync

if TYPE_CHECKING:
    from mlflow import MlflowClient


def main() -> None:
    """Raises UserError if a file is missing, or the store cannot be reached or written."""
    record = read_record()
    mlflow_store.defaults(timeout=30, retries=3)
    try:
        from alembic.util import CommandError
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError as error:
        raise UserError(f"track needs mlflow, which is not installed ({error}): pip install -e '.[pipeline]'") from None
    try:
        synced = sync(record)
        if "DVC_STAGE" not in os.environ:
            end_dead_runs(synced.client, synced.experiment)
    except (MlflowException, SQLAlchemyError, CommandError, OSError, ImportError) as error:
        raise UserError(f"MLflow store {mlflow_store.describe_error(error)}; then run `reinforce track`") from None
    names = sorted(
        (Path(folder) / file.name).as_posix() for folder, files in record.artifacts.items() for file in files
    )
    file_io.write_json(
        RUN_FILES.track,
        {
            "train_key": record.train_key,
            "metrics_logged": sum(point.key.startswith("train/") for point in record.points) + len(record.evaluation),
            "steps": record.steps,
            "artifacts": names,
        },
    )
    drop_resume_state(record.train_key)
    # the last lines of a `dvc repro`: the verdict, what was learned, and where to read on
    gain = record.tags.get("heldout_gain", "undefined")
    print(f"{record.tags['verdict']}: {record.headline}")
    print(f"held-out {record.params['reward']} reward over the reference model: {gain}")
    print(f"open {RUN_FILES.page} in a browser; `make ui` compares runs")


def end_dead_runs(client: "MlflowClient", experiment: str) -> None:
    """Mark RUNNING runs of this host as KILLED if their process is gone. Prints how many runs are on other hosts."""
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
    """Delete the resume states once dvc.lock says that the run's outputs are committed. Keeps the timings, which exist
    only here and in MLflow."""
    folder = workspace.resume_folder(train_key)
    if not folder.is_dir() or not workspace.is_committed(RUN_FILES.run.read_text(encoding="utf-8")):
        return
    try:
        with FileLock(folder.with_suffix(".lock"), timeout=0):  # `train` holds this lock
            for path in resume_files(folder):  # oldest state first: a kill leaves the newest one
                path.unlink()
    except Timeout:
        print("note: this very run is being trained again; its resume state is left alone", file=sys.stderr)


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
