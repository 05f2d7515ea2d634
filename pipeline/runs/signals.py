"""SIGTERM and Ctrl-C as a request to end in an orderly way."""

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

TERM = {signal.SIGTERM}
replaced: list[tuple[Callable[[int, Any], None], Any]] = []  # our SIGTERM handlers, each with the one it replaced


@functools.cache
def hold_sigterm_across_forks() -> None:
    """A SIGTERM to a process that is being forked waits until the process has the handler from before `caught_signals`.

    Python notes a signal and runs its handler later. A process that has just been forked forgets the note, and a
    process that goes to sleep in between sleeps on. Then a multiprocessing.Pool that ends its workers as soon as it has
    started them waits for ever; the system's own handler ends them at once. Hooks of a fork cannot be removed again.
    """

    blocked = threading.local()  # the signals that the forking thread blocked before

    def hold() -> None:
        blocked.before = signal.pthread_sigmask(signal.SIG_BLOCK, TERM)

    def release() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked.before)

    def release_in_child() -> None:
        handler = signal.getsignal(signal.SIGTERM)
        for ours, before in replaced:
            if handler is ours:
                signal.signal(signal.SIGTERM, before)
        release()

    os.register_at_fork(before=hold, after_in_parent=release, after_in_child=release_in_child)


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and Ctrl-C in a list, so that the run ends after the step in progress.

    A second signal ends it at once. Processes that a reward forked end at SIGTERM and ignore Ctrl-C.
    """
    hold_sigterm_across_forks()
    received: list[int] = []
    owner = os.getpid()

    def note(number: int, _: object) -> None:
        if os.getpid() != owner:  # a terminal sends Ctrl-C to all processes, and the step in progress needs its workers
            return
        if number in received:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)
            return
        print("stopping after this step; once more stops at once", file=sys.stderr)
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    replaced.append((note, before[signal.SIGTERM]))
    try:
        yield received
    finally:
        replaced.pop()
        for number, handler in before.items():
            signal.signal(number, handler)
