"""`reinforce diagnose LOG`: the verdict on a run that anybody trained, from its log.

Prints the verdict as the stage `diagnose` does, what it compares with, and which checks the log does not allow.
docs/DIAGNOSE.md has the names that are read and what they have to mean.
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.diagnosis.cures import root_causes
from pipeline.diagnosis.explanations import REFERENCE, evidence, headline, summary
from pipeline.diagnosis.foreign import ADVICE, TEXTS, Check, Judgement, first_rows, history_rows, judge
from pipeline.diagnosis.terms import Note, notes
from pipeline.diagnosis.verdict import IN_TRAINING, TITLES
from pipeline.errors import UserError
from pipeline.file_io import read_csv, to_json
from pipeline.paths import RunFiles
from pipeline.rl.metrics import CALIBRATION_COLUMNS, HISTORY_COLUMNS
from pipeline.runs.foreign_logs import Table, by_our_names, read_completions, read_log
from pipeline.runs.results import by_term, read_result
from pipeline.tracking.logged_run import read_run
from pipeline.tracking.summaries import readable

MLFLOW = "mlflow:"
ESTIMATED = {  # columns that are estimated if they are not logged
    "empty_share": "at least, from the mean length and the share that was cut off",
    "ref_logprob": "from entropy and kl",
}


def main(options: argparse.Namespace) -> None:
    """Raises UserError where the log, completions or calibration cannot be read, or hold nothing that we know."""
    table, calibration = read(options.log)
    if options.calibration:
        calibration = read_calibration(options.calibration)
    if options.completions:
        add_completions(table, options.completions)
    rows = history_rows(table, HISTORY_COLUMNS)
    if not rows:
        raise UserError(f"{options.log}: no step with a reward, a length or another number of its samples")
    first = first_rows(len(rows)) if options.first is None else options.first
    if first and not 2 <= first < len(rows):
        raise UserError(f"--first {first}: should be 2 to {len(rows) - 1}, as the log has {len(rows)} rows; 0 is none")
    judged = judge(rows, calibration, first)
    content = report(judged, table)
    told = notes_beside(options.log)
    content["headline"] = " ".join([content["headline"], *(note.short for note in told)])
    content["notes"] = [{"kind": note.kind, "term": note.term, "text": note.text} for note in told]
    print(to_json(content) if options.json else text(content), end="")


def read(log: str) -> tuple[Table, list[dict[str, float]]]:
    """The log under our column names, and the calibration batches if it is a run of ours in MLflow."""
    if not log.startswith(MLFLOW):
        return read_log(Path(log).expanduser()), []
    with readable(instead=""):
        records, calibration = read_run(log.removeprefix(MLFLOW), HISTORY_COLUMNS)
    return by_our_names(records, log), calibration


def read_calibration(file: Path) -> list[dict[str, float]]:
    """Rows of a calibration.csv. Raises UserError."""
    try:
        rows = read_csv(file)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror.lower() if error.strerror else error}") from None
    except ValueError as error:
        raise UserError(f"{file}: no table of numbers: {error}; should be as reports/train/calibration.csv") from None
    known = [name for name in CALIBRATION_COLUMNS if name in rows[0] and name != "batch"]
    if not known or len(rows) < 2:
        raise UserError(f"{file}: should have two or more rows, batches without learning, and columns of history.csv")
    return [dict.fromkeys(CALIBRATION_COLUMNS, math.nan) | row for row in rows]


def notes_beside(log: str) -> list[Note]:
    """Notes on the terms of a sum, if the log is a history.csv of ours with the run's other files beside it."""
    files = RunFiles(Path(log).expanduser().parent.parent)
    if Path(log).name != files.history.name or not (files.terms.is_file() and files.run.is_file()):
        return []
    return notes(by_term(read_result(files.terms)), read_result(files.run)["params"].get("reward.combine", "sum"))


def add_completions(table: Table, place: Path) -> None:
    """Add the completions' text metrics to the rows of their steps. Raises UserError if the log has none of these
    steps."""
    by_step = read_completions(place)
    shared = [row for row in table if row["step"] in by_step]
    if not shared:
        raise UserError(f"{place}: no step of the log has eight completions or more there; are they of this run?")
    for row in shared:
        row.update(by_step[row["step"] or 0.0])


