"""Many runs of a stage as processes of their own, without the seconds that importing takes: forked off one process that
has imported everything and computed nothing.

    python -m tests.forks pipeline.train mlflow    # a JSON line in: folder, environment; two out: process id, exit code
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ROOT, Project


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
    def __init__(self, stage: str, *modules: str) -> None:
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.forks", stage, *modules], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    @contextlib.contextmanager
    def start(self, project: Project, **environment: str) -> Iterator[Run]:
        """The stage in this project; it does not outlive the block."""
        assert self.server.stdin
        environment = {**project.environment, **environment}
        said = project.root.parent / "said"
        print(json.dumps([str(project.root), str(said), environment]), file=self.server.stdin, flush=True)
        run = Run(self.server, said)
        try:
            yield run
        finally:
            if not run.ended:
                run.kill()
                run.wait()

    def finish(self, project: Project, **environment: str) -> str:
        """Runs it to its end, which must be a good one; gives what it said."""
        with self.start(project, **environment) as run:
            code = run.wait()
        assert code == 0, run.said()
        return run.said()

    def close(self) -> None:
        os.killpg(self.server.pid, signal.SIGKILL)
        self.server.communicate()


def until(condition, run: Run, seconds: float = 60.0) -> None:  # type: ignore[no-untyped-def]
    """Waits for a condition in the shortest of steps."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, run.said()
        time.sleep(0.001)


def child(main: str, folder: str, said: str, environment: dict[str, str]) -> None:
    """Becomes the stage; does not return."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    log = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(log, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = 1
    try:
        importlib.import_module("pipeline.errors").run_stage(importlib.import_module(main).main)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve(main: str, modules: list[str]) -> None:
    for module in (main, *modules):
        importlib.import_module(module)
    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            child(main, *json.loads(line))
        print(pid, file=replies, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=replies, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:])
