"""Any run of an MLflow store, ours or another trainer's, as the rows of a log. Reading creates nothing in the store."""

import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pipeline.diagnosis.foreign import known_columns
from pipeline.errors import UserError, cut, one_line
from pipeline.file_io import read_csv
from pipeline.tracking import mlflow_store

CALIBRATION = "tables/calibration.csv"  # where `track` puts it


def read_run(run_id: str, history: Collection[str]) -> tuple[list[dict[str, Any]], list[dict[str, float]]]:
    """One record per step of every metric that we know, and the calibration batches of a run of ours, if there are any.

    history: the columns of history.csv. Raises UserError if there is no store, and mlflow's own error if the store
    lacks the run.
    """
    path = mlflow_store.sqlite_file()
    if path and not path.is_file():
        raise UserError(f"mlflow:{run_id}: no MLflow store at {path}; MLFLOW_TRACKING_URI says where one is")
    mlflow_store.defaults(timeout=30, retries=3)
    client = mlflow_store.reading_client()
    run = client.get_run(run_id)
    metrics = list(run.data.metrics)
    if not metrics:
        raise UserError(f"mlflow:{run_id}: a run without metrics")
    known = [name for names in known_columns(metrics, history).values() for name in names]
    records: dict[int, dict[str, Any]] = defaultdict(dict)
    for name in known or metrics[:1]:
        for point in client.get_metric_history(run_id, name):
            records[point.step][name] = point.value
    ours = "train_key" in run.data.tags
    # metrics that we do not know, only by name: a message lists them
    others = dict.fromkeys(name for name in metrics if name not in known)
    rows = [{"step": step, **(others if place == 0 else {}), **row} for place, (step, row) in
        enumerate(sorted(records.items()))]  # fmt: skip
    return rows, calibration(client, run_id) if ours else []


def calibration(client: Any, run_id: str) -> list[dict[str, float]]:
    """The calibration batches of a run of ours; none, and a note, if its artifacts are not at hand."""
    from mlflow.exceptions import MlflowException

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    with tempfile.TemporaryDirectory() as folder:
        try:
            return read_csv(Path(client.download_artifacts(run_id, CALIBRATION, folder)))
        except (MlflowException, OSError, ValueError) as error:
            said = mlflow_store.without_password(one_line(str(error)))
            print(f"note: {CALIBRATION} of the run cannot be read: {cut(said, 200)}", file=sys.stderr)
            return []
