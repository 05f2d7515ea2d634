"""Whatever ends a run, the same command goes on to the same bytes: killed at any moment, its resume state damaged, its
dvc killed. Moments are drawn from a seeded generator over the time that an undisturbed run takes."""

import contextlib
import random
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import train
from pipeline.errors import UserError
from tests.conftest import Project, copy_of_project
from tests.faults import fault, rounds
from tests.forks import Forks, until
from tests.test_train import checkpoint, contents, forget, here, history, make_ready, ready, states

pytestmark = [pytest.mark.slow, pytest.mark.faults]
__all__ = ["checkpoint", "here", "ready"]  # fixtures
MLFLOW = ("mlflow", "mlflow.store.tracking.sqlalchemy_store", "transformers.models.gpt_neox.modeling_gpt_neox")


# --- the trainer by itself, with MLflow ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    server = Forks("pipeline.train", *MLFLOW)
    yield server
    server.close()


class Tracked:
    """A project whose runs MLflow records, and what an undisturbed run leaves in it."""

    def __init__(self, project: Project, forks: Forks) -> None:
        self.project, self.forks = project, forks
        (project.root / "mlflow.py").unlink()
        self.store, self.empty = project.root / "mlflow.db", project.root / "empty.db"
        project.edit(seed=1)  # another run makes the store, which takes some seconds
        forks.finish(project)
        shutil.copy(self.store, self.empty)
        project.edit(seed=0)
        self.afresh()
        began = time.monotonic()
        forks.finish(project)
        self.seconds = time.monotonic() - began
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
    """The training values of the only finished run but the one that `Tracked` made first; none of them twice."""
    with contextlib.closing(sqlite3.connect(store)) as database:
        runs = database.execute(
            "select run_uuid, status from runs where run_uuid not in"
            " (select run_uuid from params where key = 'seed' and value = '1')"
        ).fetchall()
        assert [status for _, status in runs] == ["FINISHED"]
        points = database.execute("select key, step, value from metrics where run_uuid = ?", (runs[0][0],)).fetchall()
    assert len(points) == len({(key, step) for key, step, _ in points}), "a value is there twice"
    return sorted(point for point in points if point[0].startswith("train/"))


def left_over(root: Path) -> list[Path]:
    return [path for folder in (".checkpoints", "data", "reports") for path in (root / folder).rglob(".*.tmp")]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, forks: Forks) -> Tracked:
    return Tracked(make_ready(copy_of_project(tmp_path_factory.mktemp("tracked")), checkpoint), forks)


WINDOWS = {
    "while it saved": ".checkpoints/*/.state-*.tmp",
    "while it wrote outputs": "data/.policy.tmp",
    "between two outputs": "data/policy",
    "after its end": "reports/train/run.json",
}


def test_a_trainer_killed_at_any_moment_goes_on_to_the_same_bytes(tracked: Tracked) -> None:
    draw = random.Random(0)
    for _ in range(rounds(40, 3)):
        with fault("kill -9 of train at a random moment"):
            tracked.afresh()
            with tracked.forks.start(tracked.project) as run:
                time.sleep(draw.uniform(0, 1.1) * tracked.seconds)
                run.kill()
            tracked.goes_on()
            tracked.check()


@pytest.mark.parametrize("window", WINDOWS)
def test_a_trainer_killed_at_the_worst_of_moments_goes_on_to_the_same_bytes(tracked: Tracked, window: str) -> None:
    for _ in range(rounds(4, 1)):
        with fault(f"kill -9 of train {window}"):
            tracked.afresh()
            with tracked.forks.start(tracked.project) as run:
                until(lambda: tracked.has(WINDOWS[window]) or tracked.has(WINDOWS["after its end"]), run)
                run.kill()
            tracked.goes_on()
            tracked.check()


def test_a_trainer_killed_again_and_again_comes_to_its_end(tracked: Tracked) -> None:
    """Each command gets a little further than the one before, and is killed in its turn."""
    draw, kills = random.Random(1), rounds(10, 2)
    tracked.afresh()
    with contextlib.ExitStack() as faults:
        for done in range(kills):
            faults.enter_context(fault("kill -9 of train, of one run again and again"))
            with tracked.forks.start(tracked.project) as run:
                until(lambda goal=1 + done * 5 // kills: tracked.saved() >= goal, run)  # type: ignore[misc]
                time.sleep(draw.uniform(0, 0.1))
                run.kill()
        tracked.goes_on()
        tracked.check()


# --- signals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_trainer_after_its_step_and_it_goes_on_to_the_same_bytes(
    tracked: Tracked, number: signal.Signals
) -> None:
    """Between states too, so that the step in progress is saved for the signal's sake."""
    draw = random.Random(number)
    tracked.afresh()
    for _ in range(rounds(5, 1)):
        with fault(f"{number.name} to train"):
            tracked.afresh()
            with tracked.forks.start(tracked.project) as run:
                until(lambda: tracked.has("reports/train/history.csv"), run)  # from its making on, signals are caught
                time.sleep(draw.uniform(0, 0.15) * tracked.seconds)
                run.kill(number)
                code = run.wait()
            said = run.said()
            if "the same command goes on" in said:  # else the last step was through
                assert code == 128 + number, said
                assert tracked.saved() == said.count("Step: ") < 6, "a step in progress is finished and saved"
                assert not tracked.has("reports/train/history.csv"), "half a history is no output"
                assert not tracked.has("data/policy")
            tracked.goes_on()
            tracked.check()


