"""Atomic files and folders: written beside their place, then renamed into it."""

import contextlib
import errno
import functools
import hashlib
import json
import math
import operator
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

# Errors that are no bug of ours: a full disk, a quota, a size limit, a folder that is read-only or another user's, a
# broken disk, a file in the place of a folder or the reverse, a name that is too long.
REFUSED = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
    errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
}  # fmt: skip


@contextlib.contextmanager
def translate_write_errors(target: Path) -> Iterator[None]:
    """Raises UserError naming `target` if the block cannot write it, for example to a full disk."""
    try:
        yield
    except Exception as error:  # safetensors and tokenizers raise their own classes; the text ends in (os error 28)
        told = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        if number not in REFUSED:
            raise
        where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        raise UserError(
            f"{target} cannot be written: {os.strerror(number)}{where}; once that is mended, the same command goes on"
        ) from error


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that becomes `target` when the block ends without an exception. Only one writer
    at a time: the temporary name is fixed, so that a writer overwrites what a killed one left. Raises UserError as
    `translate_write_errors` does."""
    temporary = _beside(target, "tmp")
    with translate_write_errors(target):
        make_folder(target.parent)
        try:
            yield temporary
            temporary.chmod(0o644)  # others can read it whatever the umask
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that replaces `target` when the block ends without an exception. Only one
    writer at a time, as for `atomic_path`. Raises UserError as `translate_write_errors` does."""
    temporary, before = _beside(target, "tmp"), _beside(target, "old.tmp")
    with translate_write_errors(target):
        for left in (temporary, before):  # left by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        make_folder(temporary)
        try:
            yield temporary
            make_readable(temporary)
            if target.exists():
                target.replace(before)  # rename before deleting: a kill must not leave half a folder at `target`
            temporary.replace(target)
            shutil.rmtree(before, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, readable for everybody."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        path.chmod(0o755)


def make_readable(folder: Path) -> None:
    """Let everybody read `folder` and everything below it, whatever the umask. safetensors writes files that only their
    owner can read, but other users of a shared folder load the trained policy."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def make_all_readable(folder: Path) -> None:
    """Let everybody read this user's files below `folder`. DVC writes an output that is a single file anew when it
    commits it, with the user's umask. Files in an output folder keep their mode."""
    for path in folder.rglob("*"):
        with contextlib.suppress(PermissionError):
            if path.is_file() and not path.is_symlink():
                path.chmod(path.stat().st_mode | 0o444)


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}")


def write_text(target: Path, text: str) -> None:
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def to_json(value: Any) -> str:
    """Indented JSON in the order given, so that a diff reads well. Raises ValueError for NaN, which is not JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(target: Path, value: Any) -> None:
    write_text(target, to_json(value))


def write_jsonl(target: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One line per row. Without rows the file holds an empty line, since DVC warns of empty outputs."""
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
    write_text(target, "".join(line + "\n" for line in lines) or "\n")


def write_csv(target: Path, rows: list[dict[str, float]]) -> None:
    """A header from the first row's keys; undefined values are `nan`."""
    columns = list(rows[0])
    write_text(target, ",".join(columns) + "\n" + "".join(csv_line(row, columns) for row in rows))


def csv_line(row: dict[str, float], columns: Iterable[str]) -> str:
    return ",".join(repr(row[column]) for column in columns) + "\n"


def parse_csv(text: str) -> list[dict[str, float]]:
    """Rows of numbers; an empty cell is undefined. Raises ValueError for anything else, naming the line."""
    columns, *lines = [line.split(",") for line in text.splitlines()] or [[]]
    rows = []
    for number, cells in enumerate(lines, start=2):
        try:
            rows.append({name: float(cell or "nan") for name, cell in zip(columns, cells, strict=True)})
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    if not rows:
        raise ValueError("no rows")
    return rows


def read_csv(source: Path) -> list[dict[str, float]]:
    return parse_csv(source.read_text(encoding="utf-8"))


def read_json(source: Path) -> Any:
    return json.loads(source.read_text(encoding="utf-8"))


def read_jsonl(source: Path) -> list[dict[str, Any]]:
    """Rows of a file that this pipeline wrote. Text may hold U+2028 and the like: only newlines end a row."""
    return [json.loads(line) for line in source.read_text(encoding="utf-8").split("\n") if line]


def flatten(tree: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested tables by their dotted path. A list is a leaf."""
    if not isinstance(tree, dict):
        return {path: tree}
    below = (flatten(value, f"{path}.{name}" if path else str(name)) for name, value in tree.items())
    return {place: leaf for leaves in below for place, leaf in leaves.items()}


def total(values: Iterable[float]) -> float:
    """The sum from left to right. From Python 3.12 on, `sum` compensates for rounding, which gives other bytes."""
    return functools.reduce(operator.add, values, 0.0)


def finite_or_none(value: float) -> float | None:
    """None for an undefined value: JSON and DVC metrics have no NaN."""
    return value if math.isfinite(value) else None


def sha256(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def folder_digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder` but Python's caches, by relative POSIX path, sorted."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def why_unwatched(path: Path, roots: Iterable[Path]) -> str | None:
    """Say why DVC, which watches the folders `roots`, would miss an edit of `path`; None if it would notice the edit.

    DVC follows links to files, and follows `roots` that are links, but no link to a folder below them.
    """
    for root in roots:
        if path.resolve().is_relative_to(root.resolve()):
            return None
        written, folder = Path(os.path.abspath(path)), Path(os.path.abspath(root))
        if ".." in path.parts or not written.is_relative_to(folder):
            continue
        between = [written, *written.parents][: len(written.parts) - len(folder.parts)]
        linked = [place for place in between if place.is_symlink() and place.is_dir()]
        if not linked:
            return None
        name = root / linked[-1].relative_to(folder)
        return f"{name} is a link to a folder, into which DVC does not look; copy it, or link its files (`cp -rs`)"
    return "DVC notices no edit elsewhere"
