"""One experiment on several processes, as `accelerate launch` starts them: the same prompts, one record, one writer."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate.commands.launch
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.launcher.api import LaunchConfig

from pipeline.distributed.dist_context import DistContext
from pipeline.distributed.launch import CONFIG, relaunch_with_accelerate
from pipeline.errors import UserError
from pipeline.file_io import read_jsonl
from pipeline.stages import train
from pipeline.stages.train import check_ranks_in_sync
from tests.project import Project, copy_of_project
from tests.servers import free_port
from tests.training import (
    STEPS,
    all_tokens,
    assert_same_curve,
    configured,
    contents,
    curve,
    exactly,
    forget,
    history,
    interrupted,
    make_ready,
    recorded,
    sampled,
    states,
    succeed,
)

pytestmark = pytest.mark.numeric


@given(st.integers(1, 9), st.integers(0, 40), st.integers(1, 4))
def test_shares_are_runs_of_whole_prompts_that_together_are_all(count: int, prompts: int, group: int) -> None:
    every = [DistContext(rank, count).group_slice(prompts * group, group) for rank in range(count)]
    assert [i for rows in every for i in range(rows.start, rows.stop)] == list(range(prompts * group))
    sizes = [rows.stop - rows.start for rows in every]
    assert all(size % group == 0 for size in sizes)
    assert max(sizes) - min(sizes) <= group


# Adam divides by the root of the gradient's square: where the gradient is nothing but rounding, it would make steps as
# long as the others. This eps is longer than any gradient here, and the rate makes up for it.


@pytest.fixture
def exact(ready: Project) -> Project:
    """In float32, whose rounding hardly ever makes another token of a sample in so short a run."""
    return exactly(ready)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Project:
    """What two processes leave that nothing disturbed."""
    project = exactly(make_ready(copy_of_project(tmp_path_factory.mktemp("two")), checkpoint))
    succeed(project, **configured(project, 2))
    return project


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_several_processes_train_what_one_does(exact: Project, here: Project, two: Project, count: int) -> None:
    train.main()
    alone, run, samples, measured = history(exact), recorded(exact), sampled(exact), curve(exact)
    every = all_tokens(exact)
    terms = read_jsonl(exact.root / "reports/train/terms.jsonl")
    assert {row["scored_share"] for row in terms if row["term"] == "vowels"} - {0.0, 1.0}, "it says nothing of some"
    assert run["processes"] == [1]
    assert alone[-1]["ref_kl_k3"] > 1e-6, "the policy has left the reference"
    several = two
    if count > 2:
        forget(exact)
        succeed(exact, **configured(exact, count))
        several = exact
    assert recorded(several) == {**run, "processes": [count]}, "the same train_key, wherever it is computed"
    tokens = [[json.loads(line)["tokens"] for line in text.splitlines()] for text in (samples, sampled(several))]
    assert tokens[0] == tokens[1]
    assert all_tokens(several) == every
    assert_same_curve(several, *measured)
    for own, each in zip(read_jsonl(several.root / "reports/train/terms.jsonl"), terms, strict=True):
        assert own == pytest.approx(each)
    for row, truth in zip(history(several), alone, strict=True):
        for name in set(truth) - {"grad_snr"}:  # the micro-batches are others, which is what it is computed from
            assert row[name] == pytest.approx(truth[name], rel=1e-3, abs=1e-5, nan_ok=True), name


@pytest.mark.slow
def test_two_processes_go_on_on_two_machines_to_the_same_bytes(exact: Project, two: Project) -> None:
    """Machines that share the folder: each is told its rank by a file of its own; here they are two launchers on one
    machine, that meet at a port."""
    said = interrupted(exact, configured(exact, 2), signal.SIGTERM)
    assert "the same command goes on" in said
    assert not (exact.root / "data/policy").exists()
    assert last_step(exact) < STEPS, "else the machines have nothing to do"
    one, port = (exact.root / "processes.yaml").read_text(), free_port()
    for rank in (0, 1):
        text = one.replace("num_machines: 1", "num_machines: 2").replace("machine_rank: 0", f"machine_rank: {rank}")
        text = text.replace("main_process_port: 0", f"main_process_port: {port}\nmain_process_ip: 127.0.0.1")
        (exact.root / f"rank{rank}.yaml").write_text(text + "rdzv_backend: static\nsame_network: true\n")
    second = subprocess.Popen(
        [sys.executable, "-m", "pipeline.stages.train"], cwd=exact.root, text=True,
        env={**exact.environment, CONFIG: "rank1.yaml"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        succeed(exact, **{CONFIG: "rank0.yaml"})
        said = second.communicate(timeout=300)[1]
    finally:
        second.kill()
    assert second.returncode == 0, said
    assert contents(exact) == contents(two)


@pytest.mark.slow
@pytest.mark.exhaustive  # test_crash.py kills one, and two go on above
def test_killed_with_two_processes_it_goes_on_with_one(exact: Project, here: Project) -> None:
    interrupted(exact, configured(exact, 2), signal.SIGKILL)
    assert last_step(exact) < STEPS, "else the other number has nothing to do"
    train.main()  # by itself: the rest of the steps
    succeed(exact, **configured(exact, 2))  # nothing is left to compute: no process more has
    assert recorded(exact)["processes"] == [2, 1]
    assert [row["step"] for row in history(exact)] == list(range(STEPS))


def last_step(project: Project) -> int:
    return int(states(project)[-1].stem.partition("-")[2])


def test_a_launcher_that_cannot_be_is_one_line(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.edit(seed=-1)
    assert "seed" in project.refuse("train", **configured(project, 2)), "said once, by nobody launched"
    monkeypatch.chdir(project.root)
    for name in ("RANK", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    for file, text, message in (
        ("nowhere.yaml", None, "no file .*nowhere.yaml"),
        ("keys.yaml", "distributed: MULTI_GPU\n", "not a configuration"),
        ("list.yaml", "- 1\n", "not a configuration"), ("none.yaml", "a: b: c\n", "not a configuration"),
    ):  # fmt: skip
        if text:
            (project.root / file).write_text(text)
        monkeypatch.setenv(CONFIG, file)
        with pytest.raises(UserError, match=message):
            relaunch_with_accelerate("pipeline.stages.train", Path())


def test_what_an_accelerate_file_says_in_vain_is_named(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each setting in a line; nothing of what `accelerate config` writes by default."""
    monkeypatch.chdir(project.root)
    for name in ("RANK", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(accelerate.commands.launch, "launch_command", lambda _: None)
    file = project.root / configured(project, 2)[CONFIG]
    written = file.read_text() + "debug: false\ndowncast_bf16: 'no'\nenable_cpu_affinity: false\nfsdp_config: {}\n"
    written += "main_training_function: main\nrdzv_backend: static\nsame_network: true\ntpu_env: []\n"

    def launched(text: str) -> list[str]:
        file.write_text(text)
        monkeypatch.setenv(CONFIG, file.name)
        with pytest.raises(SystemExit):
            relaunch_with_accelerate("pipeline.stages.train", Path())
        return capsys.readouterr().err.splitlines()

    assert launched(written) == []
    text = written.replace("mixed_precision: 'no'", "mixed_precision: bf16").replace("use_cpu: false", "use_cpu: true")
    text = text.replace("fsdp_config: {}", "fsdp_config:\n  fsdp_offload_params: true")
    assert launched(text + "dynamo_config:\n  dynamo_backend: INDUCTOR\n") == [
        f"note: processes.yaml: {key} has no effect: {why}"
        for key, why in (
            ("mixed_precision", "the recipe's `precision` says it"), ("use_cpu", "train.device says it"),
            ("fsdp_config", "each layer is sharded over all processes, and nothing is offloaded"),
            ("dynamo_config", "it is a setting of accelerate's own trainer"),
        )
    ]  # fmt: skip
    for kind, also in (("DEEPSPEED", ""), ("MULTI_CPU", "; on CPUs, too, MULTI_GPU"), ("MEGATRON_LM", "")):
        file.write_text(written.replace("MULTI_GPU", kind))
        monkeypatch.setenv(CONFIG, file.name)
        line = f"processes.yaml: distributed_type: {kind}: should be MULTI_GPU, FSDP (sharded) or 'NO'{also}"
        with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
            relaunch_with_accelerate("pipeline.stages.train", Path())


@pytest.mark.slow
@pytest.mark.exhaustive
def test_torchrun_starts_processes_as_accelerate_does(exact: Project, two: Project) -> None:
    """By hand; the stage, which DVC runs afterwards, has nothing left to compute."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "pipeline.stages.train"]
    done = subprocess.run(command, cwd=exact.root, env=exact.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(exact) == contents(two)
    shutil.rmtree(exact.root / "data/policy")
    succeed(exact)
    assert contents(exact) == contents(two)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_configuration_without_processes_trains_with_one(exact: Project) -> None:
    """`distributed_type: 'NO'`, as `accelerate config` writes by default: accelerate then gives no rank."""
    environment = configured(exact, 1)
    file = exact.root / "processes.yaml"
    file.write_text(file.read_text().replace("MULTI_GPU", "'NO'"))
    succeed(exact, **environment)
    assert recorded(exact)["processes"] == [1]
    assert len(history(exact)) == STEPS


@pytest.mark.slow
def test_what_fails_in_a_launched_process_is_said_without_a_traceback(exact: Project) -> None:
    value = "float('nan' if os.environ['RANK'] == '1' else 0)"
    code = f"import os\ndef f(prompts, completions):\n    return [{value}] * len(prompts)\n"
    (exact.root / "custom/mine.py").write_text(code)
    exact.edit(reward="mine", rewards__mine={"kind": "custom", "function": "custom/mine.py:f"})
    done = exact.run("train", **configured(exact, 2))
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("error: reward mine")]
    assert "ChildFailedError" not in done.stderr


def test_the_launcher_waits_for_the_end_of_a_long_step(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's launcher, told to stop, kills after 30 s, unless this variable says otherwise; what a user says stays."""
    monkeypatch.chdir(project.root)
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "undone at the end, as what is set here is")
    for name in ("RANK", "DVC_ROOT", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(CONFIG, configured(project, 2)[CONFIG])
    waits = []
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2)
    assert config.shutdown_timeout == 30
    for said in (None, "5"):
        if said:
            monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", said)
        with pytest.MonkeyPatch.context() as inside:
            inside.setenv(CONFIG, os.environ[CONFIG])  # which the launcher takes out
            inside.setattr(
                accelerate.commands.launch, "launch_command",
                lambda _: waits.append(replace(config, shutdown_timeout=None).shutdown_timeout),
            )  # fmt: skip
            with pytest.raises(SystemExit) as end:
                relaunch_with_accelerate("pipeline.stages.train", Path())
            assert end.value.code == 0
    assert waits == [3600, 5]


def test_processes_that_would_train_different_runs_are_refused() -> None:
    """As where each machine has a folder of its own, of which one knows an earlier state."""
    key = "ab" * 32
    for mine, others in (((key, 8), (key, 4)), ((key, 8), ("cd" * 32, 8))):
        there = torch.tensor([[int(others[0][:15], 16), others[1]]])
        processes: Any = SimpleNamespace(gather=lambda here, there=there: torch.cat([here, there]))
        with pytest.raises(UserError, match=r"process 0 would train from step 8 of run (ab){7}a, process 1 from step"):
            check_ranks_in_sync(*mine, processes)
        check_ranks_in_sync(*others, processes)


@pytest.mark.slow
def test_more_processes_than_prompts_are_refused(here: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    here.edit(train__prompts_per_step=1)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"^train\.prompts_per_step = 1: at least one for each of the 2 processes"):
        train.main()
    assert not Path("reports/train").exists()
