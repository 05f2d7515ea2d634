"""States are written beside the next steps: the same bytes, nothing lost, nothing in the way of a custom reward."""

import dataclasses
import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.distributed.weights import optimizer_state, trained_weights
from pipeline.errors import UserError, run_stage
from pipeline.rewards.turns import settings_of_reward
from pipeline.runs import checkpoints
from pipeline.runs.background import BackgroundWriter
from pipeline.runs.host_memory import available_memory, fits
from pipeline.stages import train
from tests.faults import fault, rounds
from tests.project import Project
from tests.training import contents, forget, states

SECONDS = 30.0


# --- the stage


@pytest.mark.slow
@pytest.mark.numeric
def test_a_state_is_that_of_its_step_though_training_goes_on(here: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each write waits for the end of the next step. Truth: the same written at once, from training's own memory."""
    here.edit(evaluate__every=2, evaluate__curve_prompts=4, train__keep_samples="all")
    written: dict[str, bytes] = {}
    at_once: dict[str, bytes] = {}
    steps, stepped = [0], threading.Condition()
    real_write, real_step, real_save = checkpoints.write, train.train_step, train.save_checkpoint

    def late(path: Path, state: dict[str, Any], *more: Any) -> None:
        saved = checkpoints.step_of(path)
        with stepped:
            assert saved == 6 or stepped.wait_for(lambda: steps[0] > saved, SECONDS), "training waits for the write"
        real_write(path, state, *more)
        written[path.name] = path.read_bytes()

    def step(*arguments: Any) -> Any:
        done = real_step(*arguments)
        with stepped:
            steps[0] += 1
            stepped.notify_all()
        return done

    def save(folder: Path, run: Any, policy: Any, optimizer: Any, *more: Any) -> None:
        weights = {"policy": trained_weights(policy)}
        whole = {**weights, "optimizer": optimizer_state(optimizer), "run": dataclasses.asdict(run)}
        for name, content in ((f"best-{run.step:08d}.pt", weights), (f"state-{run.step:08d}.pt", whole)):
            real_write(here.root / "at-once", content)
            at_once[name] = (here.root / "at-once").read_bytes()
        real_save(folder, run, policy, optimizer, *more)

    monkeypatch.setattr(checkpoints, "write", late)
    monkeypatch.setattr(train, "train_step", step)
    monkeypatch.setattr(train, "save_checkpoint", save)
    monkeypatch.setattr(train, "candidate_steps", lambda rows, found, done: {done} - {0})
    train.main()
    assert [name for name in sorted(written) if name.startswith("state")] == [f"state-{n:08d}.pt" for n in range(1, 7)]
    assert [name for name in sorted(written) if name.startswith("best")] == [f"best-{n:08d}.pt" for n in (2, 4, 6)]
    assert [name for name in written if written[name] != at_once[name]] == []


@pytest.mark.slow
@pytest.mark.numeric
def test_without_memory_for_a_copy_steps_wait_and_the_run_is_the_same(
    here: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main()
    undisturbed = contents(here)
    assert "no memory for a copy" not in capsys.readouterr().err
    forget(here)
    shared: list[bool] = []
    real_submit = BackgroundWriter.submit

    def submit(writer: BackgroundWriter, write: Any, beside: bool) -> None:
        real_submit(writer, write, beside)
        shared.append(beside or writer._writing is not None)

    monkeypatch.setattr(BackgroundWriter, "submit", submit)
    monkeypatch.setattr(train, "fits", lambda *_: False)
    train.main()
    assert shared == [False] * 6, "each is through before the next step"
    assert capsys.readouterr().err.count("note: no memory for a copy of the state (") == 1
    assert contents(here) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("last", [2, 6])
def test_a_state_that_cannot_be_written_is_one_line(
    here: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], last: int
) -> None:
    """Amid the run, and at its end, when no further save would tell."""
    real_write = checkpoints.write

    def full(path: Path, state: dict[str, Any], *more: Any) -> None:
        with monkeypatch.context() as inside:
            if path.name == f"state-{last:08d}.pt":
                inside.setattr(checkpoints, "Hashing", Full)
            real_write(path, state, *more)

    class Full(checkpoints.Hashing):
        def write(self, data: Any) -> int:
            self.failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return memoryview(data).nbytes

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "write", full)
        patched.setattr(sys, "argv", ["train"])
        with pytest.raises(SystemExit) as ended:
            run_stage(train.main)
    said = capsys.readouterr()
    assert ended.value.code == 1
    assert [line for line in said.err.splitlines() if line.startswith("error")] == [
        f"error: {states(here)[-1].parent}/state-{last:08d}.pt cannot be written: No space left on device; once that "
        "is mended, the same command goes on"
    ]
    assert [checkpoints.step_of(path) for path in states(here)][-1] == last - 1
    assert not list(here.root.glob(".checkpoints/*/.*.tmp"))
    assert not (here.root / "data/policy").exists()
    train.main()
    assert capsys.readouterr().out.count("Step: ") == 7 - last


