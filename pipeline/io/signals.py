"""SIGTERM and Ctrl-C as a request to end in an orderly way."""

import contextlib
import signal
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """SIGTERM and Ctrl-C end the run after the step in progress: their number appears in the list."""
    received: list[int] = []

    def note(number: int, _: object) -> None:
        print("stopping after this step; once more stops at once", file=sys.stderr)
        received.append(number)
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
