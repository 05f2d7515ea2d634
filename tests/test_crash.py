"""Whatever ends a run, the same command goes on to the same bytes: killed at any moment, its resume state damaged, its
dvc killed. Moments are drawn from a seeded generator over the time that an undisturbed run takes."""

import contextlib
import json
import math
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ruamel.yaml import YAML

from pipeline.errors import UserError
from pipeline.rl import train_step
from pipeline.stages import train
from tests.clones import Clone
from tests.faults import fault, first, rounds
from tests.forks import Forks, until
from tests.project import Project, copy_of_project
from tests.tracked import Tracked, logged
from tests.training import OUTPUTS, contents, end_before, forget, history, make_ready, states

pytestmark = [pytest.mark.slow, pytest.mark.faults]


# --- the trainer by itself, with MLflow ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, wide_checkpoint: Path, forks: Forks) -> Tracked:
    project = make_ready(copy_of_project(tmp_path_factory.mktemp("tracked")), wide_checkpoint)
    project.edit(train__keep_samples="all")  # which writes most files
    return Tracked(project, forks)


WINDOWS = {
    "while it saved": ".checkpoints/*/.state-*.tmp",
    "while it wrote outputs": "data/.policy.tmp",
    "between two outputs": "data/policy",
    "after its end": "reports/train/run.json",
}


@pytest.mark.parametrize("kills", first(1, [2, 38]))
def test_a_trainer_killed_at_any_moment_goes_on_to_the_same_bytes(tracked: Tracked, kills: int) -> None:
    draw = random.Random(kills)
    for _ in range(kills):
        with fault("kill -9 of train at a random moment"):
            tracked.afresh()
            with tracked.forks.start(tracked.project) as run:
                time.sleep(draw.uniform(0, 1.1) * tracked.seconds)
                run.kill()
            tracked.goes_on()
            tracked.check()