# the trainer, whose writes of states stop half-way until the file `go` is there
HELD = """
import sys, time
from pathlib import Path
from pipeline.errors import run_stage
from pipeline.runs import checkpoints
from pipeline.stages import train

class Held(checkpoints.Hashing):
    written = 0
    def write(self, data):
        self.written += memoryview(data).nbytes
        while self.written > 2**15 and "-00000003" in str(self._target.name):
            time.sleep(0.001)
        return super().write(data)

checkpoints.Hashing = Held
if __name__ == "__main__":
    run_stage(train.main)
"""


@pytest.mark.slow
@pytest.mark.faults
def test_a_kill_amid_a_write_beside_a_step_leaves_the_state_before(here: Project, capsys: Any) -> None:
    here.edit(train__checkpoint_every=3, train__steps=8)
    train.main()
    undisturbed = contents(here)
    (here.root / "held.py").write_text(HELD)
    for _ in range(rounds(3, 1)):
        with fault("kill -9 of train in the step beside a save"):
            forget(here)
            run = subprocess.Popen(
                [sys.executable, "held.py"], cwd=here.root, env=here.environment, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, text=True, start_new_session=True,
            )  # fmt: skip
            history, deadline = here.root / "reports/train/history.csv", time.monotonic() + 300
            while not (history.exists() and history.read_text().count("\n") >= 1 + 5):  # two steps past the state
                assert run.poll() is None, run.communicate()[1]
                assert time.monotonic() < deadline
                time.sleep(0.005)
            os.killpg(run.pid, signal.SIGKILL)
            run.communicate()
            (half,) = here.root.glob(".checkpoints/*/.state-00000003.pt.tmp")
            assert half.stat().st_size > 0
            assert states(here) == []
            capsys.readouterr()
            train.main()
            assert capsys.readouterr().out.count("Step: ") == 8, "no state was whole"
            assert contents(here) == undisturbed
            assert not list(here.root.glob(".checkpoints/*/.*.tmp"))


# --- the writer


def test_the_next_write_waits_for_the_one_before_and_the_end_for_all() -> None:
    log, go = [], threading.Event()

    def first() -> None:
        assert go.wait(SECONDS)
        log.append("first")

    with BackgroundWriter() as writer:
        writer.submit(first)
        log.append("training goes on")
        threading.Timer(0.05, go.set).start()
        writer.submit(lambda: time.sleep(0.05) or log.append("second"))  # type: ignore[func-returns-value]
        log.append("training goes on")
    assert log == ["training goes on", "first", "training goes on", "second"]


def test_a_failed_write_does_not_hide_what_ended_training(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise UserError("no room")

    def run(then: Callable[[BackgroundWriter], None]) -> None:
        with BackgroundWriter() as writer:
            writer.submit(fail)
            then(writer)

    def fail_too(_: BackgroundWriter) -> None:
        raise UserError("a reward failed")

    def go_on(writer: BackgroundWriter) -> None:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            writer.raise_if_failed()
        pytest.fail("the failure is not noticed before the end")

    for then in (lambda _: None, go_on):
        with pytest.raises(UserError, match="no room"):
            run(then)
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="a reward failed"):
        run(fail_too)
    assert capsys.readouterr().err == "warning: no room\n"


class Slow(checkpoints.Hashing):
    """Waits amid its first large piece, where a custom reward may run."""

    reached, go = threading.Event(), threading.Event()

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.sha256 = Waiting(self.sha256)  # type: ignore[assignment]
        Slow.reached.clear()
        Slow.go.clear()


class Waiting:
    def __init__(self, sha256: Any) -> None:
        self._sha256, self.digest = sha256, sha256.digest

    def update(self, data: Any) -> None:
        if memoryview(data).nbytes > 1000:
            Slow.reached.set()
            assert Slow.go.wait(SECONDS)
        self._sha256.update(data)


