"""Rows of JSONL, CSV and Parquet files, with where each stands. A malformed row is reported in one line that says where
it stands."""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, did_you_mean

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".parquet")

Row = dict[str, Any]
Located = tuple[str, Row]  # where a row is ("train.jsonl line 3"), and the row


def read_rows(path: Path, needed: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Located]:
    """Yield the rows of a file; its suffix tells the format. Of Parquet only these columns are read. Raises UserError
    if a Parquet or CSV file lacks a needed column."""
    if path.suffix == ".parquet":
        return read_parquet(path, needed, optional)
    return read_csv(path, needed) if path.suffix == ".csv" else read_jsonl(path)


def chosen_columns(where: str, present: Sequence[str], needed: Sequence[str], optional: Sequence[str]) -> list[str]:
    """The named columns that are there. Raises UserError where a needed one is not."""
    for column in needed:
        if column not in present:
            there = f"(there are: {', '.join(present) or 'none'}){did_you_mean(column, present)}"
            raise UserError(f"{where}: column {column!r} is missing {there}")
    return [column for column in dict.fromkeys((*needed, *optional)) if column in present]


def read_jsonl(path: Path) -> Iterator[Located]:
    """Yield the rows of a JSONL file, gzipped or not. Skips blank lines; raises UserError for malformed ones."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{path} line {number}"
                    yield where, _parse(where, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def read_csv(path: Path, needed: Sequence[str]) -> Iterator[Located]:
    """Yield the rows of a CSV file with a header, in UTF-8. Raises UserError where the header lacks a needed column,
    and for a row of another length."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.reader(lines, strict=True)
            columns = next(rows, [])
            if len(set(columns)) < len(columns):
                twice = next(column for column in columns if columns.count(column) > 1)
                raise UserError(f"{path}: there are {columns.count(twice)} columns {twice!r}; keep one")
            chosen_columns(str(path), columns, needed, ())
            for cells in rows:
                where = f"{path} line {rows.line_num}"
                if cells and len(cells) != len(columns):
                    raise UserError(
                        f"{where}: has {len(cells)} cells, the header {len(columns)}; quote what holds a comma"
                    )
                if cells:
                    yield where, dict(zip(columns, cells, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a CSV file in UTF-8: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _parse(where: str, line: bytes) -> Any:
    try:
        # stripped, so that errors name the right column
        return json.loads(line.decode().rstrip(), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: malformed JSON at column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # thousands of digits or brackets
        raise UserError(f"{where}: malformed JSON: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} stands twice in an object")
    return row


def read_parquet(path: Path, needed: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Located]:
    """Yield the rows of a Parquet file, these columns only. Raises UserError if it is damaged or lacks a needed one."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as table:
            present = table.schema_arrow.names
            columns = chosen_columns(str(path), present, needed, optional)
            if twice := [column for column in columns if present.count(column) > 1]:
                raise UserError(f"{path}: there are {present.count(twice[0])} columns {twice[0]!r}; keep one")
            number = 0
            for batch in table.iter_batches(columns=columns):
                for cells in zip(*(batch[column] for column in columns), strict=True):
                    number += 1
                    where = f"{path} row {number}"
                    yield where, _values(where, dict(zip(columns, cells, strict=True)))
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}") from None


def _values(where: str, cells: dict[str, Any]) -> Row:
    """A row of Arrow scalars as Python values. Raises UserError if one has none, such as a date in the year 300000."""
    row = {}
    for column, cell in cells.items():
        try:
            row[column] = cell.as_py()
        except (ValueError, OverflowError, ImportError) as error:
            raise UserError(f"{where}: {column} cannot be read: {error}") from None
    return row
