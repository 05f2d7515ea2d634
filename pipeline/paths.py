"""The paths of a run's files, relative to the project's root; dvc.yaml says which stage makes which file. No number
depends on a path."""

from pathlib import Path

TRAIN_PROMPTS, HELDOUT_PROMPTS = Path("data/prompts/train.jsonl"), Path("data/prompts/heldout.jsonl")
CHECKPOINT = Path("data/checkpoint")  # policy/, encoder/, layout.json, manifest.json
CLASSIFIERS = Path("data/classifiers")  # of the selected reward: one folder each, manifest.json
INDEPENDENT = Path("data/independent_classifiers")  # classifiers that only the independent reward uses
POLICY, HEALTHY, BEST = Path("data/policy"), Path("data/healthy"), Path("data/best")
REPORTS, LOCK = Path("reports"), Path("dvc.lock")


class RunFiles:
    """The files of one run that the stages write, in a folder of reports and beside it."""

    def __init__(self, reports: Path = REPORTS) -> None:
        self.reports = reports
        self.prepare, self.diagnosis = reports / "prepare.json", reports / "diagnosis.json"
        train, evaluate = reports / "train", reports / "evaluate"
        self.run, self.summary = train / "run.json", train / "summary.json"
        self.history, self.calibration = train / "history.csv", train / "calibration.csv"
        self.samples, self.heldout = train / "samples.jsonl", train / "heldout.jsonl"
        self.kept, self.all_samples = train / "samples/kept.json", train / "samples/all.parquet"
        self.terms = train / "terms.jsonl"
        self.healthy = reports.parent / HEALTHY / "healthy.json"
        self.best = reports.parent / BEST / "best.json"
        self.metrics, self.measured = evaluate / "metrics.json", evaluate / "measured.json"
        self.completions, self.curve = evaluate / "completions.jsonl", evaluate / "curve.jsonl"
        self.figures, self.page = reports / "figures", reports / "page/report.html"
        self.custom, self.classifiers = reports / "custom", reports / "classifiers.json"
        self.track = reports / "track/track.json"


RUN_FILES = RunFiles()


def resume_states(folder: Path) -> list[Path]:
    """The resume states in a run's folder, oldest first."""
    return sorted(folder.glob("state-*.pt"))


def resume_files(folder: Path) -> list[Path]:
    """The resume states and the files beside them: candidates for data/best, completions of each step."""
    return [*resume_states(folder), *folder.glob("best-*.pt"), *folder.glob("samples-*.parquet")]
