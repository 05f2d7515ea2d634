"""`python -m pipeline.tracking.follow FOLDER PID`: MLflow's run follows the files of a run that is training.

`train` starts this process, so that no server can hold training up, and writes the final status to its standard input.
After a failure it tries again with the next state of the files; `track` completes what is missing.
"""

import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import run_stage
from pipeline.runs.follower import CLOSE_SECONDS, warn
from pipeline.tracking import mlflow_store
from pipeline.tracking.record import read_growing
from pipeline.tracking.sync import Synced, sync

POLL_SECONDS = 0.5


def main() -> None:
    folder, trainer = Path(sys.argv[1]), int(sys.argv[2])
    mlflow_store.defaults(timeout=5, retries=1)
    try:
        with mlflow_store.lock(f"follow-{folder.name[:16]}"):  # a follower whose trainer was killed ends first
            follow(folder, trainer, lambda: wait_for_end(trainer))
    except TimeoutError as error:
        warn(mlflow_store.describe_error(error))


def wait_for_end(trainer: int) -> str:
    """RUNNING after a moment, or the status that the trainer sends at its end; KILLED if it died without sending
    one."""
    if select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
        status = sys.stdin.readline() or "KILLED"
    else:  # a process that a reward has forked may hold the pipe open
        status = "RUNNING" if os.getppid() == trainer else "KILLED"
    if status != "RUNNING":
        signal.alarm(int(CLOSE_SECONDS))  # there may be nobody left to end this process
    return status


def follow(folder: Path, trainer: int, wait: Callable[[], str]) -> None:
    """Copy each state of the folder to MLflow's run, until `wait` returns a status other than RUNNING.

    Never raises: the first failure of each cause is one line on stderr.
    """
    status, timings = "RUNNING", folder / "timings.csv"
    seen: tuple[str, int] | None = None
    synced: Synced | None = None
    warned: set[str] = set()
    while True:
        state = status, timings.stat().st_mtime_ns if timings.exists() else 0  # `train` writes timings.csv last
        if state != seen:
            seen = state
            try:
                synced = sync(read_growing(folder, trainer, status), synced)
            except Exception as error:  # whatever the error: training goes on
                synced = None
                if (cause := mlflow_store.describe_error(error)) not in warned:
                    warned.add(cause)
                    warn(cause)
        if status != "RUNNING":
            return
        status = wait()


if __name__ == "__main__":
    run_stage(main, arguments=True)
