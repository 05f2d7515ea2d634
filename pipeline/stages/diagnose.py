"""Stage `diagnose`: whether and how the run collapsed, from which step on, and what to try (reports/diagnosis.json)."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pipeline.config.load import load_params
from pipeline.config.overrides import experiment_command
from pipeline.config.schema import Params
from pipeline.diagnosis.calibration import null_statistics
from pipeline.diagnosis.cures import Cure, cure, root_causes
from pipeline.diagnosis.explanations import evidence, headline, nothing_to_learn, summary
from pipeline.diagnosis.over_optimisation import Heldout, over_optimised
from pipeline.diagnosis.terms import Note, notes
from pipeline.diagnosis.text import repeated_ngrams
from pipeline.diagnosis.verdict import ORDER, TITLES, Finding, findings, heldout_finding
from pipeline.errors import run_stage
from pipeline.file_io import flatten, sha256, write_json
from pipeline.paths import RUN_FILES
from pipeline.runs.consistency import judged, raise_if_mixed, run_digests
from pipeline.runs.results import by_term, read_result

SHOWN = 3  # completions per finding
ENOUGH = 30  # fewer held-out completions are too few to judge their texts
TOO_FEW = f"Over-optimisation cannot be told by fewer than {ENOUGH} held-out completions."


def main() -> None:
    """Raises UserError if a file of `train` or `evaluate` is missing, malformed, or of another run."""
    params = load_params()
    rows, calibration, samples, healthy, terms = map(
        read_result, (RUN_FILES.history, RUN_FILES.calibration, RUN_FILES.samples, RUN_FILES.healthy, RUN_FILES.terms)
    )
    run, _ = map(read_result, (RUN_FILES.run, RUN_FILES.summary))
    evaluation, completions, _ = map(read_result, (RUN_FILES.metrics, RUN_FILES.completions, RUN_FILES.measured))
    curve, best, _ = map(read_result, (RUN_FILES.curve, RUN_FILES.best, RUN_FILES.heldout))
    raise_if_mixed("train", "evaluate")
    chosen = run["params"] | flatten({"evaluate": params.evaluate.model_dump()})
    enough = evaluation if len(completions) >= ENOUGH else None
    diagnosis = diagnose(params, rows, calibration, samples, chosen, enough, curve, best["step"], terms)
    diagnosis |= {"healthy_step": healthy["step"], "best": best if best["step"] is not None else None}
    digests = judged(run_digests(RUN_FILES.summary), RUN_FILES.measured)
    diagnosis |= {
        "history": sha256(RUN_FILES.history),
        "digests": [digests],
    }  # a list: `dvc metrics show` leaves it out
    write_json(RUN_FILES.diagnosis, diagnosis)
    print(f"{diagnosis['verdict']}: {diagnosis['headline']}")
    if diagnosis["cure"]:
        print(f"to try: {diagnosis['cure']['command']}")
    for note in diagnosis["notes"]:
        print(note["text"])
        if note["command"]:
            print(f"to try: {note['command']}")
    if diagnosis["over_optimisation"] not in diagnosis["headline"]:
        print(diagnosis["over_optimisation"])


def diagnose(
    params: Params,
    rows: list[dict[str, float]],
    calibration: list[dict[str, float]],
    samples: list[dict[str, Any]],
    chosen: dict[str, Any],
    evaluation: dict[str, Any] | None = None,
    curve: Sequence[dict[str, Any]] = (),
    best: int | None = None,
    terms: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """The content of diagnosis.json, except the steps of the healthy and the best policy and the digests of the judged
    files. chosen: every value of the run, which the command of the cure repeats. evaluation: metrics.json; None: too
    few held-out completions to judge. A run is healthy only if its training and its held-out completions are. curve:
    rows of curve.jsonl. best: the step of data/best. terms: rows of terms.jsonl."""
    spreads = null_statistics(calibration, params.train.prompts_per_step)
    found, heldout = findings(rows, spreads, params.train.steps), None
    independent, too_far, told = params.evaluate.independent, None, TOO_FEW
    if evaluation is not None:
        heldout = heldout_finding(evaluation["text"], evaluation["ref_logprob_per_token"], spreads, len(rows))
        measured = Heldout(params.reward, independent, evaluation, curve, best)
        too_far, told = over_optimised(measured, heldout, spreads, len(rows), in_training=bool(found))
    also = [] if found else remaining(heldout, too_far)
    found = sorted(
        [*found, *filter(None, [too_far]), *also], key=lambda finding: (finding.onset, ORDER.index(finding.kind))
    )
    summaries = [summary(finding, rows, spreads) for finding in found]
    cures = {finding.kind: cure(finding, params, spreads) for finding in found}
    of_terms = by_term(list(terms))
    told_of_terms = notes(of_terms, chosen.get("reward.combine", "sum"))
    said = headline(found, summaries, len(rows), evaluation is not None and heldout is None)
    flat = nothing_to_learn(found, rows)
    changes: dict[str, Any] = {}
    for finding in root_causes(found):
        changes |= {key: value for key, value in cures[finding.kind].changes.items() if key not in changes}
    return {
        "verdict": found[0].kind if found else "healthy",
        "onset": found[0].onset if found else None,
        "headline": " ".join(filter(None, [said, flat, *(note.short for note in told_of_terms)])),
        "steps": len(rows),
        "independent": independent,
        "over_optimisation": told,
        "findings": [
            report(finding, text, cures[finding.kind], samples) for finding, text in zip(found, summaries, strict=True)
        ],
        "notes": [report_note(note, chosen, list(of_terms)) for note in told_of_terms],
        "cure": {"changes": changes, "command": experiment_command(chosen, changes)} if changes else None,
    }


def remaining(heldout: Finding | None, told: Finding | None) -> list[Finding]:
    """The finding on the held-out texts without the metrics that `told` shows already; empty if no metric is left."""
    known = {shown.limit.metric for shown in told.evidence} if told else set()
    shown = tuple(shown for shown in heldout.evidence if shown.limit.metric not in known) if heldout else ()
    return [replace(heldout, evidence=shown)] if heldout and shown else []


def report(finding: Finding, text: str, remedy: Cure, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """One finding, with its evidence."""
    return {
        "kind": finding.kind, "title": TITLES[finding.kind], "onset": finding.onset, "summary": text,
        "evidence": [evidence(shown) for shown in finding.evidence],
        "completions": examples(finding, samples),
        "changes": remedy.changes, "reason": remedy.reason, "source": remedy.source,
    }  # fmt: skip


def report_note(note: Note, chosen: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """One note with the change that it asks for: the whole list of terms, since an option cannot change one item of a
    list. names: the terms' names, in the order of the list."""
    changes = {}
    if note.weight is not None:
        table = json.loads(chosen["reward.terms"])
        table[names.index(note.term)]["weight"] = note.weight
        terms = [written(term) | {"reward": written(term["reward"])} for term in table]
        changes = {f"rewards.{chosen['reward']}.terms": terms}
    return {
        "kind": note.kind, "term": note.term, "text": note.text, "changes": changes,
        "command": experiment_command(chosen, changes) if changes else None,
    }  # fmt: skip


def written(table: dict[str, Any]) -> dict[str, Any]:
    """A table without the keys whose value is None: params.yaml leaves them out."""
    return {key: value for key, value in table.items() if value is not None}


def examples(finding: Finding, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Completions of the step that shows the finding, the clearest first. No text shows a misaligned loss."""
    if finding.kind == "misaligned":
        return []
    of_step = [sample for sample in samples if sample["step"] == finding.shown_at]
    if finding.passes("empty_share"):
        of_step.sort(key=lambda sample: len(sample["tokens"]))
    elif finding.passes("repeated_3grams"):
        of_step.sort(key=lambda sample: _or_zero(repeated_ngrams([sample["tokens"]], 3)), reverse=True)
    return [{key: sample[key] for key in ("step", "prompt", "completion", "reward")} for sample in of_step[:SHOWN]]


def _or_zero(value: float) -> float:
    return value if math.isfinite(value) else 0.0


if __name__ == "__main__":
    run_stage(main)
