"""The record of one run, read from the files that the stages wrote: what `track` shows in MLflow."""

import base64
import csv
import math
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import file_io
from pipeline.errors import UserError
from pipeline.runs import consistency, provenance, workspace
from pipeline.tracking.mlflow_store import Point, Scalar

REPORTS = Path("reports")
RUN, HISTORY = REPORTS / "train/run.json", REPORTS / "train/history.csv"
EVALUATION, PREPARE = REPORTS / "evaluate/metrics.json", REPORTS / "prepare.json"
DIAGNOSIS, MEASURED = REPORTS / "diagnosis.json", REPORTS / "evaluate/measured.json"
SUMMARY = REPORTS / "train/summary.json"
REPORT = REPORTS / "page/report.html"
TABLES = [RUN, HISTORY, SUMMARY, REPORTS / "train/samples.jsonl",
          REPORTS / "train/calibration.csv", DIAGNOSIS, EVALUATION, MEASURED, REPORTS / "evaluate/completions.jsonl"]  # fmt: skip


class Record(NamedTuple):
    """What the files say about one run."""

    train_key: str
    run: dict[str, Any]  # run.json
    params: dict[str, Scalar]
    prompts: dict[str, Any]  # prepare.json
    steps: int
    training: list[Point]
    timings: list[Point]
    evaluation: dict[str, float]
    measured: str  # digest of what was evaluated on, and how
    diagnosis: dict[str, Any]  # diagnosis.json
    artifacts: dict[str, list[Path]]  # folder of the artifact store -> files


def read_record() -> Record:
    """Reads every file before anything is written. Raises UserError naming a file that is missing, broken, or of another
    run than the others: `dvc repro train` alone leaves those of the stages behind it as they were."""
    figures = sorted((REPORTS / "figures").glob("*.png"))
    files = {"tables": TABLES, "figures": figures, "": [REPORT]}
    for file in [*TABLES, PREPARE, REPORT]:
        if not file.is_file():
            raise UserError(f"{file}: no such file; `dvc repro` makes it")
    run, prompts, evaluation, summary = _json(RUN), _json(PREPARE), _json(EVALUATION), _json(SUMMARY)
    key, params = str(run.get("train_key")), run.get("params")
    if not re.fullmatch("[0-9a-f]{64}", key) or not isinstance(params, dict):
        raise UserError(
            f"{RUN}: should hold train_key, 64 hexadecimal digits, and params; {consistency.how_to_remake('train')}"
        )
    timings_file = workspace.root() / ".checkpoints" / key / "timings.csv"
    timings = _timings(timings_file)
    written_ms = HISTORY.stat().st_mtime_ns // 1_000_000
    times = {step: int(row.pop("timestamp_ms", written_ms)) for step, row in timings.items()}
    history, diagnosis = _rows(HISTORY), _json(DIAGNOSIS)
    if (steps := summary.get("steps")) != len(history):
        raise UserError(
            f"{HISTORY}: {len(history)} rows, and {SUMMARY} says {steps} steps; {consistency.how_to_remake('train')}"
        )
    if missing := {"verdict", "onset", "findings", "cure", "history"} - diagnosis.keys():
        raise UserError(f"{DIAGNOSIS}: has no {min(missing)}; {consistency.how_to_remake('diagnose')}")
    measured = consistency.measured_in(_read(MEASURED))
    if not measured:
        raise UserError(f"{MEASURED}: does not say what was evaluated; {consistency.how_to_remake('evaluate')}")
    consistency.raise_if_mixed("train", "diagnose", "evaluate", "plot")
    page = REPORT.read_text(encoding="utf-8", errors="replace")
    if wrong := [file for file in figures if base64.b64encode(file.read_bytes()).decode() not in page]:
        raise UserError(f"{wrong[0]}: is not the figure in {REPORT}; {consistency.how_to_remake('plot')}")
    return Record(
        train_key=key,
        run=run,
        params={**params, "processes": ", then ".join(map(str, run.get("processes", [1])))},
        prompts=prompts,
        steps=len(history),
        training=_points("train", history, times, written_ms),
        timings=_points("time", {step: row for step, row in timings.items() if step in history}, times, written_ms),
        evaluation=_flat("evaluate", evaluation),
        measured=provenance.digest([measured["prompts"], measured["params"]]),
        diagnosis=diagnosis,
        artifacts=files,
    )


def _json(file: Path) -> dict[str, Any]:
    value = _read(file)
    if not isinstance(value, dict):
        raise UserError(f"{file}: should hold a JSON object, not {type(value).__name__}{_again(file)}")
    return value


def _read(file: Path) -> Any:
    try:
        return file_io.read_json(file)
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON: {error}{_again(file)}") from None


def _again(file: Path) -> str:
    """The advice for a file in reports/, whose folders are named as the stages; nothing for others."""
    if REPORTS not in file.parents:
        return ""
    stage = {PREPARE: "prepare", DIAGNOSIS: "diagnose", REPORT: "plot"}.get(file, file.parent.name)
    return f"; {consistency.how_to_remake(stage)}"


def _rows(file: Path) -> dict[int, dict[str, float]]:
    """Rows of a CSV file by step; an empty cell is left out. The last row of a step counts."""
    rows = {}
    with file.open(encoding="utf-8", newline="") as lines:
        for number, cells in enumerate(csv.DictReader(lines), start=2):
            try:
                row = {name: float(cell) for name, cell in cells.items() if cell}
                rows[int(row.pop("step"))] = row
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{file} line {number}: should hold a step and numbers: {error!r}{_again(file)}"
                ) from None
    if not rows:
        raise UserError(f"{file}: no rows{_again(file)}")
    return rows


def _timings(file: Path) -> dict[int, dict[str, float]]:
    """Clock times of the steps, as far as they are known: nothing that is right depends on them."""
    try:
        return _rows(file) if file.is_file() else {}
    except UserError as error:
        print(f"warning: {error}; the times of the steps are left out", file=sys.stderr)
        return {}


def _points(group: str, rows: dict[int, dict[str, float]], times: dict[int, int], otherwise_ms: int) -> list[Point]:
    return [
        Point(f"{group}/{name}", step, value, times.get(step, otherwise_ms))
        for step, row in rows.items()
        for name, value in row.items()
        if math.isfinite(value)
    ]


def _flat(prefix: str, tree: dict[str, Any]) -> dict[str, float]:
    """Nested numbers by path, such as evaluate/embedding/policy/mean; null is left out."""
    flat: dict[str, float] = {}
    for name, value in tree.items():
        path = prefix + "/" + re.sub(r"[^\w. :-]", "_", name)
        if isinstance(value, dict):
            flat |= _flat(path, value)
        elif isinstance(value, int | float) and math.isfinite(value):
            flat[path] = float(value)
    return flat
