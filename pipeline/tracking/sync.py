"""Synchronise a run's files to its MLflow run: of a growing run, a finished one, or one whose database was lost."""

import json
import math
import os
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.paths import RUN_FILES
from pipeline.tracking import mlflow_store, presentation
from pipeline.tracking.mlflow_store import Point
from pipeline.tracking.record import Record

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

DIGEST_CHARACTERS = 16  # MLflow allows 36; a person reads them in the run table


class Synced(NamedTuple):
    """What MLflow has of a run, so that the next call need not ask."""

    client: "MlflowClient"
    experiment: str
    run: "Run"
    logged: list[Point]


def sync(record: Record, before: Synced | None = None) -> Synced:
    """Write the parts of the record that MLflow's run of this train_key lacks.

    `before` is what an earlier call returned for the same growing run: then only points and status are new. Raises what
    mlflow raises.
    """
    client, experiment = before[:2] if before else mlflow_store.open_store()
    with mlflow_store.lock(f"run-{record.train_key[:16]}"):
        run, logged = before[2:] if before else _find(client, experiment, record)
        run_id, known = run.info.run_id, {(point.key, point.step) for point in logged}
        missing = [point for point in record.points if (point.key, point.step) not in known]
        missing += _new_evaluation(record, logged) + _new_curve(record, logged)
        if not before:
            mlflow_store.log_params(client, run, record.params)
        mlflow_store.log_points(client, run_id, missing)
        if not before:
            _describe(client, run, record)
        if run.info.status != "FINISHED":  # a repeated training finds its run complete
            if record.status != "RUNNING":
                end_ms = max([run.info.start_time, *(point.timestamp_ms for point in record.points)])
                client.set_terminated(run_id, record.status, end_ms)
            elif not before:
                client.update_run(run_id, status="RUNNING")
        if not before:
            presentation.complete_experiment(client, experiment)
    return Synced(client, experiment, run, logged + missing)


def _find(client: "MlflowClient", experiment: str, record: Record) -> "tuple[Run, list[Point]]":
    """Return the run of this train_key and its points. Create it where none exists or it contradicts the record."""
    run = mlflow_store.find_run(client, experiment, record.train_key)
    logged = mlflow_store.logged_points(client, run) if run else []
    if run and record.artifacts and _contradict(logged, record.points):
        # Logged points cannot be corrected. They differ by rounding on another type of CPU, or because of an edit by
        # hand.
        print(
            f"note: MLflow run {run.info.run_name} differs from {RUN_FILES.history}; deleted and made anew",
            file=sys.stderr,
        )
        client.delete_run(run.info.run_id)
        run, logged = None, []
    if run is None:
        start_ms = min((point.timestamp_ms for point in record.points), default=time.time_ns() // 1_000_000)
        run = mlflow_store.create_run(client, experiment, record.train_key, record.params, start_ms)
    return run, logged


def _describe(client: "MlflowClient", run: "Run", record: Record) -> None:
    """Data sets, files, tags, description and name."""
    run_id = run.info.run_id
    if record.datasets:
        client.log_inputs(run_id, datasets=[_dataset(*dataset) for dataset in record.datasets])
    for folder, files in record.artifacts.items():
        for file in files:
            client.log_artifact(run_id, str(file), folder or None)
    for key, value in record.tags.items():
        client.set_tag(run_id, key, value)
    if record.headline:
        presentation.describe_run(client, run, record.headline, record.tags)
    if os.environ.get("DVC_EXP_NAME"):
        client.update_run(run_id, name=mlflow_store.run_name(record.params, record.train_key))


def _contradict(logged: list[Point], points: list[Point]) -> bool:
    """Whether the run holds a training value twice, or one that the files do not. Clock times may differ."""
    values = {(point.key, point.step): point.value for point in points}
    columns = {point.key for point in points if not point.key.startswith("time/")}
    found = [point for point in logged if point.key in columns]
    different = any(not math.isclose(point.value, values.get((point.key, point.step), math.nan)) for point in found)
    return different or len({(point.key, point.step) for point in found}) < len(found)


def _new_evaluation(record: Record, logged: list[Point]) -> list[Point]:
    """New points, at the last step and a later time, of the evaluation metrics whose newest logged value is another
    one."""
    last_step, now_ms = max((point.step for point in record.points), default=0), time.time_ns() // 1_000_000
    newest: dict[str, Point] = {}
    evaluated = [point for point in logged if point.key in record.evaluation]
    for point in sorted(evaluated, key=lambda point: (point.step, point.timestamp_ms, point.value)):
        newest[point.key] = point
    points = []
    for key, value in record.evaluation.items():
        before = newest.get(key)
        if before is None or before.value != value:
            later_ms = max(now_ms, before.timestamp_ms + 1) if before else now_ms
            points.append(Point(key, last_step, value, later_ms))
    return points


def _new_curve(record: Record, logged: list[Point]) -> list[Point]:
    """The points of the held-out curve whose newest logged value is another one: rewards other than the trained one may
    have been edited since the training."""
    newest = {(point.key, point.step): point for point in sorted(logged, key=lambda point: point.timestamp_ms)}
    points = []
    for point in record.curve:
        before = newest.get((point.key, point.step))
        if before is None:
            points.append(point)
        elif before.value != point.value:
            points.append(point._replace(timestamp_ms=max(point.timestamp_ms, before.timestamp_ms + 1)))
    return points


def _dataset(name: str, digest: str, source: str, profile: Any, context: str) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    uri = json.dumps({"uri": source})
    entity = Dataset(name, digest[:DIGEST_CHARACTERS], "local", uri, profile=json.dumps(profile))
    return DatasetInput(entity, [InputTag("mlflow.data.context", context)])
