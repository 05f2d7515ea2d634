"""A full disk, a quota, a read-only folder: one line that says so, nothing half written taken for whole, and once there
is room the same command goes on to the same bytes. On a tmpfs of its own, which a ballast fills to the last page."""

import errno
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.stages import train
from tests.faults import fault, rounds
from tests.forks import Forks
from tests.project import Project, copy_of_project
from tests.tracked import Tracked, left_over, logged
from tests.training import OUTPUTS, contents, forget, make_ready

pytestmark = [pytest.mark.slow, pytest.mark.faults]
STAGES = ("prepare", "cache", "train", "evaluate", "diagnose", "plot", "track")
MADE = {
    "prepare": ["data/prompts", "reports/prepare.json"],
    "cache": ["data/checkpoint", "data/classifiers", "data/independent_classifiers"],
    "train": list(OUTPUTS),
    "diagnose": ["reports/diagnosis.json"],
    "evaluate": ["reports/evaluate"],
    "plot": ["reports/figures", "reports/page/report.html"],
    "track": ["reports/track/track.json", "mlflow.db", "mlartifacts"],
}


class Disk:
    """A tmpfs of a fixed size."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ballast = folder, folder / "ballast"

    def free(self) -> int:
        state = os.statvfs(self.folder)
        return state.f_bavail * state.f_frsize

    @contextmanager
    def with_room_for(self, size: int) -> Iterator[None]:
        """Leaves this many bytes, up to a page."""
        with self.ballast.open("wb") as ballast:
            os.posix_fallocate(ballast.fileno(), 0, max(1, self.free() - size))
        try:
            yield
        finally:
            self.ballast.unlink()

    @contextmanager
    def read_only(self) -> Iterator[None]:
        self.remount("ro")
        try:
            yield
        finally:
            self.remount("rw")

    def remount(self, mode: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{mode}", str(self.folder)], check=True)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    folder = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(folder)], capture_output=True, text=True
    )  # fmt: skip
    if mounted.returncode:
        pytest.skip(f"needs leave to mount a tmpfs: {mounted.stderr.strip()}")
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def error_line(code: int, said: str) -> str:
    """The one line that a user's mistake is."""
    assert code == 1, said
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said
    assert said.rstrip().endswith(lines[0])
    return lines[0]


# --- train --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tracked(disk: Disk, wide_checkpoint: Path, forks: Forks) -> Tracked:
    project = make_ready(copy_of_project(disk.folder / "trainer"), wide_checkpoint)
    project.edit(train__keep_samples="all")  # which writes most files
    return Tracked(project, forks)


def test_training_on_a_full_disk_goes_on_once_there_is_room(tracked: Tracked, disk: Disk) -> None:
    """Room for anything from nothing to all: whatever is written next fails, at whichever of its bytes."""
    before = disk.free()
    tracked.forks.finish(tracked.project)
    needed, draw = before - disk.free(), random.Random(0)
    failed = 0
    for number in range(rounds(15, 3)):
        with fault("full disk while training"):
            tracked.afresh()
            room = int(draw.uniform(0, 1.05) * needed) if number else 0
            with disk.with_room_for(room):
                code, said = tracked.forks.run(tracked.project)
            if code:
                failed += 1
                assert "cannot be written: No space left on device" in error_line(code, said)
                unharmed(tracked.project, tracked.files)
                assert left_over(tracked.project.root) == []
            tracked.goes_on()
            tracked.check()
    assert failed >= rounds(6, 2), "the disk was hardly ever full"


def unharmed(project: Project, files: dict[str, bytes]) -> None:
    """What there is of the outputs is whole."""
    found = contents(project)
    for folder in ("data/policy/", "data/healthy/"):
        inside = {name for name in found if name.startswith(folder)}
        assert inside in (set(), {name for name in files if name.startswith(folder)})
    assert all(files[name] == content for name, content in found.items())


def test_training_on_a_read_only_disk_is_one_line(tracked: Tracked, disk: Disk) -> None:
    with fault("read-only disk: train"):
        tracked.afresh()
        with disk.read_only():
            assert "cannot be written: Read-only file system" in error_line(*tracked.forks.run(tracked.project))
        tracked.goes_on()
        tracked.check()


# --- every stage --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(disk: Disk, pythia: Path, bert: Path, forks: Forks) -> tuple[Project, dict[str, bytes]]:
    """A project in which every stage has run, and what they made."""
    project = copy_of_project(disk.folder / "stages")
    shutil.copytree(pythia, project.root / "models/local/pythia")
    shutil.copytree(bert, project.root / "models/local/bert")
    project.edit(
        models__tiny={"source": "models/local/pythia"}, encoders__tiny={"source": "models/local/bert"},
        model="tiny", encoder="tiny", reward="length", train__steps=3, train__prompts_per_step=3,
        train__samples_per_prompt=2, train__max_tokens=6, train__threads=1, evaluate__prompts=4,
        evaluate__samples_per_prompt=2, evaluate__bootstrap=100,
    )  # fmt: skip
    project.keep_rewards("length")
    for stage in STAGES:
        forks.finish(project, stage)
    return project, everything(project)


