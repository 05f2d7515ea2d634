"""What rldoctor 0.2.0 (Apache-2.0, PyPI) says of a training log of ours, at its own thresholds, without network or
files.

rldoctor has no profiles: `diagnose` runs every check whose columns are there. Its live monitor is left out, since by
default it is silent before step 74, longer than our runs; the onset comes from the same checks on growing logs instead.
"""

from collections.abc import Sequence

import pandas as pd
from rl_doctor import Diagnosis, Severity, diagnose, run_from_records

# ours -> trl's key for it, which rldoctor reads (docs/METRICS.md); the last four are read and used by no check of 0.2.0
COLUMNS = {
    "step": "step",
    "reward_mean": "reward",
    "zero_spread_share": "frac_reward_zero_std",
    "entropy": "entropy",
    "ref_kl_k3": "kl",
    "grad_norm": "grad_norm",
    "clip_share": "clip_ratio/region_mean",
    "completion_tokens": "completions/mean_length",
    "reward_std_within": "reward_std",
    "advantage_std": "advantages_std",
    "loss": "loss",
    "lr": "learning_rate",
}
# Without a held-out score this check alarms at truncation alone, and our completions are cut at 20 tokens by design:
# it calls every run critical that does not end early, from the eighth row on. Pass skip=() to have it.
CAPPED = ("length_pathology",)


def verdict(
    history: pd.DataFrame, at: Severity = Severity.CRITICAL, skip: Sequence[str] = CAPPED
) -> tuple[list[str], float]:
    """Kinds of alarms that rldoctor gives on the whole log, and the step at which it could first have given one.

    history: a row a step, columns of reports/train/history.csv; missing ones are left to rldoctor to do without.
    at: the least severity that counts; `Severity.WARNING` includes warnings.
    skip: checks of rldoctor's to leave out; a misspelt one raises KeyError.
    The onset is the last step of the shortest beginning of the log that raises one of the returned kinds, else nan.
    """
    rows = records(history)
    kinds = alarms(rows, at, skip)
    if not kinds:
        return [], float("nan")
    lengths = range(1, len(rows) + 1)
    shortest = next(length for length in lengths if not set(kinds).isdisjoint(alarms(rows[:length], at, skip)))
    return kinds, float(history["step"].iloc[shortest - 1])


def records(history: pd.DataFrame) -> list[dict[str, float]]:
    """The log as trl would have written it: no undefined values, a gradient of nan for a step that was not finite."""
    renamed = history[[column for column in COLUMNS if column in history]].rename(columns=COLUMNS).astype(float)
    if "ended_share" in history:
        renamed["completions/clipped_ratio"] = 1 - history["ended_share"]
    rows = [{str(key): float(value) for key, value in row.dropna().items()} for _, row in renamed.iterrows()]
    # rldoctor takes an absent value for "not logged"; only a nan that is there is numerical death to it
    if "nonfinite" in history:
        for row, nonfinite in zip(rows, history["nonfinite"], strict=True):
            if nonfinite == 1:
                row["grad_norm"] = float("nan")
    return rows


def alarms(rows: Sequence[dict[str, float]], at: Severity, skip: Sequence[str]) -> list[str]:
    """Kinds of the findings of at least this severity, the worst first. Raises if a check broke."""
    return [finding.detector for finding in diagnosis(rows, skip).problems if finding.severity >= at]


def diagnosis(rows: Sequence[dict[str, float]], skip: Sequence[str] = ()) -> Diagnosis:
    """rldoctor's report with all of its evidence. Raises RuntimeError where rldoctor would hide a check that raised."""
    found = diagnose(run_from_records(rows, config={"algorithm": "reinforce"}), skip=skip)
    broken = [finding.summary for finding in found.skipped if finding.summary.startswith("detector raised")]
    if broken:
        raise RuntimeError(f"rldoctor: {'; '.join(broken)}")
    return found
