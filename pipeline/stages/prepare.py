"""Stage `prepare`: messages -> filtered prompts, for training and held out (the source's validation split)."""

import csv
import gzip
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Set
from pathlib import Path
from typing import Any

from pipeline.config.load import load_params
from pipeline.config.schema import PromptSet
from pipeline.data.hub import DamagedError, drop_damaged, from_hub
from pipeline.errors import UserError, run_stage
from pipeline.file_io import atomic_path, why_unwatched, write_json, write_jsonl
from pipeline.paths import HELDOUT_PROMPTS, RUN_FILES, TRAIN_PROMPTS

WATCHED = (Path("data/pocket/prompts"), Path("data/local"))  # DVC hashes these: it would not notice edits elsewhere
COLUMNS = {"text": (str,), "lang": (str,), "message_id": (str, type(None))}

Row = dict[str, Any]
Located = tuple[str, Row]  # where a row is ("train.jsonl line 3"), and the row


def main() -> None:
    params = load_params()
    key, rules = f"prompt_sets.{params.prompts}", params.selected_prompt_set
    read_split = hub_splits(key, rules) if rules.repo else local_splits(key, rules)

    where, rows = read_split("train")
    train, train_counts = select(rows, rules)
    _refuse_empty(train, train_counts, where, key)
    where, rows = read_split("validation")
    heldout, heldout_counts = select(rows, rules, train_texts={row["prompt"] for row in train})
    _refuse_empty(heldout, heldout_counts, where, key)

    # write everything before renaming anything: a full disk leaves the earlier files
    with (
        atomic_path(TRAIN_PROMPTS) as train_file,
        atomic_path(HELDOUT_PROMPTS) as heldout_file,
        atomic_path(RUN_FILES.prepare) as report_file,
    ):
        write_jsonl(train_file, train)
        write_jsonl(heldout_file, heldout)
        write_json(report_file, {"train": train_counts, "heldout": heldout_counts})
    for name, counts in (("to train on", train_counts), ("held out", heldout_counts)):
        print(f"{counts['kept']} prompts {name}, of {counts['read']} messages{dropped(counts)}")


def dropped(counts: dict[str, Any]) -> str:
    """` (dropped: too_long 3)`: how many messages broke which rule; nothing where none did."""
    reasons = ", ".join(f"{reason} {count}" for reason, count in counts["dropped"].items() if count)
    return f" (dropped: {reasons})" if reasons else ""


def select(
    rows: Iterable[Located], rules: PromptSet, train_texts: Collection[str] = frozenset()
) -> tuple[list[Row], dict[str, Any]]:
    """The prompts that pass the filter, and counts: rows read, kept, dropped by the first broken rule, duplicates.

    Texts in `train_texts` are dropped as leaked. Duplicates are counted even if the rules keep them.
    """
    prompts: list[Row] = []
    reasons = ("language", "too_short", "too_long", "first_character", "leaked", "duplicate")
    broken = dict.fromkeys(reasons, 0)
    seen: set[str] = set()
    read = duplicates = 0
    for where, row in rows:
        _check(where, row, needed_columns(rules))
        read += 1
        text = row["text"]
        reason = _first_broken_rule(text, row.get("lang"), rules)
        if reason is None and text in train_texts:
            reason = "leaked"
        if reason is None and text in seen:
            duplicates += 1
            reason = "duplicate" if rules.deduplicate else None
        if reason is None:
            seen.add(text)
            prompts.append({"prompt": text, "message_id": row.get("message_id")})
        else:
            broken[reason] += 1
    counts = {"read": read, "kept": len(prompts), "distinct": len(seen), "duplicates": duplicates, "dropped": broken}
    return prompts, counts


def needed_columns(rules: PromptSet) -> Set[str]:
    """The columns that each message must have; `message_id` may be missing."""
    return {"text"} if rules.language is None else {"text", "lang"}


def _first_broken_rule(text: str, lang: str | None, rules: PromptSet) -> str | None:
    if rules.language is not None and lang != rules.language:
        return "language"
    if len(text) < rules.min_characters:
        return "too_short"
    if rules.max_characters is not None and len(text) > rules.max_characters:
        return "too_long"
    if rules.first_character == "upper" and not text[0].isupper():
        return "first_character"
    return None


def _check(where: str, row: Any, needed: Set[str]) -> None:
    """Raises UserError unless a row is an object with the needed columns, each of its kind."""
    if not isinstance(row, dict):
        raise UserError(
            f"{where}: a row should be an object with {' and '.join(sorted(needed, reverse=True))}, not {_kind(row)}"
        )
    for column, kinds in COLUMNS.items():
        if column not in row:
            if column in needed:
                raise UserError(f"{where}: column {column!r} is missing (there are: {', '.join(row) or 'none'})")
        elif not isinstance(row[column], kinds):
            raise UserError(f"{where}: {column} should be a string, not {_kind(row[column])}")
        elif row[column] is not None and not _is_unicode(row[column]):
            raise UserError(f"{where}: {column} holds half of a surrogate pair, which is no character; write it whole")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null", bool: "true or false"}
    return names.get(type(value), f"the number {value}" if isinstance(value, int | float) else type(value).__name__)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_empty(prompts: list[Row], counts: dict[str, Any], where: str, key: str) -> None:
    if not prompts:
        reasons = dropped(counts)
        because = f"{reasons}; loosen the rules in {key}" if reasons else "; it should hold messages"
        raise UserError(f"{where}: none of its {counts['read']} rows is left as a prompt{because}")