def everything(project: Project) -> dict[str, bytes]:
    """The outputs of every stage; of MLflow's database and artifacts not the bytes, which hold ids and times."""
    roots = [project.root / name for names in MADE.values() for name in names if not name.startswith("ml")]
    paths = [path for root in roots for path in (root.rglob("*") if root.is_dir() else [root]) if path.is_file()]
    return {path.relative_to(project.root).as_posix(): path.read_bytes() for path in paths}


def recorded(project: Project) -> dict[str, int]:
    """Sizes of the artifacts, by name."""
    files = [path for path in (project.root / "mlartifacts").rglob("*") if path.is_file()]
    assert len({path.relative_to(project.root / "mlartifacts").parts[0] for path in files}) <= 1, "two runs"
    return {
        Path(*path.relative_to(project.root / "mlartifacts").parts[1:]).as_posix(): path.stat().st_size
        for path in files
    }


def remove(project: Project, stage: str) -> None:
    """As DVC before it runs the stage."""
    for name in MADE[stage]:
        path = project.root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "train"])
def test_a_stage_on_a_full_disk_is_one_line_and_then_does_its_work(
    made: tuple[Project, dict[str, bytes]], disk: Disk, forks: Forks, stage: str
) -> None:
    project, files = made
    store = logged(project.root / "mlflow.db")
    kept = recorded(project)
    before = disk.free()
    remove(project, stage)
    needed, draw = disk.free() - before, random.Random(stage)
    failed = 0
    for number in range(rounds(5, 2)):
        full = number != 1
        with fault(f"{'full' if full else 'read-only'} disk: {stage}"):
            room = int(draw.uniform(0, 1) * needed) if number else 0
            with disk.with_room_for(room) if full else disk.read_only():
                code, said = forks.run(project, stage)
            if code:
                failed += 1
                line = error_line(code, said)
                if stage != "track":
                    assert f"cannot be written: {'No space left on device' if full else 'Read-only'}" in line
                    assert not (inside := left_over(project.root)), inside
                else:
                    assert "MLflow store" in line or "cannot be written" in line
                    assert "full" in line or "No space" in line or "ead-only" in line or "readonly" in line, line
                found = everything(project)
                assert all(files[name] == content for name, content in found.items()), "half written"
            forks.finish(project, stage)
            assert everything(project) == files
            assert logged(project.root / "mlflow.db") == store
            assert recorded(project) == kept
            remove(project, stage)
    forks.finish(project, stage)
    assert failed >= 2


# --- every file that is opened ------------------------------------------------------------------------------------


class Quota:
    """Refuses the n-th file of this process that is opened to be written below a folder. Python keeps its audit hooks
    for good, hence one for all."""

    def __init__(self) -> None:
        self.root, self.left, self.number = "", -1, 0
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not self.root:
            return
        path, _, flags = arguments
        if flags & (os.O_WRONLY | os.O_RDWR) and os.path.abspath(str(path)).startswith(self.root):
            self.left -= 1
            if self.left == -1:
                raise OSError(self.number, os.strerror(self.number), path)

    @contextmanager
    def refuses(self, root: Path, which: int, number: int) -> Iterator[None]:
        self.root, self.left, self.number = str(root), which, number
        try:
            yield
        finally:
            self.root = ""


@pytest.fixture(scope="module")
def quota() -> Quota:
    return Quota()


def test_whichever_file_training_may_not_write_is_named_and_it_goes_on(here: Project, quota: Quota) -> None:
    here.edit(train__keep_samples="all")
    with quota.refuses(here.root, 10**6, 0):
        train.main()
        files = 10**6 - quota.left
    undisturbed = contents(here)
    forget(here)
    assert files > 20
    chosen = random.Random(0).sample(range(files), min(files, rounds(files, 4)))
    got_by = 0
    for which in chosen:
        number = [errno.EDQUOT, errno.ENOSPC, errno.EACCES, errno.EIO][which % 4]
        with fault("quota or permission refused at a file of train"):
            forget(here)
            try:
                with quota.refuses(here.root, which, number):
                    train.main()
            except UserError as error:
                said = str(error)
            else:
                said, got_by = os.strerror(number), got_by + 1
            assert os.strerror(number) in said
            unharmed(here, undisturbed)
            train.main()
            assert contents(here) == undisturbed
            assert left_over(here.root) == []
    assert got_by <= 2  # filelock opens a file that it may not create once more, without creating it: two locks
