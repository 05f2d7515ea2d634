"""What a team shares, for real and on loopback: an MLflow server, a PostgreSQL behind it, an SSH server for DVC's
remote."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import asyncssh
import requests


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class MlflowServer:
    """A real `mlflow server` with a store of its own: a SQLite file in `folder`, or what `backend` names."""

    def __init__(self, folder: Path, backend: str = "") -> None:
        self.folder, self.port = folder, free_port()
        self.backend = backend or f"sqlite:///{folder}/mlflow.db"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--backend-store-uri", self.backend]
        command += ["--serve-artifacts", "--artifacts-destination", (self.folder / "artifacts").as_uri()]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, env=environment, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
        wait(self.is_up, self.process, self.folder / "server.log")

    def is_up(self) -> bool:
        try:
            return requests.get(f"{self.url}/health", timeout=1).ok
        except requests.RequestException:
            return False

    def kill(self) -> None:
        """As if its machine had lost power: no process of it lives on."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def postgres_programs() -> Path | None:
    """The folder of PostgreSQL's newest programs: Debian keeps them outside PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: float(path.parts[-3]))
    program = str(found[-1]) if found else shutil.which("postgres")
    return Path(program).resolve().parent if program else None


class Postgres:
    """A PostgreSQL server with a password and a database named mlflow, in a folder of its own under /tmp: it refuses
    root, and pytest's folders, as a user's own TMPDIR, are closed to the others whom it then runs as."""

    def __init__(self, programs: Path, password: str) -> None:
        self.folder, self.port = Path(tempfile.mkdtemp(prefix="postgres-", dir="/tmp")), free_port()
        user = {"user": "nobody", "group": "nogroup"} if os.geteuid() == 0 else {}
        if user:
            shutil.chown(self.folder, "nobody", "nogroup")
        (self.folder / "password").write_text(password)
        data, log = self.folder / "data", self.folder / "log"
        begin = [programs / "initdb", "-D", data, "-U", "mlflow", "-E", "UTF8", "--no-locale", "--auth=scram-sha-256",
                 f"--pwfile={self.folder / 'password'}", "--no-sync"]  # fmt: skip
        subprocess.run(begin, check=True, capture_output=True, cwd=self.folder, **user)
        serve = [programs / "postgres", "-D", data, "-h", "127.0.0.1", "-p", str(self.port), "-k", self.folder]
        with log.open("wb") as target:
            self.process = subprocess.Popen(serve, cwd=self.folder, stdout=target, stderr=target, **user)
        self.environment = {**os.environ, "PGPASSWORD": password}
        wait(lambda: self.query("select 1", "postgres") == "1", self.process, log)
        self.query("create database mlflow", "postgres")
        self.uri = f"postgresql://mlflow:{password}@127.0.0.1:{self.port}/mlflow"
        self.programs = programs

    def query(self, statement: str, database: str = "mlflow") -> str:
        """Rows as lines, columns divided by |; empty where the server does not answer."""
        command = ["psql", "-h", "127.0.0.1", "-p", str(self.port), "-U", "mlflow", "-Atqc", statement, database]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True).stdout.strip()

    def close(self) -> None:
        self.process.send_signal(signal.SIGINT)  # a fast shutdown, sessions ended
        self.process.wait(30)
        shutil.rmtree(self.folder)


class SshServer:
    """An SSH server that gives whoever has the key at `key` the files below `folder`, and no shell."""

    def __init__(self, folder: Path, key: Path) -> None:
        pair = asyncssh.generate_private_key("ssh-ed25519")
        pair.write_private_key(key)
        key.chmod(0o600)
        self.folder, self.port = folder, free_port()
        self._authorized = asyncssh.import_authorized_keys(pair.export_public_key().decode())
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(30)

    async def _listen(self) -> asyncssh.SSHAcceptor:
        return await asyncssh.listen(
            "127.0.0.1", self.port, server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
            authorized_client_keys=self._authorized,
            sftp_factory=lambda channel: asyncssh.SFTPServer(channel, chroot=os.fsencode(self.folder)),
        )  # fmt: skip

    def close(self) -> None:
        async def stop() -> None:
            self._server.close()
            await self._server.wait_closed()

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()


def wait(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
