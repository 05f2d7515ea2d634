"""Resume states: `.checkpoints/<train_key>/` of the main workspace, outside DVC's outputs, which DVC deletes."""

import contextlib
import hashlib
import io
import os
import sys
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock, Timeout

from pipeline.errors import UserError
from pipeline.file_io import atomic_path, translate_write_errors, write_text
from pipeline.paths import resume_files, resume_states
from pipeline.rewards.turns import rewards_may_run, settings_of_training

DIGEST = 32  # bytes of a sha256, before the state
KEEP_LAST = 2  # states: if the newest is damaged, the one before it is used


@contextlib.contextmanager
def exclusive_lock(folder: Path, what: str) -> Iterator[None]:
    """Hold the folder's lock. Raises UserError where it cannot be written, or where another process holds it."""
    owner = folder / "owner"
    lock = FileLock(folder.with_suffix(".lock"))
    try:
        with translate_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
    except Timeout:
        who = owner.read_text().strip() if owner.exists() else "unknown"
        raise UserError(
            f"another process is training {what} (process {who}); wait for it, or end it and repeat the command"
        ) from None
    try:
        for left in folder.glob(".*.tmp"):  # left by a process that was killed while it saved
            left.unlink()
        write_text(owner, f"{os.getpid()}\n")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def save(
    folder: Path, step: int, state: dict[str, Any], judged: int, every: int, stop: threading.Event | None = None
) -> None:
    """Write the state after `step` steps, as `write` does.

    Deletes older states, except the KEEP_LAST newest and the one that `last_before` finds.
    """
    write(folder / f"state-{step:08d}.pt", state, stop)
    kept = {*resume_states(folder)[-KEEP_LAST:], last_before(folder, judged, every)}
    for old in set(resume_states(folder)) - kept:
        old.unlink()


def write(path: Path, state: dict[str, Any], stop: threading.Event | None = None) -> None:
    """Write a file: the state's sha256, then the state in torch's format. Custom rewards may run in other threads
    meanwhile. If `stop` is set before the end, raises KeyboardInterrupt and leaves no file."""
    with settings_of_training(), atomic_path(path) as temporary, temporary.open("wb") as target:
        target.write(bytes(DIGEST))
        hashing = Hashing(target, stop)
        torch.save(state, hashing)  # type: ignore[arg-type]  # it writes, and that is all torch asks of it
        if hashing.failure:
            raise hashing.failure
        target.seek(0)
        target.write(hashing.sha256.digest())
        target.flush()
        with rewards_may_run():  # slow; it leaves little to sync for `atomic_path`
            os.fsync(target.fileno())


def load(folder: Path) -> dict[str, Any] | None:
    """Return the newest intact state, on the CPU, or None.

    A damaged state is named in a warning and deleted, since it would count among the KEEP_LAST newest.
    """
    states = resume_states(folder)
    for path in reversed(states):
        if (state := read(path)) is not None:
            return state
        before = "an earlier state" if path != states[0] else "the start, since no state is whole"
        print(f"warning: {path} is damaged (its checksum differs); going back to {before}", file=sys.stderr)
        path.unlink()
    return None


def read(path: Path) -> dict[str, Any] | None:
    """A state, on the CPU; None where its checksum differs."""
    with path.open("rb") as source:
        if source.read(DIGEST) != hashlib.file_digest(source, "sha256").digest():
            return None
        source.seek(DIGEST)
        return torch.load(source, map_location="cpu", weights_only=True)


class Hashing(io.RawIOBase):
    """Write to a file and compute its sha256 on the way, without a second copy in memory. Use it within
    `settings_of_training`.

    After a failed write it ignores further ones and keeps the exception: torch would replace it by one of its own.
    """

    def __init__(self, target: BinaryIO, stop: threading.Event | None = None) -> None:
        self._target, self._stop, self.sha256 = target, stop, hashlib.sha256()
        self.failure: BaseException | None = None  # Ctrl-C too

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self.failure is None:
            try:
                with rewards_may_run():
                    self.sha256.update(data)
                if self._stop is not None and self._stop.is_set():
                    raise KeyboardInterrupt
                self._target.write(data)
            except BaseException as error:
                self.failure = error
        return memoryview(data).nbytes


def last_before(folder: Path, before: int, every: int) -> Path | None:
    """Return the newest state after fewer than `before` steps, at a multiple of `every`.

    A signal also leaves states at other steps, which must not change a result.
    """
    steps = {step_of(path): path for path in resume_states(folder)}
    return steps.get(max((step for step in steps if step < before and step % every == 0), default=-1))


def candidate(folder: Path, step: int) -> Path:
    """Path of the weights after `step` steps, which may become data/best."""
    return folder / f"best-{step:08d}.pt"


def keep_candidates(folder: Path, steps: Collection[int]) -> None:
    """Delete all candidates except those after these numbers of steps."""
    for path in set(folder.glob("best-*.pt")) - {candidate(folder, step) for step in steps}:
        path.unlink()


def sample_file(folder: Path, step: int) -> Path:
    """Path of the completions of a step, if all are kept."""
    return folder / f"samples-{step:08d}.parquet"


def delete_checkpoints(folder: Path, first: int = 0) -> int:
    """Deletes the states after `first` steps or more, and the files that training makes again from an earlier state:
    candidates for data/best, completions. Returns the step to go on from."""
    for path in resume_files(folder):
        if step_of(path) >= first:
            path.unlink()
    return max(saved_steps(folder), default=0)


def saved_steps(folder: Path) -> list[int]:
    return list(map(step_of, resume_states(folder)))


def step_of(path: Path) -> int:
    return int(path.stem.partition("-")[2])