# --- sources: each returns a function from split to (name, rows)


def local_splits(key: str, rules: PromptSet) -> Callable[[str], tuple[str, Iterable[Located]]]:
    """The splits of a directory that holds train.* and validation.* as .jsonl, .jsonl.gz, .csv or .parquet."""
    source = Path(str(rules.source))
    if not os.path.isdir(source):  # pathlib raises for names that are not valid, such as too long ones
        raise UserError(f"{key}.source = {rules.source!r}: no such directory")
    if reason := why_unwatched(source, WATCHED):
        folders = " or ".join(f"{folder}/" for folder in WATCHED)
        raise UserError(f"{key}.source = {rules.source!r}: should lie in {folders}: {reason}")

    def read_split(split: str) -> tuple[str, Iterable[Located]]:
        names = [f"{split}{suffix}" for suffix in (".jsonl", ".jsonl.gz", ".csv", ".parquet")]
        found = [source / name for name in names if (source / name).is_file()]
        if len(found) != 1:
            raise UserError(f"{source}: should hold one of {', '.join(names)}; it holds {len(found) or 'none'} of them")
        if found[0].suffix == ".parquet":
            return str(found[0]), read_parquet(found[0], needed_columns(rules))
        return str(found[0]), read_csv(found[0]) if found[0].suffix == ".csv" else read_jsonl(found[0])

    read_split("validation")  # a missing file is reported before minutes are spent on the other one
    return read_split


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


def read_csv(path: Path) -> Iterator[Located]:
    """Yield the rows of a CSV file with a header, in UTF-8. Raises UserError for a row of another length."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.reader(lines, strict=True)
            columns = next(rows, [])
            if len(set(columns)) < len(columns):
                twice = next(column for column in columns if columns.count(column) > 1)
                raise UserError(f"{path}: there are {columns.count(twice)} columns {twice!r}; keep one")
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


def read_parquet(path: Path, needed: Set[str]) -> Iterator[Located]:
    """Yield the rows of a Parquet file, needed columns only. Raises UserError if it is damaged or lacks one."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as table:
            present = table.schema_arrow.names
            missing = [column for column in COLUMNS if column not in present and column in needed]
            if missing:
                raise UserError(f"{path}: column {missing[0]!r} is missing (there are: {', '.join(present)})")
            columns = [column for column in COLUMNS if column in present]
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
            raise UserError(f"{where}: {column} should be a string: {error}") from None
    return row


def hub_splits(key: str, rules: PromptSet) -> Callable[[str], tuple[str, Iterable[Located]]]:
    """The splits of a dataset from the hub at its pinned revision. Downloads go to the user's Hugging Face cache."""
    name = f"{rules.repo}@{rules.revision}"
    if not re.fullmatch("[0-9a-f]{40}", rules.revision or ""):
        raise UserError(f"{key}.revision = {rules.revision!r}: pin a full commit of {rules.repo} (40 hex digits)")
    if Path(str(rules.repo)).exists():  # `datasets` would read it, whatever the revision
        raise UserError(f"{key}.repo = {rules.repo!r} is a path here: name a directory with source, not repo")
    import datasets

    try:
        dataset = from_hub(
            f"{key}: dataset {name}", "prompts: pocket", lambda: _fetch(str(rules.repo), str(rules.revision))
        )
    except (datasets.exceptions.DatasetsError, ValueError, RuntimeError) as error:
        raise UserError(f"{key}: {name} cannot be read: {type(error).__name__}: {error}") from None

    def read_split(split: str) -> tuple[str, Iterable[Located]]:
        if split not in dataset:
            raise UserError(f"{key}: {name} has no {split} split (there are: {', '.join(dataset)})")
        columns = dataset[split].column_names
        missing = [column for column in COLUMNS if column not in columns and column in needed_columns(rules)]
        if missing:
            raise UserError(f"{name} {split}: column {missing[0]!r} is missing (there are: {', '.join(columns)})")
        rows = dataset[split].select_columns([column for column in COLUMNS if column in columns])
        return f"{name} {split}", ((f"{name} {split} row {number}", row) for number, row in enumerate(rows, start=1))

    read_split("validation")
    return read_split


def _fetch(repo: str, revision: str) -> Any:
    """The dataset, from the cache if it is there. If a downloaded file is damaged, what was prepared from it is deleted
    too. Raises DamagedError."""
    import datasets
    from huggingface_hub import constants

    prepared = None
    try:
        builder = datasets.load_dataset_builder(repo, revision=revision)
        # If the hub cannot be reached, `datasets` takes any revision in its cache.
        if builder.hash != revision:
            raise ConnectionError("only another revision is in the local cache")
        prepared = Path(builder.cache_dir)
        builder.download_and_prepare()
    finally:
        try:
            drop_damaged(Path(constants.HF_HUB_CACHE, f"datasets--{repo.replace('/', '--')}", "snapshots", revision))
        except DamagedError:
            if prepared:
                shutil.rmtree(prepared, ignore_errors=True)
            raise
    return builder.as_dataset()


if __name__ == "__main__":
    run_stage(main)
