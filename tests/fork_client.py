"""What asks the server of tests/forks.py for a run, and nothing that takes long to import; `python` of some clones."""

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence

SERVER = "TESTS_FORKS"  # where it listens
NOWHERE = "http://127.0.0.1:9"  # nothing listens here: a stage that asks the hub unbidden fails at once


class Run:
    """A stage or command at work, the leader of a process group of its own.

    command: what stands behind `python -m`; streams: its stdin, stdout and stderr.
    """

    def __init__(self, command: Sequence[str], folder: str, environment: dict[str, str], streams: Sequence[int]):
        self.server, self.ended = connect(), False
        umask = os.umask(0)
        os.umask(umask)
        socket.send_fds(self.server, [json.dumps([command, folder, environment, umask]).encode()], streams)
        self.pid = self._answer()

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):  # it was quicker
            os.killpg(self.pid, number)

    def wait(self) -> int:
        """Its exit code, minus the signal that ended it."""
        self.ended = True
        with self.server:
            return self._answer()

    def _answer(self) -> int:
        return int(self.server.recv(100))


def can_fork(environment: Mapping[str, str]) -> bool:
    """Not with a hub or a cache of one: libraries read where these are when they are imported."""
    return environment.get("HF_ENDPOINT") == NOWHERE and not os.path.exists(environment["HF_HOME"])


def connect() -> socket.socket:
    found = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    found.settimeout(900)
    deadline = time.monotonic() + 300  # it may still be importing
    while True:
        try:
            found.connect(os.environ[SERVER])
        except (FileNotFoundError, ConnectionRefusedError):
            assert time.monotonic() < deadline, "no server of tests/forks.py"
            time.sleep(0.05)
        else:
            return found


def main() -> None:
    """`python`, whose runs of the pipeline are forks."""
    module = sys.argv[2] if sys.argv[1:2] == ["-m"] else ""
    if module.partition(".")[0] != "pipeline" or not can_fork(os.environ):
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    run = Run(sys.argv[2:], os.getcwd(), dict(os.environ), [0, 1, 2])
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: run.kill(number))
    code = run.wait()
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
