"""`reinforce ui`: MLflow's pages on loopback, with the runs of this project."""

import argparse
import contextlib
import os
import re
import socket
import sqlite3
import sys

from pipeline.errors import UserError
from pipeline.runs import workspace
from pipeline.tracking import mlflow_store
from pipeline.tracking.presentation import VIEW_TAG, complete_experiment, runs_page
from pipeline.tracking.summaries import readable

HOST = "127.0.0.1"
# Of MLflow's variables, the server gets those that say how a store is reached and whether telemetry is on. The others
# could move its pages, open them to other machines, or replace our store by another one.
KEPT = (
    "MLFLOW_S3_", "MLFLOW_GCS_", "MLFLOW_BOTO_", "MLFLOW_SQLALCHEMYSTORE_", "MLFLOW_MYSQL_", "MLFLOW_DISABLE_TELEMETRY",
)  # fmt: skip


def main(options: argparse.Namespace) -> None:
    """Becomes `mlflow server`. Raises UserError when there is nothing to serve or the port is taken."""
    port, uri = port_number(options.port), mlflow_store.store_uri()
    if uri.startswith("http"):
        raise UserError(f"MLFLOW_TRACKING_URI names a server already: open {mlflow_store.without_password(uri)}")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(f"port {port} of {HOST}: {error.strerror}; choose another: `reinforce ui 5001`") from None
    mlflow_store.defaults(timeout=30, retries=3)
    with readable(instead=""):
        experiment = _experiment_id()
    artifacts = (workspace.root() / "mlartifacts").as_uri()
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", HOST, "--port", str(port)]
    command += ["--backend-store-uri", uri, "--artifacts-destination", artifacts]
    print(f"MLflow at http://{HOST}:{port}/{runs_page(experiment)} in about 20 s; stop it with Ctrl-C", flush=True)
    os.execve(sys.executable, command, _environment())


def _experiment_id() -> str:
    """Id of our experiment. It has the view that the page's address names; without a view MLflow opens the page for
    traces.

    Imports mlflow only if the store lacks the experiment or the view: the import doubles the waiting time.
    """
    path = mlflow_store.sqlite_file()
    if path and path.is_file():
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path)) as store:
            query = "SELECT experiment_id FROM experiments JOIN experiment_tags USING (experiment_id)"
            query += " WHERE name = ? AND lifecycle_stage = 'active' AND key = ?"
            found = store.execute(query, [mlflow_store.experiment_name(), VIEW_TAG]).fetchone()
            if found:
                return str(found[0])
    client, experiment = mlflow_store.open_store()  # under our lock: the server and a training must not both create it
    complete_experiment(client, experiment)
    return experiment


def _environment() -> dict[str, str]:
    """The server's environment variables."""
    ours = ("MLFLOW_", "_MLFLOW_", "UVICORN_")
    kept = {name: value for name, value in os.environ.items() if name.startswith(KEPT) or not name.startswith(ours)}
    # Job execution starts processes that we have no use for and that double the time until the page is up.
    return {**kept, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def port_number(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or not 0 < int(text) < 65536:
        raise UserError(f"{text!r}: should be one port number, 1 to 65535")
    return int(text)
