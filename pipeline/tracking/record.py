"""The record of one run, read from the files that `train` and the other stages wrote: what MLflow shows of it."""

import base64
import math
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.file_io import flatten, read_csv, read_jsonl, sha256
from pipeline.paths import CHECKPOINT, RUN_FILES, TRAIN_PROMPTS, RunFiles
from pipeline.runs import consistency, provenance, workspace
from pipeline.runs.results import TERM_COLUMNS, how_to_remake, read_result
from pipeline.tracking.mlflow_store import Point, Scalar
from pipeline.tracking.presentation import FIRST_CHARTS, FIRST_METRICS
from pipeline.tracking.tags import digests, gain_tag, run_tags

LARGEST_ARTIFACT = 100_000_000  # bytes of all.parquet; the others are small


@dataclass(frozen=True)
class Record:
    """What the files say about one run."""

    train_key: str
    status: str  # MLflow's: RUNNING, FINISHED, FAILED, KILLED
    params: dict[str, Scalar]
    steps: int
    points: list[Point]  # train/, a second copy of its first charts, terms/ and time/
    tags: dict[str, str]
    # only of a finished run, from the stages after `train`:
    headline: str = ""
    evaluation: dict[str, float] = field(default_factory=dict)
    curve: list[Point] = field(default_factory=list)  # heldout/, of the held-out curve
    # name, digest, place, profile, its role in the run
    datasets: list[tuple[str, str, str, Any, str]] = field(default_factory=list)
    artifacts: dict[str, list[Path]] = field(default_factory=dict)  # folder of the artifact store -> files


def read_growing(folder: Path, pid: int, status: str) -> Record:
    """Read the record of a run that is training, up to its last state, from `.checkpoints/<train_key>/`.

    The tags name its process, so that `track` can tell whether it is alive.
    """
    run = read_result(folder / "run.json")
    files = folder / "history.csv", folder / "timings.csv"
    history, timings = (_by_step(read_csv(file)) if file.exists() else {} for file in files)
    terms = read_jsonl(file) if (file := folder / "terms.jsonl").exists() else []
    history = {step: row for step, row in history.items() if step in timings}  # `train` writes both files in turn
    tags = digests(run) | {"host": socket.gethostname(), "pid": str(pid)}
    points = _points(history, timings, 0, terms)
    return Record(run["train_key"], status, run["params"], len(history), points, tags)


def read_record(files: RunFiles = RUN_FILES) -> Record:
    """The record of a finished run. Raises UserError naming a file that is missing, broken, or of another run than the
    others: `dvc repro train` alone leaves the files of later stages as they were."""
    figures = sorted(files.figures.glob("*.png"))
    tables = [
        files.run,
        files.history,
        files.summary,
        files.samples,
        files.terms,
        files.heldout,
        files.calibration,
        files.diagnosis,
        files.metrics,
        files.measured,
        files.completions,
        files.curve,
    ]
    for file in [*tables, files.page]:
        if not file.is_file():
            raise UserError(f"{file}: no such file; `dvc repro` makes it")
    run, prompts, evaluation = read_result(files.run), read_result(files.prepare), read_result(files.metrics)
    summary, diagnosis, (measured,) = (
        read_result(files.summary),
        read_result(files.diagnosis),
        read_result(files.measured),
    )
    key, params, history = run["train_key"], run["params"], _by_step(read_result(files.history))
    if (steps := summary["steps"]) != len(history):
        raise UserError(
            f"{files.history}: {len(history)} rows, and {files.summary} says {steps} steps; {how_to_remake('train')}"
        )
    consistency.raise_if_mixed("train", "evaluate", "diagnose", "plot")
    page = files.page.read_text(encoding="utf-8", errors="replace")
    if wrong := [file for file in figures if base64.b64encode(file.read_bytes()).decode() not in page]:
        raise UserError(f"{wrong[0]}: is not the figure in {files.page}; {how_to_remake('plot')}")
    tables += _logged_samples(files)
    written_ms = files.history.stat().st_mtime_ns // 1_000_000
    return Record(
        train_key=key,
        status="FINISHED",
        params={**params, "processes": ", then ".join(map(str, run.get("processes", [1])))},
        steps=len(history),
        points=_points(history, _timings(workspace.resume_folder(key)), written_ms, read_result(files.terms)),
        tags=run_tags(
            run, diagnosis, sha256(files.metrics), provenance.digest([measured["prompts"], measured["params"]])
        )
        | gain_tag(evaluation.get(params["reward"])),
        headline=diagnosis["headline"],
        evaluation={
            f"evaluate/{path.replace('.', '/')}": float(value)
            for path, value in flatten(evaluation).items()
            if value is not None
        }
        | _best(diagnosis["best"]),
        curve=_curve(read_result(files.curve), written_ms),
        datasets=[
            (f"prompts-{params['prompts']}", run["prompts"], TRAIN_PROMPTS.as_posix(), prompts, "training"),
            (f"checkpoint-{params['model']}", run["checkpoint"], f"{CHECKPOINT}/policy", {}, "checkpoint"),
        ],
        # without a held-out curve two tables have no row
        artifacts={"tables": [f for f in tables if f.stat().st_size > 1], "figures": figures, "": [files.page]},
    )


