"""MLflow as a view of the files: one run per train_key, whichever process writes to it, and no point twice.

mlflow takes seconds to import, so functions import it. They raise what mlflow raises: `pipeline.stages.track` turns it
into one line, `pipeline.tracking.follow` into a warning.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from filelock import FileLock

from pipeline.errors import UserError, cut, one_line
from pipeline.runs import workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

Scalar = str | int | float | bool

# One request holds at most 1000 metrics or 100 params, and a megabyte: a param of 1000 characters is safe even escaped.
METRICS_PER_BATCH, PARAMS_PER_BATCH, PARAM_CHARACTERS = 1000, 100, 1000
ADVICE = {
    "is not a database": "move the file away and it is made anew",
    "malformed": "move the file away and it is made anew",
    "is locked": "another process holds it: wait for it, or end it",
    "database schema": "`mlflow db upgrade {store}` helps an older store; move one of a newer MLflow away",
    "Can't locate revision": "a newer MLflow made it: move the file away and it is made anew",
}  # by the messages of sqlite, mlflow and alembic; {store}: the store's address
PROXY_STATUS = ("407", "502", "503", "504")  # HTTP status codes with which proxies and gateways answer for a server
# values of MLFLOW_SQLALCHEMYSTORE_POOLCLASS: MLflow keeps this list inside a function; other names end in a traceback
POOLS = ("AssertionPool", "NullPool", "QueuePool", "SingletonThreadPool", "StaticPool")
BETWEEN = "a proxy or gateway between here and the server answers so: see HTTP_PROXY, HTTPS_PROXY and NO_PROXY"


class Point(NamedTuple):
    """One value of one metric."""

    key: str
    step: int
    value: float
    timestamp_ms: int


def store_uri() -> str:
    """MLFLOW_TRACKING_URI, else mlflow.db in the main workspace. A relative SQLite path also starts at the main
    workspace: in the folder of a --temp experiment the file would be lost.
    """
    uri, path = os.environ.get("MLFLOW_TRACKING_URI") or "", sqlite_file()
    if path is None:
        return uri
    options = uri.partition("?")[2]
    return _sqlite_uri(path) + (f"?{options}" if options else "")


def sqlite_file() -> Path | None:
    """The store's file, if it is a SQLite store: the URI's path, unescaped and without options."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return workspace.root() / "mlflow.db"
    if not uri.startswith("sqlite"):
        return None
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(uri)
    except ArgumentError:
        return None
    if url.database in (None, "", ":memory:") or "uri" in url.query:
        return None
    return workspace.root() / str(url.database)


def _sqlite_uri(path: Path) -> str:
    if not re.search("[%?]", str(path)):
        return f"sqlite:///{path}"
    from sqlalchemy.engine import URL

    # unless the URI names a driver, mlflow makes the path's folder under its escaped name
    return URL.create("sqlite+pysqlite", database=str(path)).render_as_string()


def check_store() -> None:
    """Raise UserError for an SQLite address that names no lasting file or has unknown options.

    Also raise it for an environment variable whose value MLflow cannot read.
    """
    from mlflow import environment_variables
    from sqlalchemy.engine import make_url

    uri = os.environ.get("MLFLOW_TRACKING_URI") or ""
    if uri.startswith("sqlite"):
        if sqlite_file() is None:
            raise UserError(
                f"MLFLOW_TRACKING_URI = {without_password(uri)}: should name a file: sqlite:///mlflow.db in the "
                "project, sqlite:////absolute/path/mlflow.db elsewhere"
            )
        try:
            make_url(uri).get_dialect()().create_connect_args(make_url(uri))
        except ValueError as error:
            raise UserError(f"MLFLOW_TRACKING_URI = {without_password(uri)}: {error}") from None
    name = "MLFLOW_SQLALCHEMYSTORE_POOLCLASS"
    if (wanted := os.environ.get(name)) and wanted not in POOLS:
        raise UserError(f"{name} = {wanted!r}: should be one of {', '.join(POOLS)}, or unset")
    for name in sorted(os.environ):
        if name.startswith("MLFLOW_") and (variable := getattr(environment_variables, name, None)):
            try:
                variable.get()
            except ValueError as error:
                raise UserError(str(error)) from None


def experiment_name() -> str:
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or "reinforce"


