"""Experiments that run at the same time, in a workspace without a database: each is complete and its own, and its
numbers are those of a run that had the machine to itself."""

import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.clones import Clone, end, tiny
from tests.experiments import assert_complete, run_queue
from tests.faults import fault

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.exhaustive]  # tests/test_sweep.py queues two


@pytest.fixture
def clone(tmp_path: Path, prepared: Path) -> Iterator[Clone]:
    made = tiny(tmp_path, prepared)
    yield made
    end(made)


def test_a_queue_of_experiments_at_two_jobs(clone: Clone, prepared: Path) -> None:
    seeds = [1, 2, 3, 4, 5, 6]
    with fault("experiments of a queue at the same time"):
        clone("dvc", "exp", "run", "--queue", "-S", f"seed=range(1,{1 + len(seeds)})")
        run_queue(clone, len(seeds))
        histories = assert_complete(clone, seeds)
        assert len(set(histories.values())) == len(seeds)
    with fault("the same experiment alone gives the same bytes"):
        alone = tiny(clone.root.parent / "alone", prepared)
        alone("dvc", "exp", "run", "-S", "seed=2")
        assert alone.read("reports/train/history.csv") == histories[2]


def test_experiments_in_folders_of_their_own_at_once(clone: Clone) -> None:
    seeds = [1, 2, 3, 4]
    with fault("--temp experiments at the same time"):
        with ThreadPoolExecutor(len(seeds)) as at_once:
            list(at_once.map(lambda seed: run_temp(clone, seed), seeds))
        assert_complete(clone, seeds)


def run_temp(clone: Clone, seed: int) -> None:
    """DVC sets up one experiment at a time and refuses another one meanwhile, before it runs: the command is
    repeated."""
    command = ["dvc", "exp", "run", "--temp", "-S", f"seed={seed}"]
    for _ in range(30):
        done = subprocess.run(command, cwd=clone.root, env=clone.environment, capture_output=True, text=True)
        if done.returncode == 0 or "Unable to acquire lock" not in done.stderr:
            break
        assert "Running stage" not in done.stdout, done.stdout + done.stderr
        time.sleep(seed)
    assert done.returncode == 0, done.stdout + done.stderr