# --- what it says


def report(judged: Judgement, table: Table) -> dict[str, Any]:
    """The content of `--json`. Steps are the log's."""
    rows, found, made = judged.rows, judged.found, [check for check in judged.checks if not check.lacks]
    compared = f"in the first {judged.first} rows" if judged.first else REFERENCE
    summaries = [summary(finding, rows, judged.spreads, compared) for finding in found]
    kinds = [kind for kind in IN_TRAINING if any(check.kind == kind for check in made)]
    said = headline(found, summaries, len(rows))
    if not found and kinds:
        said = f"{said.removesuffix('.')}, by {len(kinds)} of {len(IN_TRAINING)} checks."
    elif not found:
        said = "No check can be made with what the log holds."
    return {
        "verdict": found[0].kind if found else "healthy" if kinds else "unknown",
        "onset": step(rows, found[0].onset) if found else None,
        "headline": said,
        "rows": len(rows), "first_step": step(rows, 0), "last_step": step(rows, -1),
        "compared_with": compared if judged.spreads else "",
        "findings": [
            {
                "kind": finding.kind, "title": TITLES[finding.kind], "onset": step(rows, finding.onset),
                "summary": words, "advice": ADVICE[finding.kind],
                "evidence": [
                    evidence(shown) | {"step": step(rows, shown.step)} for shown in finding.evidence
                    if shown.limit.metric != "empty_share" or math.isfinite(rows[shown.step]["empty_share"])
                ],
            }
            for finding, words in zip(found, summaries, strict=True)
        ],
        "advice": list(dict.fromkeys(ADVICE[finding.kind] for finding in root_causes(found))),
        "made": by_kind(made, lambda check: ", ".join(check.metrics)),
        "not_made": by_kind(lacking(judged.checks), lambda check: ", ".join(check.lacks)),
        "estimated": {name: ESTIMATED[name] for name in estimated(rows, table)},
    }  # fmt: skip


def estimated(rows: list[dict[str, float]], table: Table) -> list[str]:
    return [name for name in ESTIMATED if any(math.isfinite(row[name]) for row in rows)
        and not any(name in logged for logged in table)]  # fmt: skip


def step(rows: list[dict[str, float]], place: int) -> int:
    return int(rows[place]["step"])


def lacking(checks: list[Check]) -> list[Check]:
    """The checks that were not made, without those that lack more columns than another one of their kind."""
    lacks = [(check, set(check.lacks)) for check in checks if check.lacks]
    return [
        check for check, own in lacks if not any(other.kind == check.kind and less < own for other, less in lacks)
    ]  # fmt: skip


def by_kind(checks: list[Check], say: Callable[[Check], str]) -> dict[str, list[str]]:
    said: dict[str, list[str]] = defaultdict(list)
    for check in checks:
        said[check.kind].append(say(check))
    return {kind: list(dict.fromkeys(each)) for kind, each in said.items()}


def text(content: dict[str, Any]) -> str:
    """What a person reads: the verdict, and what it rests on."""
    made, not_made = content["made"], content["not_made"]
    lines = [f"{content['verdict']}: {content['headline']}"]
    lines += [f"to try: {advice}" for advice in content["advice"]]
    lines += [note["text"] for note in content["notes"]]
    compared = content["compared_with"].removeprefix("in ").removeprefix("for ")
    lines += ["", f"read: {content['rows']} rows, steps {content['first_step']} to {content['last_step']}"]
    lines += [f"compared with: {compared or 'nothing, the log is too short'}"]
    lines += [f"estimated: {name}, {how}" for name, how in content["estimated"].items()]
    lines += [f"made: {kind} ({'; '.join(metrics)})" for kind, metrics in made.items()]
    for kind, lacks in not_made.items():
        lines.append(f"not made{' in full' if kind in made else ''}: {kind} (lacks {', or '.join(lacks)})")
    if any(name in lack for lacks in not_made.values() for lack in lacks for name in TEXTS):
        lines.append("--completions FILE would tell " + ", ".join(TEXTS))
    return "\n".join(lines) + "\n"
