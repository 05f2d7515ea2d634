"""history.csv, written step by step."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.file_io import csv_line, translate_write_errors
from pipeline.rl.metrics import HISTORY_COLUMNS


@contextlib.contextmanager
def history_file(path: Path, rows: list[dict[str, float]]) -> Iterator[Callable[[dict[str, float]], None]]:
    """Write history.csv with these rows, and yield a function that appends the row of a step. Each row is flushed.
    Undefined values are `nan`, which plots leave out.

    After an exception the file is removed, so that no incomplete file stays. (The rows are in the resume state too.)
    Raises UserError as `file_io.translate_write_errors` does.
    """
    with translate_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w", encoding="utf-8", newline="\n")

    def append(row: dict[str, float]) -> None:
        with translate_write_errors(path):
            file.write(csv_line(row, HISTORY_COLUMNS))
            file.flush()

    try:
        file.write(",".join(HISTORY_COLUMNS) + "\n")
        for row in rows:
            append(row)
        yield append
        with translate_write_errors(path):
            file.close()
    except BaseException:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what could not be written cannot be written now either
            file.close()
        raise
