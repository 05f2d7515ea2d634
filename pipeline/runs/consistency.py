"""Whether the files in reports/ belong to one run.

A stage may run alone, git and DVC may put older files back, and `dvc commit` and `dvc exp save` record whatever is
there as up to date. So each stage records the digests of the files that its results belong to:

train: summary.json has the digests of all that it wrote; evaluate: measured.json has those of the policy and of its own
files; diagnose: diagnosis.json has those of what it judged; plot: report.html has one digest of all that it shows.
Advice names the stages in this order, since the verdict needs the evaluation.
"""

from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.file_io import folder_digests, read_json, sha256
from pipeline.paths import POLICY, RUN_FILES, RunFiles
from pipeline.runs.provenance import digest
from pipeline.runs.results import how_to_remake, read_result

# files of `train`; the digest of history.csv stands beside theirs
JUDGED = ("calibration.csv", "samples.jsonl", "terms.jsonl", "heldout.jsonl", "healthy.json", "best.json")


def raise_if_mixed(*stages: str, files: RunFiles = RUN_FILES) -> None:
    """Raises UserError naming the files of these stages (train, evaluate, diagnose, plot) that are of another run than
    train/summary.json, and the command that makes them anew. The caller checks first for files that are missing or no
    JSON."""
    run = run_digests(files.summary)
    wrong = {stage: found for stage in stages if (found := _mismatches(stage, run, files))}
    if wrong:
        names = ", ".join(str(file) for found in wrong.values() for file in found)
        advice = f"`dvc repro -f -s {' '.join(wrong)} && dvc repro` makes them anew"
        if "train" in wrong:  # training takes long
            advice = f"`dvc checkout` brings back those of dvc.lock; where that does not help, {advice}"
        raise UserError(f"{names}: of another run than {files.summary}; {advice}")


def run_digests(summary: Path) -> dict[str, str]:
    """The digests in summary.json. Raises UserError where it has none."""
    found = digests_in(read_json(summary))
    if not found:
        raise UserError(f"{summary}: has no digests; {how_to_remake('train')}")
    return found


def digests_in(told: Any) -> dict[str, str]:
    """The digests in the content of summary.json or diagnosis.json; empty if an older version wrote it."""
    try:
        return dict(told["digests"][0])
    except (KeyError, IndexError, TypeError, ValueError):
        return {}


def measured_in(measured: Any) -> dict[str, Any]:
    """The content of measured.json; empty where an older version or something else wrote it."""
    keys = {"policy", "prompts", "params", "metrics.json", "completions.jsonl"}
    found = measured[0] if isinstance(measured, list) and measured and isinstance(measured[0], dict) else {}
    return found if keys <= found.keys() else {}


def evaluates(measured: dict[str, Any], run: dict[str, str]) -> bool:
    """Whether an evaluation is of the policy of a run."""
    return bool(measured) and digest(measured["policy"]) == run.get("policy")


def judged(run: dict[str, str], measured: Path) -> dict[str, str]:
    """The digests of the files that a diagnosis judges, besides the history."""
    return {name: run[name] for name in JUDGED if name in run} | {measured.name: sha256(measured)}


def holds_policy_of(run: dict[str, str], folder: Path = POLICY) -> bool:
    """Whether a folder holds the policy of a run."""
    return digest(folder_digests(folder)) == run.get("policy")


def all_samples(files: RunFiles = RUN_FILES) -> Path | None:
    """The file with all completions of the run; None if only some were kept. Raises UserError if the file is missing or
    does not have the digest in kept.json."""
    told = read_result(files.kept)
    if told["keep_samples"] == "some":
        return None
    if not files.all_samples.is_file():
        raise UserError(
            f"{files.all_samples}: no such file; `dvc checkout` brings it back, or {how_to_remake('train')}"
        )
    if sha256(files.all_samples) != told.get("sha256"):
        raise UserError(f"{files.all_samples}: of another run than {files.kept}; `dvc checkout` brings it back")
    return files.all_samples


def sources(files: RunFiles = RUN_FILES) -> str:
    """Digest of what report.html shows. summary.json and measured.json stand for the files whose digests they hold."""
    return digest([sha256(file) for file in (files.prepare, files.summary, files.diagnosis, files.measured)])


def _mismatches(stage: str, run: dict[str, str], files: RunFiles) -> list[Path]:
    if stage == "train":
        written = [
            files.calibration,
            files.history,
            files.samples,
            files.terms,
            files.heldout,
            *(file for file in (files.healthy, files.best, files.kept) if file.is_file()),
        ]
        wrong = [file for file in written if sha256(file) != run.get(file.name)]
        return wrong + ([] if read_json(files.run).get("train_key") == run.get("train_key") else [files.run])
    if stage == "diagnose":
        told = read_json(files.diagnosis)
        same = told.get("history") == run.get("history.csv") and digests_in(told) == judged(run, files.measured)
        return [] if same else [files.diagnosis]
    if stage == "evaluate":
        measured = measured_in(read_json(files.measured))
        same = evaluates(measured, run) and measured.get("heldout.jsonl") == run.get("heldout.jsonl")
        own = (files.metrics, files.completions, files.curve)
        return [file for file in own if not same or sha256(file) != measured.get(file.name)]
    return [] if f'"{sources(files)}"' in files.page.read_text(encoding="utf-8", errors="replace") else [files.page]
