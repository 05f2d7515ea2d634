"""From finished runs to docs/detector.csv, and from there to the tables of docs/DETECTOR.md."""

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import binomtest

from benchmarks.detector import STEPS
from benchmarks.labels import labels
from pipeline.diagnosis.calibration import null_statistics
from pipeline.diagnosis.thresholds import THRESHOLDS, Thresholds
from pipeline.diagnosis.verdict import CAUSES, IN_TRAINING, findings

CSV = Path("docs/detector.csv")
TEXTS = ("labels", "findings", "rldoctor", "rldoctor_warnings")
# what was tried on the runs to choose on, one at a time
OTHERS: dict[str, tuple[float, ...]] = {
    "patience": (1, 3), "empty": (0.3, 0.7), "repeated": (0.3, 0.7), "distinct": (0.3, 0.7), "entropy": (0.1, 0.3),
    "unlikely": (1.0, 1.5, 3.0), "reward": (0.25, 1.0), "misaligned": (0.5, 3.0), "no_signal": (0.8, 1.0),
}  # fmt: skip


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def diagnosed(content: dict[str, Any], thresholds: Thresholds = THRESHOLDS) -> dict[str, int]:
    """Kinds that the verdict finds, with their onsets, the first one first."""
    spreads = null_statistics(content["calibration"], content["prompts"])
    return {finding.kind: finding.onset for finding in findings(content["rows"], spreads, STEPS, thresholds)}


def collect(folder: Path, choose: dict[str, tuple[int, ...]]) -> None:
    """One row a run: labels, findings and rldoctor's alarms, kinds with their onsets."""
    from rl_doctor import Severity

    from benchmarks.rldoctor_alarms import verdict

    rows = []
    for content in read(folder):
        history = pd.DataFrame(content["rows"])
        critical, onset = verdict(history)
        warnings, warned = verdict(history, Severity.WARNING)
        rows.append({
            "set": "choose" if content["seed"] in choose[content["plan"]] else "measure",
            "plan": content["plan"], "seed": content["seed"], "labels": packed(labels(content)),
            "findings": packed(diagnosed(content)), "rldoctor": " ".join(critical), "rldoctor_onset": onset,
            "rldoctor_warnings": " ".join(warnings), "rldoctor_warned": warned,
        })  # fmt: skip
    table = pd.DataFrame(rows).sort_values(["set", "plan", "seed"])
    table.to_csv(CSV, index=False, float_format="%.6g", lineterminator="\n")
    print(f"{CSV}: {len(table)} runs")


def packed(kinds: dict[str, int]) -> str:
    return " ".join(f"{kind}:{onset}" for kind, onset in kinds.items())


def unpacked(text: str) -> dict[str, int]:
    return {kind: int(onset) for kind, _, onset in (part.partition(":") for part in text.split())}


def read_runs() -> pd.DataFrame:
    table = pd.read_csv(CSV, dtype=dict.fromkeys(TEXTS, str))
    return table.fillna(dict.fromkeys(TEXTS, ""))


def first(kinds: dict[str, int]) -> int | None:
    """The earliest onset of what became of the texts or rewards; a misaligned loss is there from the start anyway."""
    onsets = [onset for kind, onset in kinds.items() if kind not in CAUSES]
    return min(onsets) if onsets else None


def of(count: int, total: int) -> str:
    """Count, share and its Clopper-Pearson 95% interval."""
    if not total:
        return "0 of 0"
    interval = binomtest(count, total).proportion_ci(0.95, method="exact")
    return f"{count} of {total} = {count / total:.1%} ({interval.low:.1%} to {interval.high:.1%})"


def onset_words(errors: Sequence[float]) -> str:
    if not errors:
        return ""
    near = sum(abs(error) <= 1 for error in errors)
    size = statistics.median(abs(error) for error in errors)
    return f"{size:g} in the median; {near} of {len(errors)} within 1; {min(errors):+g} to {max(errors):+g}"


def tables() -> None:
    """Markdown tables: overall for both sets and both detectors, then by kind for the measured set."""
    runs = read_runs()
    print(
        "| set | detector | false alarms on healthy runs | misses on collapsed runs | kind right | onset error, steps |"
    )
    print("|---|---|---|---|---|---|")
    for name in ("choose", "measure"):
        for line in overall(name, runs[runs["set"] == name]):
            print(line)
    print(
        "\n| kind (label) | runs | any alarm | found as this kind | verdict is one of the labels "
        "| onset error of this kind, steps |"
    )
    print("|---|---|---|---|---|---|")
    for line in by_kind(runs[runs["set"] == "measure"]):
        print(line)


