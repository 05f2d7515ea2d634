"""Training logs as people have them: trl's trainer_state.json, CSV, JSON lines, and completions beside them.

What the columns mean is in `pipeline.diagnosis.foreign`. pandas reads Parquet; it is imported where it is needed.
"""

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.diagnosis.foreign import NAMES, OURS, STEPS, base_name, known_columns, text_metrics
from pipeline.errors import UserError, did_you_mean
from pipeline.rl.metrics import HISTORY_COLUMNS

Table = list[dict[str, float | None]]  # one row per step, under our names; None: not logged
WANTED = "trl's trainer_state.json, a CSV file, or one JSON object a line"
SHOWN = 20  # columns that a message lists
COMPLETIONS = ("completion", "completions", "response", "output")  # the first of them that is there counts


def read_log(file: Path) -> Table:
    """Rows in the order of steps. Raises UserError for a file that is no log, or has no step or no column we know."""
    return by_our_names(read_records(find_state(file)), str(file))


def find_state(file: Path) -> Path:
    """The file itself; of a folder that trl wrote, its trainer_state.json, or that of its last checkpoint."""
    if not file.is_dir():
        return file
    states = [place for place in (file / "trainer_state.json", *file.glob("checkpoint-*/trainer_state.json"))
        if place.is_file()]  # fmt: skip
    if not states:
        raise UserError(f"{file}: a folder without trainer_state.json; should be {WANTED}")
    return states[0] if states[0].parent == file else max(states, key=lambda state: natural(state.parent.name))


def natural(name: str) -> list[int]:
    return [int(digits) for digits in re.findall("[0-9]{1,18}", name)]


# --- files


