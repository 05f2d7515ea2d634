"""Stage `prepare`: rows of a dataset -> filtered training and held-out prompts, with the columns that rewards read."""

import hashlib
import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from string import Formatter
from typing import Any

from pipeline.config.load import load_params
from pipeline.config.schema import PromptSet
from pipeline.data.hub import DamagedError, drop_damaged, from_hub
from pipeline.data.prompts import conversation_text
from pipeline.data.rows import SUFFIXES, Located, Row, chosen_columns, read_rows
from pipeline.errors import UserError, run_stage
from pipeline.file_io import atomic_path, why_unwatched, write_json, write_jsonl
from pipeline.paths import HELDOUT_PROMPTS, RUN_FILES, TRAIN_PROMPTS

WATCHED = (
    Path("data/pocket/prompts"),
    Path("data/pocket-math/prompts"),
    Path("data/local"),
)  # DVC hashes these folders; it would not notice edits elsewhere
LANGUAGE, MESSAGE_ID = "lang", "message_id"  # columns of OASST1; message_id is kept if it is there
HELDOUT_SPLIT = "validation"  # unless the prompt set names another split, or a share

Splits = Callable[[str], tuple[str, Iterable[Located]]]  # from a split to its name in messages and its rows


def main() -> None:
    params = load_params()
    key, rules = f"prompt_sets.{params.prompts}", params.selected_prompt_set
    read_split = hub_splits(key, rules) if rules.repo else local_splits(key, rules)

    where, rows = read_split(rules.train_split)
    train, train_counts = select(rows, rules)
    _refuse_empty(train, train_counts, where, key)
    if rules.heldout_share is not None:
        train, train_counts, heldout, heldout_counts = hold_out(train, train_counts, rules, f"{where}: {key}")
    else:
        where, rows = read_split(rules.heldout_split or HELDOUT_SPLIT)
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
        print(f"{counts['kept']} prompts {name}, of {counts['read']} rows{dropped(counts)}")


def dropped(counts: dict[str, Any]) -> str:
    """` (dropped: too_long 3)`: how many rows broke which rule; nothing where none did."""
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
    read = 0
    for where, row in rows:
        _check(where, row, needed_columns(rules))
        if rules.language is not None and not isinstance(row[LANGUAGE], str):
            raise UserError(f"{where}: {LANGUAGE} should be a string, not {_kind(row[LANGUAGE])}")
        read += 1
        made = prompt_of(where, row, rules)
        text = made["prompt"]
        # in a conversation, the rules apply to the message that is to be answered
        asked = made["messages"][-1]["content"] if "messages" in made else text
        reason = _first_broken_rule(asked, row.get(LANGUAGE), rules)
        if reason is None and text in train_texts:
            reason = "leaked"
        if reason is None and text in seen and rules.deduplicate:
            reason = "duplicate"
        if reason is None:
            seen.add(text)
            prompts.append(made)
        else:
            broken[reason] += 1
    return prompts, _counts(read, prompts, broken)


def _counts(read: int, prompts: list[Row], broken: dict[str, int]) -> dict[str, Any]:
    distinct = len({row["prompt"] for row in prompts})
    duplicates = len(prompts) - distinct + broken["duplicate"]
    return {"read": read, "kept": len(prompts), "distinct": distinct, "duplicates": duplicates, "dropped": broken}


def hold_out(
    prompts: list[Row], counts: dict[str, Any], rules: PromptSet, where: str
) -> tuple[list[Row], dict[str, Any], list[Row], dict[str, Any]]:
    """The prompts to train on and the held-out ones, each with its counts. A share `heldout_share` of the distinct
    prompts, drawn by `heldout_seed`, is held out with all of its rows. The order of the rows does not matter, and added
    rows move few prompts.
    """
    texts = {row["prompt"] for row in prompts}
    order = sorted(texts, key=lambda text: hashlib.sha256(f"{rules.heldout_seed}:{text}".encode()).digest())
    chosen = set(order[: max(1, math.floor(float(rules.heldout_share or 0) * len(order) + 0.5))])
    parts = [[row for row in prompts if (row["prompt"] in chosen) == held] for held in (False, True)]
    if not all(parts):
        raise UserError(
            f"{where}.heldout_share = {rules.heldout_share:g} of {len(texts)} prompts leaves none to train on"
        )
    train, heldout = parts
    # dropped rows are counted with the training prompts, even duplicates of held-out prompts
    train_counts = _counts(counts["read"] - len(heldout), train, counts["dropped"])
    return train, train_counts, heldout, _counts(len(heldout), heldout, dict.fromkeys(counts["dropped"], 0))


