"""Resume states are written by a thread, while the next steps run."""

import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType

from pipeline.errors import UserError


class BackgroundWriter:
    """One thread that writes one thing at a time: the next one waits, so that memory holds one copy of a state.

    The next call of any method, or at the latest the end of the block, raises the exception of a failed write. The
    block ends when everything is written, also after an exception. Ctrl-C during a wait sets `stop`: the running write
    checks it and gives up.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._thread = ThreadPoolExecutor(1, "state-writer")
        self._writing: Future[None] | None = None
        self._noted = False

    def submit(self, write: Callable[[], None], beside: bool = True) -> None:
        """Run `write` in the thread; it writes a copy. With beside=False it writes training's own memory, which must
        not change meanwhile, so this call waits until it ends."""
        self.wait()
        self._writing = self._thread.submit(write)
        if not beside:
            self.wait()

    def raise_if_failed(self) -> None:
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self._writing is None:
            return
        try:
            self._writing.result()
        except KeyboardInterrupt:
            self.stop.set()
            wait([self._writing])
            raise
        finally:
            self._writing = None

    def note_once(self, text: str) -> None:
        if not self._noted:
            print(f"note: {text}", file=sys.stderr)
        self._noted = True

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except UserError as failed:
            if error is None:
                raise
            print(f"warning: {failed}", file=sys.stderr)  # the block's exception ends the run and is its error line
        finally:
            self._thread.shutdown()
