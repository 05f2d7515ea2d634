"""One experiment on several processes, as `accelerate launch` starts them: the same prompts, one record, one writer."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.io.launch import CONFIG
from pipeline.reinforce.processes import Processes
from tests.conftest import Project
from tests.test_train import checkpoint, contents, forget, history, ready, states, succeed

__all__ = ["checkpoint", "ready"]  # fixtures


@given(st.integers(1, 9), st.integers(0, 40), st.integers(1, 4))
def test_shares_are_runs_of_whole_prompts_that_together_are_all(count: int, prompts: int, group: int) -> None:
    every = [Processes(rank, count).rows(prompts * group, group) for rank in range(count)]
    assert [i for rows in every for i in range(rows.start, rows.stop)] == list(range(prompts * group))
    sizes = [rows.stop - rows.start for rows in every]
    assert all(size % group == 0 for size in sizes)
    assert max(sizes) - min(sizes) <= group


def configured(project: Project, count: int) -> dict[str, str]:
    """The environment that has accelerate start so many processes; the file as `accelerate config` writes it."""
    lines = ["compute_environment: LOCAL_MACHINE", "distributed_type: MULTI_GPU", f"num_processes: {count}", "num_machines: 1",
             "machine_rank: 0", "mixed_precision: 'no'", "main_process_port: 0", "use_cpu: false", "gpu_ids: all"]  # fmt: skip
    (project.root / "processes.yaml").write_text("\n".join(lines) + "\n")
    return {CONFIG: "processes.yaml"}


def recorded(project: Project) -> dict[str, object]:
    return json.loads((project.root / "reports/train/run.json").read_text())


@pytest.fixture
def exact(ready: Project) -> Project:
    """In float32, whose rounding hardly ever makes another token of a sample in so short a run."""
    ready.edit(recipes__stable__precision="float32", train__prompts_per_step=4, train__steps=4)
    return ready


@pytest.mark.slow
def test_two_and_four_processes_train_what_one_does(exact: Project) -> None:
    succeed(exact)
    alone, run, samples = history(exact), recorded(exact), contents(exact)["reports/train/samples.jsonl"]
    assert run["processes"] == [1]
    for count in (2, 4):
        forget(exact)
        succeed(exact, **configured(exact, count))
        assert recorded(exact) == {**run, "processes": [count]}, "the same train_key, wherever it is computed"
        tokens = [[json.loads(line)["tokens"] for line in text.splitlines()] for text in (samples, sampled(exact))]
        assert tokens[0] == tokens[1]
        for row, truth in zip(history(exact), alone, strict=True):
            for name in set(truth) - {"grad_snr"}:  # the micro-batches are others, which is what it is computed from
                assert row[name] == pytest.approx(truth[name], rel=1e-3, abs=1e-5, nan_ok=True), name


def sampled(project: Project) -> bytes:
    return contents(project)["reports/train/samples.jsonl"]


@pytest.mark.slow
def test_the_same_number_gives_the_same_bytes_and_another_one_goes_on(exact: Project) -> None:
    two = configured(exact, 2)
    succeed(exact, **two)
    undisturbed = contents(exact)
    forget(exact)
    said = interrupted(exact, two, signal.SIGTERM)
    assert "the same command goes on" in said
    assert not (exact.root / "data/policy").exists()
    kept = [path.read_bytes() for path in states(exact)]
    succeed(exact, **two)
    assert contents(exact) == undisturbed

    forget(exact)
    interrupted(exact, two, signal.SIGKILL)
    steps = len(states(exact)) and int(states(exact)[-1].stem.partition("-")[2])
    succeed(exact)  # by itself: the rest of the steps
    assert steps
    assert kept
    assert recorded(exact)["processes"] == [2, 1]
    assert [row["step"] for row in history(exact)] == [0, 1, 2, 3]


def interrupted(project: Project, environment: dict[str, str], number: signal.Signals) -> str:
    """The stage, ended by a signal to its launcher as soon as there is a state; what it said on stderr."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.train"], cwd=project.root, env=project.environment | environment, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    while not states(project):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.005)
    if number == signal.SIGKILL:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    return said


def test_a_launcher_that_cannot_be_is_one_line(project: Project) -> None:
    assert "no file" in project.refuse("train", **{CONFIG: "nowhere.yaml"})


@pytest.mark.slow
def test_more_processes_than_prompts_are_refused(exact: Project) -> None:
    exact.edit(train__prompts_per_step=1)
    done = exact.run("train", **configured(exact, 2))
    assert done.returncode != 0
    assert "error: train.prompts_per_step = 1: at least one for each of the 2 processes" in done.stderr
    assert not Path(exact.root / "reports/train").exists()