@pytest.mark.parametrize("window", WINDOWS)
def test_a_trainer_killed_anywhere_goes_on_to_the_same_bytes(tracked: Tracked, window: str) -> None:
    for _ in range(rounds(2, 1)):
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
def test_a_signal_ends_a_step_and_the_run_goes_on_to_the_same_bytes(tracked: Tracked, number: signal.Signals) -> None:
    """Between states too, so that the step in progress is saved for the signal's sake."""
    draw = random.Random(number)
    tracked.afresh()
    for _ in range(rounds(3, 1)):
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
    for _ in range(rounds(3, 1)):
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
def interrupted(here: Project) -> tuple[Project, dict[str, bytes]]:
    """A project whose run was ended after 4 of its 6 steps, and what it would have made."""
    train.main()
    undisturbed = contents(here)
    forget(here)
    end_before(4)
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
    interrupted: tuple[Project, dict[str, bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    """The damaged states of later steps must not stand in the way of the new ones, of earlier steps."""
    project, undisturbed = interrupted
    draw = random.Random(2)
    for kind, damage in list(DAMAGES.items())[: rounds(len(DAMAGES), 1)]:
        with fault(f"all resume states damaged: {kind}"):
            afresh(project)
            for state in states(project):
                damage(state, draw)
            end_before(2)
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


# --- numbers that are not finite ----------------------------------------------------------------------------------


class Faulty:
    """Makes the loss (through the logits) or the gradient of one step what it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, where: str, value: float, at: int) -> None:
        self.armed, self.step = False, 0
        stage, real_step, real_update = train.build_context, train.train_step, train_step.update_policy

        def staged(*arguments: Any) -> Any:
            setting, policy = stage(*arguments)
            weights = policy.get_output_embeddings().weight
            weights.register_hook(lambda g: torch.full_like(g, value) if self.armed and where == "gradient" else g)
            policy.register_forward_hook(lambda _, __, out: self.spoil(out, value) if where == "loss" else None)
            return setting, policy

        def step(run: Any, *arguments: Any) -> Any:
            self.step = run.step
            return real_step(run, *arguments)

        def update(*arguments: Any) -> Any:
            self.armed = self.step == at
            try:
                return real_update(*arguments)
            finally:
                self.armed = False

        monkeypatch.setattr(train, "build_context", staged)
        monkeypatch.setattr(train, "train_step", step)
        monkeypatch.setattr(train_step, "update_policy", update)

    def spoil(self, output: Any, value: float) -> None:
        if self.armed:
            output.logits = output.logits * value


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_ends_the_run(
    here: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str, value: float
) -> None:
    here.edit(train__steps=3)
    train.main()
    after_three = contents(here)["data/policy/model.safetensors"]
    forget(here)
    here.edit(train__steps=6)
    with fault(f"{where} not finite: stop"), monkeypatch.context() as patched:
        Faulty(patched, where, value, at=3)
        train.main()
        rows, files = history(here), contents(here)
        assert [row["nonfinite"] for row in rows] == [0, 0, 0, 1]
        assert not math.isfinite(rows[3]["loss"] if where == "loss" else rows[3]["grad_norm"])
        assert files["data/policy/model.safetensors"] == after_three, "the policy of the last finite step"
        samples = [json.loads(line) for line in files["reports/train/samples.jsonl"].decode().splitlines()]
        assert {sample["step"] for sample in samples} == {0, 1, 2, 3}, "the completions that it came of"
        assert json.loads(files["reports/train/summary.json"])["stopped"] is True
        capsys.readouterr()
        train.main()
        assert "Step: " not in capsys.readouterr().out, "the same command does not try again"
        assert contents(here) == files


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_whose_numbers_are_not_finite_can_be_skipped(
    here: Project, monkeypatch: pytest.MonkeyPatch, where: str, value: float
) -> None:
    """Also through an interruption right behind it."""
    here.edit(train__on_nonfinite="skip")
    with fault(f"{where} not finite: skip"), monkeypatch.context() as patched:
        Faulty(patched, where, value, at=3)
        train.main()
        rows, undisturbed = history(here), contents(here)
        assert [row["nonfinite"] for row in rows] == [0, 0, 0, 1, 0, 0]
        assert rows[3]["relative_update"] == 0 != rows[4]["relative_update"]
        assert all(math.isfinite(row["loss"]) for row in rows[4:])
        assert json.loads((here.root / "reports/train/summary.json").read_text())["stopped"] is False
        forget(here)
        end_before(4)
        train.main()
        assert contents(here) == undisturbed


# --- the pipeline as DVC runs it; `dvc repro` of a killed run is in test_pipeline.py too


class Piped:
    """A clone in which everything before `train` is committed, and what an undisturbed `dvc repro train` leaves."""

    def __init__(self, base: Path) -> None:
        self.clone, self.cache = Clone(base / "project", base / "cache", steps=6), base / "cache"
        self.root = self.clone.root
        self.clone("dvc", "repro", "prepare", "cache")
        self.clone.commit()
        began = time.monotonic()
        self.clone("dvc", "repro", "train")
        self.seconds = time.monotonic() - began
        self.lock, self.points = self.trained(self.clone.read("dvc.lock")), logged(self.root / "mlflow.db")
        with contextlib.closing(sqlite3.connect(self.root / "mlflow.db")) as store:
            for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
                store.execute(f"delete from {table}")
            store.commit()
        shutil.copy(self.root / "mlflow.db", base / "empty.db")
        self.afresh()

    def trained(self, lock: str) -> Any:
        """What dvc.lock says of the stage: digests of all that went in and of all that came out."""
        return YAML(typ="safe", pure=True).load(lock)["stages"]["train"]

    def afresh(self) -> None:
        """As after the commit: nothing trained, nothing recorded, nothing of it in DVC's run cache."""
        self.clone("git", "checkout", "-q", "--force", ".")
        for path in (*(self.root / folder for folder in OUTPUTS), self.root / ".checkpoints", self.cache / "dvc/runs"):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copy(self.root.parent / "empty.db", self.root / "mlflow.db")

    @contextlib.contextmanager
    def start(self, *command: str) -> Iterator[subprocess.Popen[bytes]]:
        """A command, the leader of a process group; at the end nothing that works in the clone is left."""
        process = subprocess.Popen(
            command, cwd=self.root, env=self.clone.environment, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            yield process
        finally:
            self.kill(signal.SIGKILL)
            process.wait()

    def kill(self, number: int) -> None:
        """To all that works in the clone: dvc, the queue's workers and the trainer are of several process groups."""
        for process in self.working():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def working(self, module: str = "") -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                here = Path(process.cwd()).is_relative_to(self.root)  # a zombie has none
                if here and (not module or module in process.cmdline()):
                    found.append(process)
        return found

    def wait(self, condition: Callable[[], object], seconds: float = 300.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def saved(self) -> int:
        """Steps that a resume state holds."""
        paths = self.root.glob(".checkpoints/*/state-*.pt")
        return max((int(path.stem.partition("-")[2]) for path in paths), default=0)

    def check(self, lock: str) -> None:
        assert self.trained(lock) == self.lock
        assert logged(self.root / "mlflow.db") == self.points
        assert self.working() == []

    def check_experiment(self, name: str) -> None:
        (found,) = [ref for ref in self.refs() if ref.endswith(f"/{name}")]
        self.check(self.clone("git", "show", f"{found}:dvc.lock"))

    def refs(self) -> list[str]:
        return self.clone("git", "for-each-ref", "--format=%(refname)", "refs/exps").split()


@pytest.fixture(scope="module")
def piped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Piped]:
    made = Piped(tmp_path_factory.mktemp("piped"))
    yield made
    made.kill(signal.SIGKILL)


@pytest.mark.exhaustive
def test_dvc_repro_killed_at_any_moment_goes_on_to_the_same_bytes(piped: Piped) -> None:
    draw = random.Random(3)
    for _ in range(2):
        piped.afresh()
        with contextlib.ExitStack() as faults:
            for _ in range(4):
                faults.enter_context(fault("kill -9 of dvc repro and train at a random moment"))
                with piped.start("dvc", "repro", "train"):
                    time.sleep(draw.uniform(0, 1.1) * piped.seconds)
            piped.clone("dvc", "repro", "train")
            piped.check(piped.clone.read("dvc.lock"))


@pytest.mark.exhaustive
def test_dvc_repro_killed_before_the_commit_trains_nothing_twice(piped: Piped) -> None:
    draw = random.Random(4)
    for _ in range(2):
        with fault("kill -9 of dvc repro between the end of train and DVC's commit"):
            piped.afresh()
            with piped.start("dvc", "repro", "train"):
                piped.wait((piped.root / "reports/train/run.json").exists)
                time.sleep(draw.uniform(0, 0.3))
            assert "Step: " not in piped.clone("dvc", "repro", "train")
            piped.check(piped.clone.read("dvc.lock"))
    with fault("kill -9 of dvc repro between the end of train and DVC's commit, in a fresh clone with its dvc.lock"):
        lock = piped.clone.read("dvc.lock")
        piped.afresh()
        (piped.root / "dvc.lock").write_text(lock)
        shutil.rmtree(piped.cache / "dvc/files")  # git does not carry it
        shutil.rmtree(piped.root / "data/prompts")
        shutil.rmtree(piped.root / "data/checkpoint")
        with piped.start("dvc", "repro", "train"):
            piped.wait((piped.root / "reports/train/run.json").exists)
        assert "Step: " not in piped.clone("dvc", "repro", "train")
        piped.check(piped.clone.read("dvc.lock"))


@pytest.mark.exhaustive
def test_a_forced_dvc_repro_goes_on_after_a_kill_and_then_anew(piped: Piped) -> None:
    piped.afresh()
    piped.clone("dvc", "repro", "train")
    command = ("dvc", "repro", "--single-item", "--force", "train")
    with fault("kill -9 of dvc repro --force"):
        with piped.start(*command):
            piped.wait(lambda: piped.saved() == 2)  # not 6, of the run before
        saved = piped.saved()
        assert 2 <= saved < 6
        assert piped.clone(*command).count("Step: ") == 6 - saved
        piped.check(piped.clone.read("dvc.lock"))


@pytest.mark.exhaustive
def test_a_trainer_that_outlived_its_dvc_is_named_and_taken_over(piped: Piped) -> None:
    """The recovery that the README tells: wait for the process that is named, or end it, and repeat the command."""
    for number in range(2):
        with fault("kill -9 of dvc alone, its child goes on training"):
            piped.afresh()
            with piped.start("dvc", "repro", "train") as dvc:
                piped.wait(lambda: piped.saved() >= 1)
                (trainer,) = piped.working("pipeline.stages.train")
                trainer.suspend()
                dvc.kill()
                dvc.wait()
                said = piped.clone("dvc", "repro", "train", fails=True)
                assert f"another process is training this very run (process {trainer.pid})" in said
                assert trainer.is_running()
                trainer.kill() if number else trainer.resume()
                piped.wait(lambda: piped.working() == [])
            done = piped.clone("dvc", "repro", "train").count("Step: ")
            assert 0 < done < 6 if number else done == 0
            piped.check(piped.clone.read("dvc.lock"))


@pytest.mark.exhaustive
def test_ctrl_c_at_dvc_repro_ends_after_the_step_and_goes_on(piped: Piped) -> None:
    with fault("Ctrl-C at dvc repro"):
        piped.afresh()
        with piped.start("dvc", "repro", "train") as dvc:
            piped.wait(lambda: piped.saved() >= 1)
            os.killpg(dvc.pid, signal.SIGINT)
            dvc.wait()
        saved = piped.saved()
        assert piped.clone("dvc", "repro", "train").count("Step: ") == 6 - saved
        piped.check(piped.clone.read("dvc.lock"))


@pytest.mark.exhaustive
def test_an_experiment_in_a_folder_of_its_own_goes_on_after_a_kill(piped: Piped) -> None:
    draw = random.Random(5)
    piped.afresh()
    command = ("dvc", "exp", "run", "--temp", "--name", "in-temp", "train")
    with contextlib.ExitStack() as faults:
        for _ in range(3):
            faults.enter_context(fault("kill -9 of dvc exp run --temp and train"))
            with piped.start(*command) as dvc:
                # which ends at once where the kill before came too late, and an experiment of this name is there
                piped.wait(lambda dvc=dvc: piped.working("pipeline.stages.train") or dvc.poll() is not None)
                time.sleep(draw.uniform(0, 0.7) * piped.seconds)
        if not any(ref.endswith("/in-temp") for ref in piped.refs()):  # else it was through
            piped.clone(*command)
        piped.check_experiment("in-temp")


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("start", "victim"),
    [(("dvc", "queue", "start"), "train"), (("dvc", "exp", "run", "--run-all"), "the worker and train")],
)
def test_a_queued_experiment_goes_on_after_a_kill(piped: Piped, start: tuple[str, ...], victim: str) -> None:
    """Queued again, as one that failed has to be. Without its worker DVC takes it for running until it is told."""
    name = start[-1].strip("-")
    queue = ("dvc", "exp", "run", "--queue", "--name", name, "train")
    with fault(f"kill -9 of {victim} in DVC's queue"):
        piped.afresh()
        piped.clone(*queue)
        with piped.start(*start) as dvc:
            piped.wait(lambda: piped.saved() >= 2)
            if victim == "train":
                for trainer in piped.working("pipeline.stages.train"):
                    trainer.kill()
                dvc.wait()
                piped.wait(lambda: piped.working() == [])
        if victim != "train":
            assert "Running" in piped.clone("dvc", "queue", "status")
            piped.clone("dvc", "queue", "kill", name)
        assert "Failed" in piped.clone("dvc", "queue", "status")
        saved = piped.saved()
        piped.clone(*queue)
        piped.clone(*start)
        piped.wait(lambda: piped.working() == [])
        said = piped.clone("dvc", "queue", "logs", name)
        assert said.count("Step: ") == 6 - saved
        piped.check_experiment(name)
        piped.clone("dvc", "queue", "remove", "--all")
