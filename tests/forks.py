"""Stages and commands as processes of their own, without the seconds that importing takes: forked off one process that
has imported everything and computed nothing.

    python -m tests.forks SOCKET    # a connection is a run: command, folder, ..., and its streams; out: pid, exit code
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tests.fork_client import NOWHERE, SERVER, Run

if TYPE_CHECKING:
    from tests.project import Project

ROOT = Path(__file__).resolve().parents[1]
MODULES = (
    *(f"pipeline.stages.{name}" for name in ("prepare", "cache", "train", "diagnose", "evaluate", "plot", "track")),
    "mlflow", "mlflow.store.tracking.sqlalchemy_store", "transformers.models.gpt_neox.modeling_gpt_neox",
)  # fmt: skip


class Recorded(Run):
    """A run whose output goes to files, both parts to one where no other is given."""

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        environment: dict[str, str],
        output: Path,
        errors: Path | None = None,
    ) -> None:
        need_server()
        self.output = output
        output.write_text("")
        with open(os.devnull) as nothing, output.open("a") as out, (errors or output).open("a") as err:
            super().__init__(command, str(folder), environment, [nothing.fileno(), out.fileno(), err.fileno()])

    def said(self) -> str:
        return self.output.read_text(encoding="utf-8")


class Forks:
    """Stages in projects, one at a time."""

    def __init__(self, logs: Path) -> None:
        self.log = logs / "said"

    @contextlib.contextmanager
    def start(self, project: "Project", stage: str = "train") -> Iterator[Recorded]:
        """A stage in this project; it does not outlive the block."""
        run = Recorded([f"pipeline.stages.{stage}"], project.root, project.environment, self.log)
        try:
            yield run
        finally:
            if not run.ended:
                run.kill()
                run.wait()

    def run(self, project: "Project", stage: str = "train") -> tuple[int, str]:
        """Runs it to its end; gives its exit code and what it said."""
        with self.start(project, stage) as run:
            return run.wait(), run.said()

    def finish(self, project: "Project", stage: str = "train") -> str:
        """Runs it to its end, which must be a good one; gives what it said."""
        code, said = self.run(project, stage)
        assert code == 0, said
        return said


def start_server() -> None:
    """In the background: those who connect wait until it has imported all."""
    folder = tempfile.mkdtemp(prefix="forks-")
    os.environ[SERVER] = str(Path(folder, "socket"))
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.forks", os.environ[SERVER]], cwd=ROOT, stdin=subprocess.DEVNULL,
        env={**os.environ, "HF_ENDPOINT": NOWHERE, "HF_HOME": f"{folder}/hf"}, start_new_session=True,
    )  # fmt: skip
    atexit.register(shutil.rmtree, folder)
    atexit.register(server.kill)


def need_server() -> None:
    if SERVER not in os.environ:
        start_server()


def forking_python(folder: Path) -> str:
    """A folder for PATH whose `python` forks what it runs of the pipeline."""
    need_server()
    folder.mkdir(exist_ok=True)
    python, client = folder / "python", Path(__file__).with_name("fork_client.py")
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{client}" "$@"\n')
    python.chmod(0o755)
    return str(folder)


def until(condition, run: Recorded, seconds: float = 300.0) -> None:  # type: ignore[no-untyped-def]
    """Waits for a condition in the shortest of steps."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, run.said()
        time.sleep(0.001)


def die_with_parent() -> None:
    """Also where pytest itself is killed while a run is stopped: Linux' PR_SET_PDEATHSIG."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def run_and_exit(work: Callable[[], int | None], output: int, errors: int) -> NoReturn:
    """Ends this fork with the exit code of `work`, None = 0. What it says goes to these open files."""
    os.dup2(output, 1)
    os.dup2(errors, 2)
    # the old ones know whether one could seek in what they wrote to
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    code = 1
    try:
        code = int(work() or 0)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextlib.contextmanager
def keeping_imports() -> Iterator[None]:
    """What is imported inside stays: Python does not look for garbage in it. That takes long, and a fork copies all
    that it looks at."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def work(module: str, *arguments: str) -> None:
    """What `python -m` would run."""
    sys.argv = [module, *arguments]
    if module == "pipeline":
        importlib.import_module("pipeline.__main__").main()
    else:
        importlib.import_module("pipeline.errors").run_stage(importlib.import_module(module).main)


def answer(connection: socket.socket) -> NoReturn:
    """Waits for the run in a process of its own, so that several can be at work."""
    die_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, streams, _, _ = socket.recv_fds(connection, 2**20, 3)
    command, folder, environment, umask = json.loads(message)
    if (pid := os.fork()) == 0:
        connection.close()
        die_with_parent()
        os.setsid()
        os.umask(umask)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        os.dup2(streams[0], 0)
        run_and_exit(lambda: work(*command), streams[1], streams[2])
    for stream in streams:
        os.close(stream)
    with contextlib.suppress(BrokenPipeError):
        connection.send(str(pid).encode())
        end = os.pidfd_open(pid)
        if end in select.select([connection, end], [], [])[0]:
            connection.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
    os._exit(0)  # and with it the run, where whoever asked for it was killed


def serve(path: str) -> None:
    die_with_parent()
    with keeping_imports():
        for module in MODULES:
            importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that answer
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen(64)
        while True:
            connection, _ = listener.accept()
            with connection:
                if os.fork() == 0:
                    listener.close()
                    answer(connection)


if __name__ == "__main__":
    serve(sys.argv[1])
