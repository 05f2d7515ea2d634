"""Each metric's mean and spread over batches sampled from the reference before training, and the limits from them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.file_io import total

FALSE_ALARMS = 0.01  # a run, over all of its steps and metrics

Row = Mapping[str, float]


@dataclass(frozen=True)
class Spread:
    """A metric over batches without learning."""

    mean: float
    std: float  # of one batch
    dof: int  # degrees of freedom of std
    batches: int

    def margin(self, tail: float) -> float:
        """How far a further batch strays from the mean, one-sided, with probability `tail`, where batches are normal:

        t_{dof, 1 - tail} std sqrt(1 + 1 / batches)   (prediction interval; Hahn & Meeker 1991)
        """
        from scipy.special import stdtrit  # takes 0.4 s

        quantile = -float(stdtrit(self.dof, tail))  # Student's t is symmetric, and 1 - tail would be rounded
        return quantile * self.std * math.sqrt(1 + 1 / self.batches)


@dataclass(frozen=True)
class Limit:
    """Where a metric leaves what chance explains and is bad enough to matter."""

    metric: str
    side: Literal["above", "below"]
    threshold: float
    reference: Spread | None = None  # None: the threshold stands by itself

    def passed(self, row: Row) -> bool:
        value = row[self.metric]
        return value >= self.threshold if self.side == "above" else value <= self.threshold  # False for NaN


def null_statistics(rows: Sequence[Row], prompts: int) -> dict[str, Spread]:
    """Return each metric's spread over the calibration batches of `prompts` prompts; leave out undefined metrics.

    The reward's spread comes from the prompts inside the batches (`reward_se`): far more of them than batches.
    """
    spreads = {}
    for name in [column for column in rows[0] if column != "batch"]:
        values = [row[name] for row in rows if math.isfinite(row[name])]
        if len(values) >= 2:
            mean = total(values) / len(values)
            # products, not powers: Python's ** raises where floats overflow
            variance = total((value - mean) * (value - mean) for value in values) / (len(values) - 1)
            spreads[name] = Spread(mean, math.sqrt(variance), len(values) - 1, len(values))
    errors = [row["reward_se"] for row in rows if math.isfinite(row["reward_se"])]
    if errors and "reward_mean" in spreads:
        pooled = math.sqrt(total(error * error for error in errors) / len(errors))
        spreads["reward_mean"] = Spread(
            spreads["reward_mean"].mean, pooled, len(errors) * (prompts - 1), spreads["reward_mean"].batches
        )
    return spreads
