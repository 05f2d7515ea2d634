"""Metrics in words, and numbers as text that says its unit."""

import math

from pipeline.report.style import signed
from pipeline.rl.metrics import METRICS

MEANING = {name: metric.title for name, metric in METRICS.items()}
SHARES = {name for name, metric in METRICS.items() if metric.unit == "share"}


def measured(value: float | None, metric: str) -> str:
    """A value of the metric: shares in percent, everything else as a number; what is not finite is undefined."""
    if value is not None and not math.isfinite(value):
        value = None
    return percent(value) if metric in SHARES else signed(value)


def percent(share: float | None) -> str:
    return "undefined" if share is None else f"{100 * share:.1f}%"
