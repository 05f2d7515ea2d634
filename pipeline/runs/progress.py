"""How far a loop is: a bar in a terminal, elsewhere a line now and then."""

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

from pipeline.timing import time_left

LINE_EVERY = 10.0  # seconds
Item = TypeVar("Item")


def progress(items: Sequence[Item], what: str, show: bool = True) -> Iterator[Item]:
    """Yield the items and show how many are done and the time left. Only one process has show=True."""
    with tqdm(items, what, disable=None if show else True, leave=False) as bar:
        if not (show and bar.disable):
            yield from bar
            return
    print(f"{what}: {len(items)} to do")
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - last >= LINE_EVERY:
            print(f"{what}: {done} of {len(items)}, {time_left((now - start) / done, len(items) - done)}")
            last = now
        yield item