def needed_columns(rules: PromptSet) -> tuple[str, ...]:
    """The columns that each row must have; `message_id` may be missing."""
    language = () if rules.language is None else (LANGUAGE,)
    return tuple(dict.fromkeys((*rules.prompt_columns, *language, *rules.columns)))


def prompt_of(where: str, row: Row, rules: PromptSet) -> Row:
    """A row of the prompts' files. Raises UserError if the columns of the dataset's row make no prompt."""
    made: Row = {}
    column = rules.prompt_columns[0]
    if rules.prompt_template is not None:
        parts = Formatter().parse(rules.prompt_template)
        made["prompt"] = "".join(text + (_text_of(where, c, row[c]) if c else "") for text, c, _, _ in parts)
    elif isinstance(value := row[column], list):
        messages = _messages(f"{where}: {column}", value)
        made |= {"prompt": conversation_text(messages), "messages": messages}
    elif isinstance(value, str):
        made["prompt"] = value
    else:
        raise UserError(f"{where}: {column} should be a string or a list of messages, not {_kind(value)}")
    made[MESSAGE_ID] = row.get(MESSAGE_ID)
    if rules.columns:
        made["columns"] = {name: row[name] for name in rules.columns}
    return made


def _text_of(where: str, column: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{where}: {column} should be a string or a number for prompt_template, not {_kind(value)}")
    return str(value)


def _messages(where: str, value: list[Any]) -> list[dict[str, str]]:
    """The messages of a conversation up to where the answer begins: an answer at its end is left out. Preference data
    has one in its columns `chosen` and `rejected`."""
    messages = []
    for place, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(f"{where}: message {place} should be an object with role and content, not {_kind(message)}")
        for name in ("role", "content"):
            if not isinstance(message[name], str):
                raise UserError(f"{where}: {name} of message {place} should be a string, not {_kind(message[name])}")
        messages.append({name: message[name] for name in ("role", "content")})
    if messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or messages[-1]["role"] in ("assistant", "system"):
        raise UserError(f"{where}: the conversation has no message that could be answered")
    return messages


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


def _check(where: str, row: Any, needed: Sequence[str]) -> None:
    """Raises UserError unless a row is an object with the needed columns, whose values JSON can hold."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row should be an object with {' and '.join(needed)}, not {_kind(row)}")
    for column in chosen_columns(where, list(row), needed, [MESSAGE_ID]):
        if column == MESSAGE_ID and not isinstance(row[column], str | None):
            raise UserError(f"{where}: {column} should be a string, not {_kind(row[column])}")
        _check_value(f"{where}: {column}", row[column])


def _check_value(where: str, value: Any) -> None:
    """Raises UserError for a value that JSON cannot hold."""
    if isinstance(value, str) and not _is_unicode(value):
        raise UserError(f"{where} holds half of a surrogate pair, which is no character; write it whole")
    if isinstance(value, dict | list):
        for inner in value if isinstance(value, list) else (*value, *value.values()):
            _check_value(where, inner)
    elif not isinstance(value, str | int | float | bool | type(None)) or (
        isinstance(value, float) and not math.isfinite(value)
    ):
        raise UserError(f"{where} should be a string, a number, a list or an object of these, not {_kind(value)}")


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
        because = f"{reasons}; loosen the rules in {key}" if reasons else "; it should hold rows"
        raise UserError(f"{where}: none of its {counts['read']} rows is left as a prompt{because}")


# --- sources: each returns a function from split to (name, rows)


def local_splits(key: str, rules: PromptSet) -> Splits:
    """The splits of a directory that holds train.* and validation.*, or of the one file that both are drawn from."""
    source = Path(str(rules.source))
    if not os.path.exists(source):  # pathlib raises for names that are not valid, such as too long ones
        raise UserError(f"{key}.source = {rules.source!r}: no such directory or file")
    if reason := why_unwatched(source, WATCHED):
        folders = " or ".join(f"{folder}/" for folder in WATCHED)
        raise UserError(f"{key}.source = {rules.source!r}: should lie in {folders}: {reason}")
    columns = needed_columns(rules), (MESSAGE_ID,)
    if source.is_file():
        if not source.name.endswith(SUFFIXES):
            raise UserError(
                f"{key}.source = {rules.source!r}: should be a directory, or end in {' or '.join(SUFFIXES)}"
            )
        if rules.heldout_share is None:
            raise UserError(f"{key}: one file needs heldout_share, the share of its prompts to hold out, such as 0.1")
        return lambda split: (str(source), read_rows(source, *columns))

    def read_split(split: str) -> tuple[str, Iterable[Located]]:
        names = [f"{split}{suffix}" for suffix in SUFFIXES]
        found = [source / name for name in names if (source / name).is_file()]
        if len(found) != 1:
            raise UserError(f"{source}: should hold one of {', '.join(names)}; it holds {len(found) or 'none'} of them")
        return str(found[0]), read_rows(found[0], *columns)

    if rules.heldout_share is None:
        read_split(rules.heldout_split or HELDOUT_SPLIT)  # report its errors before minutes are spent on the other file
    return read_split


def hub_splits(key: str, rules: PromptSet) -> Splits:
    """The splits of a dataset from the hub at its pinned revision. Downloads go to the user's Hugging Face cache."""
    name = f"{rules.repo}@{rules.revision}"
    if not re.fullmatch("[0-9a-f]{40}", rules.revision or ""):
        raise UserError(f"{key}.revision = {rules.revision!r}: pin a full commit of {rules.repo} (40 hex digits)")
    if Path(str(rules.repo)).exists():  # `datasets` would read the path, whatever the revision
        raise UserError(f"{key}.repo = {rules.repo!r} is a path here: name a directory with source, not repo")
    import datasets

    try:
        dataset = from_hub(
            f"{key}: dataset {name}",
            "prompts: pocket",
            lambda: _fetch(str(rules.repo), str(rules.revision), rules.config),
        )
    except (datasets.exceptions.DatasetsError, ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{key}: {name} cannot be read: {type(error).__name__}: {said}") from None

    def read_split(split: str) -> tuple[str, Iterable[Located]]:
        if split not in dataset:
            raise UserError(f"{key}: {name} has no {split} split (there are: {', '.join(dataset)})")
        present = dataset[split].column_names
        columns = chosen_columns(f"{name} {split}", present, needed_columns(rules), (MESSAGE_ID,))
        return f"{name} {split}", decoded(f"{name} {split}", dataset[split].select_columns(columns))

    if rules.heldout_share is None:
        read_split(rules.heldout_split or HELDOUT_SPLIT)
    return read_split


def decoded(where: str, rows: Iterable[Row]) -> Iterator[Located]:
    """Yield the rows with their places. Raises UserError for a row that cannot be decoded, such as a picture."""
    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            yield f"{where} row {number}", row
    except Exception as error:  # any class: it depends on the library that decodes the column
        raise UserError(f"{where} row {number + 1}: cannot be read: {type(error).__name__}: {error}") from None


def _fetch(repo: str, revision: str, config: str | None) -> Any:
    """The dataset, from the cache if it is there. If a downloaded file is damaged, delete the dataset that was prepared
    from it and raise DamagedError."""
    import datasets
    from huggingface_hub import constants

    prepared = None
    try:
        builder = datasets.load_dataset_builder(repo, config, revision=revision)
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
