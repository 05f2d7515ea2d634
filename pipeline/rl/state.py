"""The state of a run that a resumed one needs besides weights and optimizer."""

import dataclasses
from typing import Any

from pipeline.errors import one_line
from pipeline.file_io import finite_or_none, total
from pipeline.rl.metrics import HISTORY_COLUMNS
from pipeline.timing import time_left

SUMMARY_STEPS = 5  # steps in each mean of summary.json


@dataclasses.dataclass
class TrainState:
    """A run so far. Saved in each resume state."""

    rows: list[dict[str, float]] = dataclasses.field(default_factory=list)  # history.csv
    samples: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # samples.jsonl
    sample_files: list[str] = dataclasses.field(default_factory=list)  # sha256 of each step's file, if all are kept
    terms: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # terms.jsonl
    heldout: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # heldout.jsonl
    timings: list[dict[str, float]] = dataclasses.field(default_factory=list)  # never in a hashed file
    calibration: list[dict[str, float]] = dataclasses.field(default_factory=list)  # calibration.csv
    stopped: bool = False  # early, at a non-finite number or a collapse
    running_mean: float | None = None  # of the rewards of the steps so far: `baseline: running`
    processes: list[int | str] = dataclasses.field(
        default_factory=list
    )  # how many processes computed the run, with a new entry after each change
    gpus: list[str] = dataclasses.field(default_factory=list)  # names of the GPUs, likewise; empty on a CPU

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.rows)

    def note_change(self, processes: int | str, gpu: str | None) -> None:
        """Records the processes and the GPU that compute from now on, where they have changed."""
        if self.processes[-1:] != [processes]:
            self.processes.append(processes)
        if gpu and self.gpus[-1:] != [gpu]:
            self.gpus.append(gpu)

    def progress_line(self, steps: int) -> str:
        """The notebook's line for the last step, with its seconds and the time that the rest will take."""
        row = self.rows[-1]
        seconds = [sum(v for name, v in row.items() if name.startswith("seconds_")) for row in self.timings[-10:]]
        left = time_left(sum(seconds) / len(seconds), steps - self.step)
        example = next(sample for sample in self.samples if sample["step"] == row["step"])
        return (
            f"Step: {row['step']} ({seconds[-1]:.1f} s, {left}) Baseline: {row['baseline']:.4f} "
            f"Reward: {row['reward_mean']:.4f} Reward variance: {row['reward_std_within'] ** 2:.4f} "
            f"Example: {one_line(example['completion'])}"
        )

    def summary(self) -> dict[str, Any]:
        """summary.json: the metrics' means over the first and the last SUMMARY_STEPS steps."""
        ends = {"first": self.rows[:SUMMARY_STEPS], "last": self.rows[-SUMMARY_STEPS:]}
        means = {
            end: {c: finite_or_none(total(row[c] for row in rows) / len(rows)) for c in HISTORY_COLUMNS[1:]}
            for end, rows in ends.items()
        }
        return {"steps": self.step, "stopped": self.stopped, **means}