def defaults(timeout: int, retries: int) -> None:
    """Set mlflow's environment: no telemetry, and the timeout of a request in seconds, unless the user has set them.

    Variables that could hide a failure or split a run's record are set even if the user has set them
    (docs/ENVIRONMENT.md).
    """
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
    }.items():
        os.environ.setdefault(name, value)
    os.environ |= {"MLFLOW_ENABLE_ASYNC_LOGGING": "false", "MLFLOW_TRUNCATE_LONG_VALUES": "true"}
    for name in ("MLFLOW_LOGGING_LEVEL", "MLFLOW_CONFIGURE_LOGGING"):  # an invalid value ends `import mlflow`
        os.environ.pop(name, None)
    host = urlsplit(os.environ.get("MLFLOW_TRACKING_URI") or "").hostname
    if host in ("localhost", "127.0.0.1", "::1"):  # a proxy cannot reach this machine's own server
        for name in ("no_proxy", "NO_PROXY"):
            os.environ[name] = ",".join(filter(None, [os.environ.get(name), host]))


def reading_client() -> "MlflowClient":
    """A client for reading only: it creates nothing in the store, not even a lock beside it."""
    from mlflow import MlflowClient

    quiet()
    check_store()
    uri = store_uri()
    if path := sqlite_file():
        _check_database(path)
    elif re.match("postgresql|mysql|mssql", uri):
        _check_server(uri)
    return MlflowClient(tracking_uri=uri)


def quiet() -> None:
    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)  # hide their notes on every new table and every retry


