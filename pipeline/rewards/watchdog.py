"""A reward that takes long says where it stands. It may hang: on a lock, a server, a regular expression."""

import contextlib
import faulthandler
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from tqdm import tqdm

PATIENCE = 60.0  # seconds until the first line; each further one takes twice as long
GRACE = 5.0  # seconds more, then C code holds the interpreter: no thread of Python's can say a line


@contextlib.contextmanager
def watchdog(name: str, place: Callable[[FrameType], str | None]) -> Iterator[None]:
    """While the block runs on, says on stderr after PATIENCE s, and again after twice, four times as long, that `name`
    is still running, and in which line. `place` names the line of a frame, or gives None where it is not the user's.

    Where C code does not let go of the interpreter, faulthandler writes the stacks of all threads instead.
    """
    caller, done = threading.get_ident(), threading.Event()
    stderr = sys.stderr  # the reward may put another one in its place

    def watch() -> None:
        started, delay = time.monotonic(), PATIENCE
        while not done.wait(delay):
            _dump_later(2 * delay + GRACE)
            where = _line(sys._current_frames().get(caller), place)
            with contextlib.suppress(Exception):  # what cannot be printed must not end the watch
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
    """The innermost line of the user's, else the innermost of all."""
    innermost = frame
    while frame is not None:
        if found := place(frame):
            return found
        frame = frame.f_back
    return f"line {innermost.f_lineno} of {innermost.f_code.co_filename}" if innermost else "no line of Python's"
