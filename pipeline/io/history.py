"""The record of a training run as it grows: rows, samples, timings, and the files they become."""

import csv
import dataclasses
from pathlib import Path
from typing import Any

from pipeline.diagnostics.metrics import HISTORY_COLUMNS
from pipeline.io.artifacts import finite_or_none

SUMMARY_STEPS = 5  # steps behind each mean of summary.json


@dataclasses.dataclass
class Progress:
    """A run so far: all that a resumed one needs besides weights and optimizer."""

    rows: list[dict[str, float]] = dataclasses.field(default_factory=list)  # history.csv
    samples: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # samples.jsonl
    timings: list[dict[str, float]] = dataclasses.field(default_factory=list)  # never in a hashed file
    calibration: list[dict[str, float]] = dataclasses.field(default_factory=list)  # calibration.csv
    stopped: bool = False  # before its last step, at a non-finite number or a collapse
    running_mean: float | None = None  # of the rewards of the steps so far: `baseline: running`
    kl_coef: float | None = None  # where it adapts to a target; None = still the recipe's

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.rows)

    def points(self, step: int) -> dict[str, float]:
        """What the tracker gets of a step, by MLflow's metric names."""
        timing = self.timings[step]
        return {
            **{f"train/{column}": self.rows[step][column] for column in HISTORY_COLUMNS[1:]},
            **{f"time/{column}": value for column, value in timing.items() if column != "timestamp_ms"},
        }

    def progress_line(self) -> str:
        """The notebook's line for the last step."""
        row = self.rows[-1]
        example = next(sample for sample in self.samples if sample["step"] == row["step"])
        return (
            f"Step: {row['step']} Baseline: {row['baseline']:.4f} Reward: {row['reward_mean']:.4f} "
            f"Reward variance: {row['reward_std_within'] ** 2:.4f} "
            f"Example: {' '.join(example['completion'].split())}"
        )

    def summary(self) -> dict[str, Any]:
        """summary.json: the metrics' means over the first and the last SUMMARY_STEPS steps."""
        ends = {"first": self.rows[:SUMMARY_STEPS], "last": self.rows[-SUMMARY_STEPS:]}
        means = {
            end: {c: finite_or_none(sum(row[c] for row in rows) / len(rows)) for c in HISTORY_COLUMNS[1:]}
            for end, rows in ends.items()
        }
        return {"steps": self.step, "stopped": self.stopped, **means}


class HistoryFile:
    """history.csv, a row per step, flushed as it goes; undefined values are `nan`, which plots leave out.

    After an exception it is removed: what stays is whole. (The rows are in the resume state too.)
    """

    def __init__(self, path: Path, rows: list[dict[str, float]]) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w", encoding="utf-8", newline="\n")
        self.writer = csv.writer(self.file, lineterminator="\n")
        self.writer.writerow(HISTORY_COLUMNS)
        for row in rows:
            self.append(row)

    def append(self, row: dict[str, float]) -> None:
        self.writer.writerow([repr(row[column]) for column in HISTORY_COLUMNS])
        self.file.flush()

    def __enter__(self) -> "HistoryFile":
        return self

    def __exit__(self, exception: type[BaseException] | None, *_: object) -> None:
        self.file.close()
        if exception is not None:
            self.path.unlink()