def open_store() -> "tuple[MlflowClient, str]":
    """A client and the id of our experiment; store and experiment are made where they are missing."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    quiet()
    uri, name = store_uri(), experiment_name()
    artifacts = None if uri.startswith("http") else (workspace.root() / "mlartifacts").as_uri()
    check_store()
    with lock("mlflow"):
        if path := sqlite_file():
            _prepare_database(path)
        elif re.match("postgresql|mysql|mssql", uri):
            _check_server(uri)
        client = MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return client, client.create_experiment(name, artifact_location=artifacts)
            except MlflowException:  # another process made it since we looked, in a store that we cannot lock
                experiment = client.get_experiment_by_name(name)
                if experiment is None:
                    raise
    if experiment.lifecycle_stage != "active":
        raise UserError(
            f"MLflow experiment {name!r} in {without_password(uri)} is deleted; restore it with `mlflow experiments "
            f"restore -x {experiment.experiment_id}`, or set MLFLOW_EXPERIMENT_NAME"
        )
    return client, experiment.experiment_id


def find_run(client: "MlflowClient", experiment: str, train_key: str) -> "Run | None":
    """The run of a train_key; if a user has copied it, the oldest one with metrics. Other runs without a metric are
    deleted: if a server's answer was lost or late, the request was repeated and made a second run.
    """
    runs = client.search_runs([experiment], f"tags.train_key = '{train_key}'", order_by=["attributes.start_time ASC"])
    found = next((run for run in runs if run.data.metrics), runs[0] if runs else None)
    for run in runs:
        if run is not found and not run.data.metrics:
            client.delete_run(run.info.run_id)
    return found


def create_run(
    client: "MlflowClient", experiment: str, train_key: str, params: dict[str, Scalar], start_ms: int
) -> "Run":
    return client.create_run(
        experiment, start_time=start_ms, run_name=run_name(params, train_key), tags={"train_key": train_key}
    )


def run_name(params: dict[str, Scalar], train_key: str) -> str:
    """A name by which people tell runs apart: embedding-stable-pocket-s0- and the DVC experiment's name, else the
    key."""
    names = [str(params[key]) for key in ("reward", "recipe", "model") if key in params]
    return "-".join([*names, f"s{params.get('seed', '')}", os.environ.get("DVC_EXP_NAME") or train_key[:8]])


def log_params(client: "MlflowClient", run: "Run", params: dict[str, Scalar]) -> None:
    """Logs the params that the run lacks; MLflow has no way to change one."""
    from mlflow.entities import Param

    missing = [Param(key, text) for key, text in param_texts(params).items() if key not in run.data.params]
    for start in range(0, len(missing), PARAMS_PER_BATCH):
        client.log_batch(run.info.run_id, params=missing[start : start + PARAMS_PER_BATCH])


def param_texts(params: dict[str, Scalar]) -> dict[str, str]:
    """Return the params as MLflow shows them to people; the tag `config` tells configurations apart.

    A text that is cut ends in its digest, so that different texts still look different.
    """
    return {
        _cut(re.sub(r"[^\w\-. :]", "_", key), 250): _cut(
            value if isinstance(value, str) else json.dumps(value), PARAM_CHARACTERS
        )
        for key, value in params.items()
    }


def _cut(text: str, size: int) -> str:
    mark = f"... {hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return text if len(text) <= size else text[: size - len(mark)] + mark


def log_points(client: "MlflowClient", run_id: str, points: list[Point]) -> None:
    from mlflow.entities import Metric

    metrics = [Metric(point.key, point.value, point.timestamp_ms, point.step) for point in points]
    for start in range(0, len(metrics), METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_BATCH])


def logged_points(client: "MlflowClient", run: "Run") -> list[Point]:
    return [
        Point(metric.key, metric.step, metric.value, metric.timestamp)
        for key in run.data.metrics
        for metric in client.get_metric_history(run.info.run_id, key)
    ]


@contextlib.contextmanager
def lock(name: str) -> Iterator[None]:
    """Holds `.locks/<name>.lock` of the main workspace. Raises TimeoutError after a minute."""
    folder = workspace.root() / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{name}.lock", timeout=60):
        yield


def describe_error(error: BaseException) -> str:
    """Return the store, the error's cause and advice, without passwords and without details that differ from one try to
    the next."""
    text = str(error).strip() or type(error).__name__
    text = re.split(r"\n\[(?:SQL|parameters): |\n\(Background on", text)[0]  # what SQLAlchemy adds
    status = re.search(r"error code (\d{3})|too many (\d{3}) error responses", text)
    if page := re.search(r"Response body: '\s*<", text):
        title = re.search(r"(?is)<title[^>]*>(.*?)</title>", text)
        text = text[: page.start()] + "A web page was the answer" + (f": {title[1]}" if title else "")
    elif status and status[2]:
        text = f"{status[2]} was the answer again and again"
    elif "Max retries exceeded" in text:
        text = "no answer: " + re.split(r"Caused by |\] ", text)[-1]
    signs = ADVICE | ({status[0]: BETWEEN} if status and (status[1] or status[2]) in PROXY_STATUS else {})
    advice = next((f"; {advice}" for sign, advice in signs.items() if sign in str(error)), "")
    advice = advice.replace("{store}", without_password(store_uri()))
    return cut(without_password(one_line(f"{store_uri()}: " + re.sub(r" at 0x[0-9a-f]+", "", text))), 500) + advice


def without_password(text: str) -> str:
    """Remove credentials from the addresses in a text: what is before the last @, and secret options.

    SQLAlchemy allows any sign in a password.
    """
    text = re.sub(r"(?<!/)//(?!/)\S*@", "//", text)  # three slashes: a SQLite file
    return re.sub(r"(?i)((?:password|passwd|pwd|token|secret)=)[^&\s]*", r"\1…", text)


def _prepare_database(path: Path) -> None:
    """Make a SQLite store if there is none: whole or not at all, since mlflow cannot open one that lacks migrations."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    if path.exists() and path.stat().st_size:  # a killed sqlite leaves an empty file
        return _check_database(path)
    path.parent.mkdir(parents=True, exist_ok=True)  # as mlflow does
    unfinished = path.with_name(path.name + ".new")
    unfinished.unlink(missing_ok=True)
    _check_database(unfinished)
    store = SqlAlchemyStore(_sqlite_uri(unfinished), (workspace.root() / "mlartifacts").as_uri())
    store.engine.dispose()
    unfinished.replace(path)


def _check_server(uri: str) -> None:
    """Raise SQLAlchemyError at once where no database server answers: mlflow would try for a hundred seconds."""
    from sqlalchemy import create_engine

    engine = create_engine(uri)
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def _check_database(path: Path) -> None:
    """Raises OSError at once for an error after which mlflow would try again for a hundred seconds."""
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=20)) as database:
            database.execute("PRAGMA schema_version")
    except sqlite3.DatabaseError as error:
        raise OSError(str(error)) from None
