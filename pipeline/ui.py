"""`python -m pipeline.ui [port]`: MLflow's pages on loopback, with the runs of this project."""

import os
import socket
import sys
from pathlib import Path

from pipeline.errors import UserError, run_stage
from pipeline.io import tracking, workspace

HOST, PORT = "127.0.0.1", 5000


def main() -> None:
    """Becomes `mlflow server`. Raises UserError when there is nothing to serve or the port is taken."""
    port, uri = _port(sys.argv[1:]), tracking.store_uri()
    if uri.startswith("http"):
        raise UserError(f"MLFLOW_TRACKING_URI names a server already: open {uri}")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(f"port {port} of {HOST}: {error.strerror}; choose another: `make ui PORT=5001`") from None
    tracking.defaults(timeout=30, retries=3)
    if not Path(uri.removeprefix("sqlite:///")).exists():
        tracking.open_store()  # made under our lock: the server and a training must not both create it
    # Job execution starts processes that we have no use for and that double the time until the page is up.
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    artifacts = (workspace.root() / "mlartifacts").as_uri()
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", HOST, "--port", str(port)]
    command += ["--backend-store-uri", uri, "--artifacts-destination", artifacts]
    print(f"MLflow at http://{HOST}:{port} in about 20 s; stop it with Ctrl-C", flush=True)
    os.execve(sys.executable, command, environment)


def _port(arguments: list[str]) -> int:
    text = arguments[0] if arguments else str(PORT)
    if len(arguments) > 1 or not text.isdecimal() or not 0 < int(text) < 65536:
        raise UserError(f"{' '.join(arguments)!r}: should be one port number, 1 to 65535")
    return int(text)


if __name__ == "__main__":
    run_stage(main)
