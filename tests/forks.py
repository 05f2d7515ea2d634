"""Many runs of stages as processes of their own, without the seconds that importing takes: forked off one process that
has imported everything and computed nothing.

    python -m tests.forks    # a JSON line in: stage, folder, file for what it says, environment; out: pid, exit code
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from tests.project import Project

ROOT = Path(__file__).resolve().parents[1]
MODULES = (
    *(f"pipeline.stages.{name}" for name in ("prepare", "cache", "train", "diagnose", "evaluate", "plot", "track")),
    "mlflow", "mlflow.store.tracking.sqlalchemy_store", "transformers.models.gpt_neox.modeling_gpt_neox",
)  # fmt: skip


class Run:
    """A stage at work, the leader of a process group of its own."""

    def __init__(self, server: subprocess.Popen[str], said: Path) -> None:
        assert server.stdout
        self.server, self.log = server.stdout, said
        self.pid = int(self.server.readline())
        self.ended = False

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):  # it was quicker
            os.killpg(self.pid, number)

    def wait(self) -> int:
        """Its exit code, minus the signal that ended it."""
        self.ended = True
        return int(self.server.readline())

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")


class Forks:
    def __init__(self, logs: Path) -> None:
        self.said = logs / "said"
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.forks"], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    @contextlib.contextmanager
    def start(self, project: "Project", stage: str = "train") -> Iterator[Run]:
        """A stage in this project; it does not outlive the block."""
        assert self.server.stdin
        request = [f"pipeline.stages.{stage}", str(project.root), str(self.said), project.environment]
        print(json.dumps(request), file=self.server.stdin, flush=True)
        run = Run(self.server, self.said)
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

    def close(self) -> None:
        os.killpg(self.server.pid, signal.SIGKILL)
        self.server.communicate()


def until(condition, run: Run, seconds: float = 300.0) -> None:  # type: ignore[no-untyped-def]
    """Waits for a condition in the shortest of steps."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, run.said()
        time.sleep(0.001)


def die_with_parent() -> None:
    """Also where pytest itself is killed while a run is stopped: Linux' PR_SET_PDEATHSIG."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def child(main: str, folder: str, said: str, environment: dict[str, str]) -> None:
    """Becomes the stage; does not return."""
    die_with_parent()
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    run_and_exit(lambda: importlib.import_module("pipeline.errors").run_stage(importlib.import_module(main).main), log)


def run_and_exit(work: Callable[[], int | None], log: int) -> NoReturn:
    """Ends this fork with the exit code of `work`, None = 0. What it says goes to the open file `log`."""
    for number in (1, 2):
        os.dup2(log, number)
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


def serve() -> None:
    die_with_parent()
    with keeping_imports():
        for module in MODULES:
            importlib.import_module(module)
    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            child(*json.loads(line))
        print(pid, file=replies, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=replies, flush=True)


if __name__ == "__main__":
    serve()