def overall(name: str, runs: pd.DataFrame) -> Iterator[str]:
    truth = [unpacked(text) for text in runs["labels"]]
    found = [unpacked(text) for text in runs["findings"]]
    bad = [(label, verdict) for label, verdict in zip(truth, found, strict=True) if label]
    alarms = sum(bool(verdict) for label, verdict in zip(truth, found, strict=True) if not label)
    right = sum(next(iter(verdict), None) in label for label, verdict in bad)
    errors = [b - a for a, b in ((first(label), first(verdict)) for label, verdict in bad) if None not in (a, b)]
    yield (
        f"| {name} | ours | {of(alarms, len(runs) - len(bad))} | {of(sum(not v for _, v in bad), len(bad))} | "
        f"{of(right, len(bad))} | {onset_words(errors)} |"
    )
    for column, onset, title in (
        ("rldoctor", "rldoctor_onset", "critical"),
        ("rldoctor_warnings", "rldoctor_warned", "with warnings"),
    ):
        said, when = runs[column] != "", runs[onset]
        healthy = [bool(alarm) for alarm, label in zip(said, truth, strict=True) if not label]
        missed = [not alarm for alarm, label in zip(said, truth, strict=True) if label]
        errors = [
            step - first(label)
            for step, alarm, label in zip(when, said, truth, strict=True)
            if alarm and first(label) is not None
        ]
        false_alarms, misses = of(sum(healthy), len(healthy)), of(sum(missed), len(missed))
        yield f"| {name} | rldoctor, {title} | {false_alarms} | {misses} | | {onset_words(errors)} |"


def by_kind(runs: pd.DataFrame) -> Iterator[str]:
    pairs = [(unpacked(a), unpacked(b)) for a, b in zip(runs["labels"], runs["findings"], strict=True)]
    for kind in IN_TRAINING:
        own = [(label, verdict) for label, verdict in pairs if kind in label]
        both = [(label, verdict) for label, verdict in own if kind in verdict]
        errors = [verdict[kind] - label[kind] for label, verdict in both]
        right = sum(next(iter(verdict), None) in label for label, verdict in own)
        yield (
            f"| {kind} | {len(own)} | {sum(bool(verdict) for _, verdict in own)} | {len(both)} | {right} "
            f"| {onset_words(errors)} |"
        )


def scan(folder: Path, choose: dict[str, tuple[int, ...]]) -> None:
    """A row a threshold tried, on the runs to choose on: false alarms, misses, wrong kinds, onset errors."""
    contents = [content for content in read(folder) if content["seed"] in choose[content["plan"]]]
    truth = [labels(content) for content in contents]
    print(
        "| threshold | value | false alarms | misses | kind wrong | onset off by more than 1 |\n"
        "|---|---|---|---|---|---|"
    )
    print(scan_row("as chosen", "", contents, truth, THRESHOLDS))
    for name, values in OTHERS.items():
        for value in values:
            changed: dict[str, Any] = {name: value}
            print(scan_row(f"`{name}`", f"{value:g}", contents, truth, dataclasses.replace(THRESHOLDS, **changed)))


def scan_row(
    name: str, value: str, contents: list[dict[str, Any]], truth: list[dict[str, int]], thresholds: Thresholds
) -> str:
    found = [diagnosed(content, thresholds) for content in contents]

    def count(condition: Callable[[dict[str, int], dict[str, int]], bool]) -> int:
        return sum(condition(label, verdict) for label, verdict in zip(truth, found, strict=True))

    def far(label: dict[str, int], verdict: dict[str, int]) -> bool:
        a, b = first(label), first(verdict)
        return a is not None and b is not None and abs(a - b) > 1

    cells = [
        name, value, str(count(lambda label, verdict: not label and bool(verdict))),
        str(count(lambda label, verdict: bool(label) and not verdict)),
        str(count(lambda label, verdict: bool(label) and bool(verdict) and next(iter(verdict)) not in label)),
        str(count(far)),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"
