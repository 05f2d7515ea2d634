"""Reports which line a slow reward is running: it may hang on a lock, a server or a regular expression."""

import contextlib
import faulthandler
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from tqdm import tqdm

PATIENCE = 60.0  # seconds until the first report; each further one takes twice as long
GRACE = 5.0  # seconds more without a report: C code holds the interpreter, so that no Python thread can run


@contextlib.contextmanager
def watchdog(name: str, place: Callable[[FrameType], str | None]) -> Iterator[None]:
    """While the block runs, report on stderr that `name` is still running and in which line: after PATIENCE seconds,
    then after twice and four times as long. `place` describes the line of a frame, or returns None if it is not the
    user's.

    If C code holds the interpreter, faulthandler writes the stacks of all threads instead.
    """
    caller, done = threading.get_ident(), threading.Event()
    stderr = sys.stderr  # the reward may replace it

    def watch() -> None:
        started, delay = time.monotonic(), PATIENCE
        while not done.wait(delay):
            _dump_later(2 * delay + GRACE)
            where = _line(sys._current_frames().get(caller), place)
            with contextlib.suppress(Exception):  # a failed print must not end the watch
                tqdm.write(
                    f"{name} has been running for {time.monotonic() - started:.0f} s, now in {where}", file=stderr
                )
            delay *= 2

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    _dump_later(PATIENCE + GRACE)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        faulthandler.cancel_dump_traceback_later()


def _dump_later(seconds: float) -> None:
    with contextlib.suppress(Exception):  # stderr has no file descriptor
        faulthandler.dump_traceback_later(seconds)


def _line(frame: FrameType | None, place: Callable[[FrameType], str | None]) -> str:
    """The innermost line of the user's files, else the innermost of all."""
    innermost = frame
    while frame is not None:
        if found := place(frame):
            return found
        frame = frame.f_back
    return f"line {innermost.f_lineno} of {innermost.f_code.co_filename}" if innermost else "no line of Python's"