def test_a_signal_and_a_kill_after_it_lose_no_saved_step(tracked: Tracked) -> None:
    for _ in range(rounds(5, 1)):
        with fault("SIGTERM to train, then kill -9"):
            tracked.afresh()
            with tracked.forks.start(tracked.project) as run:
                until(lambda: tracked.saved() >= 2, run)
                run.kill(signal.SIGTERM)
                run.kill()
            tracked.goes_on()
            tracked.check()


# --- resume states ------------------------------------------------------------------------------------------------

Damage = Callable[[Path, random.Random], None]


def cut(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: draw.randrange(1, path.stat().st_size)])


def flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def zero(path: Path, draw: random.Random) -> None:
    """A block that a file system never wrote: its length is right."""
    content, start = bytearray(path.read_bytes()), draw.randrange(path.stat().st_size)
    block = content[start : start + 4096]
    content[start : start + 4096] = bytes(len(block)) if any(block) else b"\1" * len(block)
    path.write_bytes(content)


DAMAGES: dict[str, Damage] = {
    "a flipped bit": flip,
    "a truncated file": cut,
    "a block of zeros": zero,
    "an empty file": lambda path, draw: path.write_bytes(b"") and None,
    "a longer file": lambda path, draw: path.write_bytes(path.read_bytes() + b"more") and None,
}


@pytest.fixture
def interrupted(here: Project, monkeypatch: pytest.MonkeyPatch) -> tuple[Project, dict[str, bytes]]:
    """A project whose run was ended after 4 of its 6 steps, and what it would have made."""
    train.main()
    undisturbed = contents(here)
    forget(here)
    real = train.train_step

    def dies_after_four(run: Any, *arguments: Any) -> None:
        if run.step == 4:
            raise KeyboardInterrupt
        real(run, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(train, "train_step", dies_after_four)
        with pytest.raises(KeyboardInterrupt):
            train.main()
    assert [path.name for path in states(here)][-2:] == ["state-00000003.pt", "state-00000004.pt"]
    shutil.copytree(here.root / ".checkpoints", here.root / "kept")
    return here, undisturbed


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_state_is_recognised_and_the_one_before_it_used(
    interrupted: tuple[Project, dict[str, bytes]], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    project, undisturbed = interrupted
    draw = random.Random(kind)
    for _ in range(rounds(8, 1)):
        with fault(f"resume state damaged: {kind}"):
            afresh(project)
            DAMAGES[kind](states(project)[-1], draw)
            capsys.readouterr()
            train.main()
            said = capsys.readouterr()
            assert "state-00000004.pt is damaged (its checksum differs); going back to an earlier state" in said.err
            assert said.out.count("Step: ") == 3
            assert contents(project) == undisturbed


def afresh(project: Project) -> None:
    forget(project)
    shutil.copytree(project.root / "kept", project.root / ".checkpoints")


def test_without_a_whole_state_training_starts_again_and_saves_again(
    interrupted: tuple[Project, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The damaged states of later steps must not stand in the way of the new ones, of earlier steps."""
    project, undisturbed = interrupted
    draw, real = random.Random(2), train.train_step

    def dies_after_two(run: Any, *arguments: Any) -> None:
        if run.step == 2:
            raise KeyboardInterrupt
        real(run, *arguments)

    for kind, damage in DAMAGES.items():
        with fault(f"all resume states damaged: {kind}"):
            afresh(project)
            for state in states(project):
                damage(state, draw)
            with monkeypatch.context() as patched:
                patched.setattr(train, "train_step", dies_after_two)
                with pytest.raises(KeyboardInterrupt):
                    train.main()
            said = capsys.readouterr().err
            assert said.count("is damaged") == said.count("going back to an earlier state") + 1
            assert said.count("going back to the start, since no state is whole") == 1
            train.main()
            said = capsys.readouterr()
            assert said.out.count("Step: ") == 4, "the two steps since then were lost"
            assert "damaged" not in said.err
            assert contents(project) == undisturbed


# --- two trainers -------------------------------------------------------------------------------------------------


def test_a_second_trainer_is_refused_and_the_first_one_is_not_disturbed(tracked: Tracked) -> None:
    for _ in range(rounds(3, 1)):
        with fault("two trainers of the same run"):
            tracked.afresh()
            with tracked.forks.start(tracked.project) as run:
                until(lambda: tracked.has(".checkpoints/*/owner"), run)
                run.kill(signal.SIGSTOP)  # the second one takes longer to start than the first to end
                line = tracked.project.refuse("train")
                assert f"another process is training this very run (process {run.pid})" in line
                run.kill(signal.SIGCONT)
                assert run.wait() == 0, run.said()
            tracked.check()


def test_another_run_in_the_same_folder_is_refused(here: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer that outlived its dvc would else write its policy over that of the parameters of now."""
    real = train.write_outputs

    def tries_another(*arguments: Any) -> None:
        here.edit(seed=1)
        with pytest.raises(UserError, match=r"another process is training in this folder \(process \d+\)"):
            train.main()
        here.edit(seed=0)
        real(*arguments)

    with fault("two trainers of different runs in one folder"):
        train.main()
        undisturbed = contents(here)
        with monkeypatch.context() as patched:
            patched.setattr(train, "write_outputs", tries_another)
            train.main()
        assert contents(here) == undisturbed