def _logged_samples(files: RunFiles) -> list[Path]:
    """The file with all completions, if there is one and it is small enough for an artifact."""
    if (path := consistency.all_samples(files)) is None:
        return []
    if path.stat().st_size > LARGEST_ARTIFACT:
        print(f"note: {path} is no artifact in MLflow, over {LARGEST_ARTIFACT:,} bytes", file=sys.stderr)
        return []
    return [path]


def _by_step(rows: list[dict[str, float]]) -> dict[int, dict[str, float]]:
    return {int(row["step"]): {name: value for name, value in row.items() if name != "step"} for row in rows}


def _timings(folder: Path) -> dict[int, dict[str, float]]:
    """Clock times of the steps, as far as they are known: no result depends on them."""
    file = folder / "timings.csv"
    try:
        return _by_step(read_csv(file)) if file.is_file() else {}
    except (KeyError, ValueError) as error:
        print(f"warning: {file}: {error}; the times of the steps are left out", file=sys.stderr)
        return {}


def _points(
    history: dict[int, dict[str, float]],
    timings: dict[int, dict[str, float]],
    otherwise_ms: int,
    terms: Sequence[dict[str, Any]],
) -> list[Point]:
    """Return the finite values of the history and of the terms of a sum (terms/NAME/share), at the time of their step
    or else at `otherwise_ms`.

    An undefined value is a gap in MLflow's charts.
    """
    by_term: dict[int, dict[str, float]] = {step: {} for step in history}
    for row in terms:
        told = {f"{row['term']}/{name}": value for name, value in row.items() if name in TERM_COLUMNS}
        by_term.get(row["step"], {}).update({name: value for name, value in told.items() if value is not None})
    first = {step: {name: row[name] for name in FIRST_METRICS if name in row} for step, row in history.items()}
    times = {step: int(row.get("timestamp_ms", otherwise_ms)) for step, row in timings.items()}
    return [
        Point(f"{group}/{name}", step, value, times.get(step, otherwise_ms))
        for group, rows in ((FIRST_CHARTS, first), ("train", history), ("terms", by_term), ("time", timings))
        for step in history
        for name, value in rows.get(step, {}).items()
        if name != "timestamp_ms" and math.isfinite(value)
    ]


def _curve(rows: list[dict[str, Any]], written_ms: int) -> list[Point]:
    """The held-out curve: each reward's mean with its interval, and the distance from the reference."""
    points = {
        (f"heldout/{row['reward']}/{name}", row["step"]): row[name] for row in rows for name in ("mean", "low", "high")
    }
    points |= {("heldout/sqrt_kl", row["step"]): row["sqrt_kl"] for row in rows}
    return [Point(key, step, value, written_ms) for (key, step), value in points.items() if value is not None]


def _best(best: dict[str, Any] | None) -> dict[str, float]:
    """The step of data/best, and its gain over step 0 on the prompts that were not used to choose it."""
    told = flatten({"best": best | {"gain": best["reported_on"]["difference"]}}) if best else {}
    names = ("best.step", "best.gain.mean", "best.gain.low", "best.gain.high")
    return {name.replace(".", "/"): float(told[name]) for name in names if told.get(name) is not None}
