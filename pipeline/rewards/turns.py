"""Whose settings the process has: those of training, or those of a custom reward while it runs.

A reward may set a limit on the size of files, a umask, a limit on recursion; the thread that writes resume states needs
training's. So it writes while no reward runs, and a reward that is to run waits for the end of one write only, not of a
whole state.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_next, _settings = threading.RLock(), threading.RLock()  # a reward may call another one


@contextmanager
def settings_of_reward() -> Iterator[None]:
    """Inside, nothing is written by another thread."""
    with _next, _settings:  # whoever holds `_next` has the settings next: a lock alone may go back to who let it go
        yield


@contextmanager
def settings_of_training() -> Iterator[None]:
    """Inside, no reward runs, but for `rewards_may_run`."""
    with _settings:
        yield


@contextmanager
def rewards_may_run() -> Iterator[None]:
    """Within `settings_of_training`: a block that needs no setting, such as waiting for the disk."""
    _settings.release()
    try:
        yield
    finally:
        with _next:
            pass
        _settings.acquire()