def read_records(file: Path) -> list[dict[str, Any]]:
    """The rows of a file as they are. Its content tells the format. Raises UserError if no format fits."""
    text = read_text(file)
    start = text.lstrip()[:1]
    if not start:
        raise UserError(f"{file}: empty; should be {WANTED}")
    rows = parse_json(text, file) if start in "{[" else parse_table(text, file)
    if not rows:
        raise UserError(f"{file}: no rows; should be {WANTED}")
    return rows


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not text in UTF-8; should be {WANTED}") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise UserError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def parse_json(text: str, file: Path) -> list[dict[str, Any]]:
    """trainer_state.json, a list of rows, or JSON lines."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise UserError(f"{file}: nested too deeply; should be {WANTED}") from None
    except ValueError:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        content = [parse_line(line, f"{file}, line {number}") for number, line in lines]
    if isinstance(content, dict):
        content = content.get("log_history", [content])
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise UserError(f"{file}: no rows of names and values; should be {WANTED}")
    return [flat(row) for row in content]


def parse_line(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}; should be {WANTED}") from None


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten the tables in a row to paths such as `data/entropy`: verl's logger nests them."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= {f"{name}/{below}": each for below, each in value.items()}
        else:
            found[name] = value
    return found


def parse_table(text: str, file: Path) -> list[dict[str, Any]]:
    """CSV with a header; semicolons or tabs where the header has no comma."""
    header = text.lstrip().split("\n", 1)[0]
    delimiter = next((sign for sign in ",;\t" if sign in header), ",")
    reader = csv.reader(io.StringIO(text.lstrip(), newline=""), delimiter=delimiter)
    rows = []
    try:
        columns = [name.strip() for name in next(reader)]
        for cells in reader:
            if len(cells) > len(columns):
                raise UserError(f"{file}, line {reader.line_num}: {len(cells)} cells under {len(columns)} names")
            if cells:
                rows.append(dict(zip(columns, cells, strict=False)))
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num}: not CSV: {error}") from None
    if twice := [name for name in dict.fromkeys(columns) if columns.count(name) > 1 and name]:
        raise UserError(f"{file}: two columns are called {twice[0]!r}")
    return rows


# --- names


def by_our_names(records: Sequence[Mapping[str, Any]], source: str) -> Table:
    """Rows under our names, one per step. Several rows of one step are merged; of two values the later one counts, as
    after a resume. Raises UserError if there is no step, no column that we know, or two columns that mean the same."""
    columns = list(dict.fromkeys(name for row in records for name in row))
    steps = step_column(columns, source)
    known = known_columns([name for name in columns if not name.endswith(("__MIN", "__MAX"))], HISTORY_COLUMNS)
    if twice := next((names for names in known.values() if len(names) > 1), None):
        raise UserError(f"{source}: {twice[0]!r} and {twice[1]!r} mean the same to us: leave one in, of one run")
    if not known:
        every = [*OURS, *HISTORY_COLUMNS]
        near = next(filter(None, (did_you_mean(base_name(name), every) for name in columns if name != steps)), "")
        raise UserError(f"{source}: no column that we know, such as {examples()}; there are {listed(columns)}{near}")
    table: dict[float, dict[str, float | None]] = {}
    for record in records:
        step = number(record.get(steps))
        values = {ours: value for ours, (name,) in known.items() if (value := number(record.get(name))) is not None}
        if step is not None and math.isfinite(step):  # a row without a step is a summary
            table.setdefault(step, {"step": step}).update(values)
    if not table:
        raise UserError(f"{source}: no number in the column {steps!r}")
    return [table[step] for step in sorted(table)]


def step_column(columns: Sequence[str], source: str) -> str:
    found = [column for wanted in STEPS for column in columns if wanted in (column, base_name(column))]
    if not found:
        near = next(filter(None, (did_you_mean(column, STEPS) for column in columns)), "")
        raise UserError(f"{source}: no column of steps ({', '.join(STEPS)}); there are {listed(columns)}{near}")
    return found[0]


def listed(columns: Sequence[str]) -> str:
    more = f" and {len(columns) - SHOWN} more" if len(columns) > SHOWN else ""
    return ", ".join(columns[:SHOWN]) + more


def examples() -> str:
    return ", ".join(["reward_mean", NAMES["reward_mean"][0], "entropy", NAMES["zero_spread_share"][0]])


def number(value: Any) -> float | None:
    """A value of a cell; None for an empty one and for text. `NaN` is a value."""
    if isinstance(value, str) and not value.strip():
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        return None


# --- completions


def read_completions(place: Path) -> dict[float, dict[str, float]]:
    """The text metrics of each step that has enough completions.

    place: JSON lines, CSV, a Parquet file, or a folder of Parquet files, as trl's log_completions leaves it. Raises
    UserError without a step or a completion.
    """
    files = sorted(place.glob("*.parquet")) if place.is_dir() else [place]
    if not files:
        raise UserError(f"{place}: a folder without .parquet files; should be completions as trl writes them")
    texts: dict[float, list[str]] = {}
    for file in files:
        rows = read_parquet(file) if file.suffix == ".parquet" else read_records(file)
        columns = list(dict.fromkeys(name for row in rows for name in row))
        steps = step_column(columns, str(file))
        said = next((name for name in COMPLETIONS if name in columns), None)
        if said is None:
            near = next(filter(None, (did_you_mean(column, COMPLETIONS) for column in columns)), "")
            raise UserError(
                f"{file}: no column of completions ({', '.join(COMPLETIONS)}); there are {listed(columns)}{near}"
            )
        for row in rows:
            step, text = number(row.get(steps)), spoken(row.get(said))
            if step is not None and math.isfinite(step) and text is not None:
                texts.setdefault(step, []).append(text)
    return {step: metrics for step, said_then in texts.items() if (metrics := text_metrics(said_then))}


def read_parquet(file: Path) -> list[dict[str, Any]]:
    import pandas as pd

    try:
        return [{str(name): value for name, value in row.items()} for row in pd.read_parquet(file).to_dict("records")]
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise UserError(f"{file}: not a Parquet file: {error}") from None


def spoken(value: Any) -> str | None:
    """A completion's text; of a conversation, what its messages say."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Iterable) and not isinstance(value, Mapping):
        said = [message.get("content") for message in value if isinstance(message, Mapping)]
        return "\n".join(text for text in said if isinstance(text, str))
    return None
