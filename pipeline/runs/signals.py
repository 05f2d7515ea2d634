"""SIGTERM and Ctrl-C as a request to end in an orderly way."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and Ctrl-C in a list, so that the run ends after the step in progress.

    A second signal ends it at once. Processes that a reward forked end at SIGTERM and ignore Ctrl-C.
    """
    received: list[int] = []
    owner = os.getpid()

    def note(number: int, _: object) -> None:
        forked = os.getpid() != owner
        if forked and number == signal.SIGINT:  # a terminal sends it to all; the step in progress needs its workers
            return
        if number in received or forked:  # multiprocessing.Pool ends its workers by SIGTERM
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)
            return
        print("stopping after this step; once more stops at once", file=sys.stderr)
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
