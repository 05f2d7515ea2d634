"""A project whose trainings MLflow records, and what an undisturbed one leaves."""

import contextlib
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

from tests.forks import Forks, until
from tests.project import Project
from tests.training import contents, forget, history, states


class Tracked:
    """A project whose runs MLflow records, and what an undisturbed run leaves in it."""

    def __init__(self, project: Project, forks: Forks) -> None:
        self.project, self.forks = project, forks
        (project.root / "mlflow.py").unlink()
        self.store, self.empty = project.root / "mlflow.db", project.root / "empty.db"
        # made beforehand: on a busy machine that takes longer than a trainer waits for its follower
        make = f"import mlflow; mlflow.MlflowClient('sqlite:///{self.store}').search_experiments()"
        subprocess.run([sys.executable, "-c", make], cwd=project.root, check=True, capture_output=True)
        shutil.copy(self.store, self.empty)
        self.afresh()
        with forks.start(project) as run:
            began = time.monotonic()  # not before: the server of forks may still have been importing
            until(lambda: self.has("reports/train/run.json"), run)
            self.seconds = time.monotonic() - began  # without what MLflow takes after the end
            assert run.wait() == 0, run.said()
        self.files, self.points = contents(project), logged(self.store)
        assert len(self.points) > 6 * 20
        self.afresh()

    def afresh(self) -> None:
        forget(self.project)
        shutil.copy(self.empty, self.store)

    def has(self, pattern: str) -> bool:
        return any(self.project.root.glob(pattern))

    def saved(self) -> int:
        """Steps that a resume state holds."""
        return max((int(path.stem.partition("-")[2]) for path in states(self.project)), default=0)

    def goes_on(self) -> None:
        """The same command once more; what was saved is not done again."""
        saved = self.saved()
        assert self.forks.finish(self.project).count("Step: ") == 6 - saved

    def check(self) -> None:
        """Nothing differs from the undisturbed run, nothing half written lies about."""
        assert contents(self.project) == self.files
        assert [row["step"] for row in history(self.project)] == list(range(6))
        assert logged(self.store) == self.points
        assert left_over(self.project.root) == []


def logged(store: Path) -> list[tuple[str, int, float]]:
    """The training values of the only run, which has finished; none of them twice."""
    with contextlib.closing(sqlite3.connect(store)) as database:
        runs = database.execute("select run_uuid, status from runs").fetchall()
        assert [status for _, status in runs] == ["FINISHED"]
        points = database.execute("select key, step, value from metrics where run_uuid = ?", (runs[0][0],)).fetchall()
    assert len(points) == len({(key, step) for key, step, _ in points}), "a value is there twice"
    return sorted(point for point in points if point[0].startswith("train/"))


def left_over(root: Path) -> list[Path]:
    return [path for folder in (".checkpoints", "data", "reports") for path in (root / folder).rglob(".*.tmp")]
