"""Files that are whole or absent: written beside their place, synced, then renamed into it."""

import contextlib
import csv
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that becomes `target` when the block ends without an exception."""
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp makes files private; the umask must not show in what we write
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that replaces `target` when the block ends without an exception."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
    try:
        yield temporary
        temporary.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(target: Path, text: str) -> None:
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def to_json(value: Any) -> str:
    """Indented and in the order given, so that a diff reads well. NaN is refused: it is not JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(target: Path, value: Any) -> None:
    write_text(target, to_json(value))


def write_jsonl(target: Path, rows: Iterable[dict[str, Any]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
    write_text(target, "".join(line + "\n" for line in lines))


def write_csv(target: Path, rows: list[dict[str, float]]) -> None:
    """A header from the first row's keys; undefined values are `nan`."""
    columns = list(rows[0])
    lines = [",".join(columns), *(",".join(repr(row[column]) for column in columns) for row in rows)]
    write_text(target, "\n".join(lines) + "\n")


def read_csv(source: Path) -> list[dict[str, float]]:
    """Rows of numbers. Raises ValueError for anything else, naming the line."""
    with source.open(encoding="utf-8", newline="") as lines:
        reader, rows = csv.reader(lines), []
        columns = next(reader, [])
        for number, cells in enumerate(reader, start=2):
            try:
                rows.append({name: float(cell) for name, cell in zip(columns, cells, strict=True)})
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
    if not rows:
        raise ValueError("no rows")
    return rows


def read_json(source: Path) -> Any:
    return json.loads(source.read_text(encoding="utf-8"))


def read_jsonl(source: Path) -> list[dict[str, Any]]:
    """Rows of a file that this pipeline wrote. Text may hold U+2028 and the like: only newlines end a row."""
    return [json.loads(line) for line in source.read_text(encoding="utf-8").split("\n") if line]


def finite_or_none(value: float) -> float | None:
    """JSON and DVC metrics have no NaN: what is undefined is null."""
    return value if math.isfinite(value) else None


def sha256(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def folder_digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder` but Python's caches, by relative POSIX path, sorted."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}