STATE = {"policy": torch.arange(10_000.0), "optimizer": torch.ones(500)}


def test_ctrl_c_while_training_waits_for_a_write_gives_it_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "Hashing", Slow)

    def interrupted() -> None:
        assert Slow.reached.wait(SECONDS)
        threading.Timer(0.05, Slow.go.set).start()
        raise KeyboardInterrupt

    with BackgroundWriter() as writer:
        writer.submit(lambda: checkpoints.save(tmp_path, 1, STATE, 0, 1, writer.stop))
        monkeypatch.setattr(writer._writing, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.wait()
    assert not list(tmp_path.iterdir())


# --- beside a custom reward


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_reward_s_limits_do_not_reach_a_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write waits until the reward is through."""
    checkpoints.write(tmp_path / "alone", STATE)
    monkeypatch.setattr(checkpoints, "Hashing", Slow)
    with BackgroundWriter() as writer:
        writer.submit(lambda: checkpoints.write(tmp_path / "beside", STATE))
        assert Slow.reached.wait(SECONDS)
        with settings_of_reward(), no_file_larger_than(1):
            Slow.go.set()
            time.sleep(0.1)
            assert not (tmp_path / "beside").exists()
    assert (tmp_path / "beside").read_bytes() == (tmp_path / "alone").read_bytes()


def test_a_reward_waits_for_one_piece_of_a_state_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "Hashing", Slow)
    with BackgroundWriter() as writer:
        writer.submit(lambda: checkpoints.write(tmp_path / "beside", STATE))
        assert Slow.reached.wait(SECONDS)
        # for ever, if it waited for the state, which waits for `go`; twice: a reward that calls another one
        with settings_of_reward(), settings_of_reward():
            pass
        Slow.go.set()


# --- memory


def machine(root: Path, available: int, groups: str, files: dict[str, str], peak: int = 0, now: int = 0) -> Path:
    """A root folder with what Linux says, sizes in kB."""
    files = {
        "proc/meminfo": f"MemTotal: 99999 kB\nMemAvailable:   {available} kB\n", "proc/self/cgroup": groups,
        "proc/self/status": f"Name:\tpython\nVmHWM:\t  {peak} kB\nVmRSS:\t {now} kB\n", **files,
    }  # fmt: skip
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(place: str, limit: str, used: int, files: int, old: bool = False) -> dict[str, str]:
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if old else ("memory.max", "memory.current")
    stat = f"cache 7\n{'total_' if old else ''}inactive_file {files}\n"
    folder = f"sys/fs/cgroup/{place}"
    return {f"{folder}/{names[0]}": f"{limit}\n", f"{folder}/{names[1]}": f"{used}\n", f"{folder}/memory.stat": stat}


CONTAINER = group(".", "5000", 3000, 600)
MACHINES = {
    "a plain machine": ("0::/\n", {}, 10240),
    "no limit": ("0::/user\n", group("user", "max", 3000, 600), 10240),
    "a container": ("0::/\n", CONTAINER, 2600),
    "a batch job: the limit is above": (
        "0::/job_1/step_0\n", group("job_1", "8000", 1000, 0) | group("job_1/step_0", "max", 9, 0), 7000),
    "version 1": ("9:pids:/\n4:memory:/a\n0::/\n", group("memory/a", "4000", 3500, 100, old=True), 600),
    "version 1 in a container": ("4:memory:/docker/f00\n", group("memory", "4000", 3000, 0, old=True), 1000),
    "a limit that others have used up": ("0::/\n", group(".", "4000", 4100, 0), -100),
}  # fmt: skip


@pytest.mark.parametrize("kind", MACHINES)
def test_available_memory_by_hand(tmp_path: Path, kind: str) -> None:
    groups, files, expected = MACHINES[kind]
    assert available_memory(machine(tmp_path, 10, groups, files)) == expected


def test_a_copy_fits_beside_what_the_steps_will_take_again(tmp_path: Path) -> None:
    root = machine(tmp_path, available=100, groups="0::/\n", files={}, peak=50, now=30)
    assert fits(80 * 1024, 1, root)
    assert not fits(80 * 1024 + 1, 1, root)
    assert fits(20 * 1024, 4, root)
    assert not fits(20 * 1024 + 1, 4, root)
    assert fits(10**15, 1, tmp_path / "no such system")
