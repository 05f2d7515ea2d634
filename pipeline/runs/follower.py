"""The process that shows a growing run in MLflow. `train` starts it but never imports its code."""

import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.file_io import write_json

CLOSE_SECONDS = 15.0  # what a dead server may cost at the end of training


@contextlib.contextmanager
def follower(folder: Path, run_json: dict[str, Any]) -> Iterator[None]:
    """Write run.json beside the run's states and start `pipeline.tracking.follow`, which reads both until the block
    ends.

    Ctrl-C does not reach that process. Without mlflow, or without an answer in time, a warning is printed and training
    goes on.
    """
    write_json(folder / "run.json", run_json)
    command = [sys.executable, "-m", "pipeline.tracking.follow", str(folder), str(os.getpid())]
    process, status = None, "FAILED"
    if importlib.util.find_spec("mlflow"):
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True, text=True
        )
    else:
        warn("mlflow is not installed")
    try:
        yield
        status = "FINISHED"
    except SystemExit:  # a signal ended training in an orderly way
        status = "KILLED"
        raise
    finally:
        if process:
            try:
                process.communicate(status, CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                warn("no answer within the time allowed")


def warn(cause: str) -> None:
    print(f"warning: MLflow: {cause}; training goes on, `track` completes the record", file=sys.stderr)
