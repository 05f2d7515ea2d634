"""A GPU, by simulation: a device "cuda" whose kernels are the CPU's, and which refuses what CUDA refuses.

It finds tensors of two devices in one operation, operations without a deterministic kernel, and what several processes
send; not how CUDA's kernels round, nor how long they take.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import pretend_cuda
from tests.project import ROOT, Project
from tests.training import configured, exactly, history, recorded, succeed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(pretend_cuda.COMPILER is None, reason="needs a C++ compiler, g++, to build the pretend device"),
]


@pytest.fixture(scope="session")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder which, in PYTHONPATH, gives every Python a GPU."""
    folder = tmp_path_factory.mktemp("gpu")
    pretend_cuda.build(folder)
    return folder


def with_gpu(gpu: Path, **variables: str) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(gpu), str(ROOT)]), **variables}


def run(what: str, project: Project, gpu: Path, **variables: str) -> dict[str, Any]:
    target = project.root / f"{what}.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.pretend_runs", what, str(target)], cwd=project.root, text=True,
        env={**project.environment, **with_gpu(gpu, **variables)}, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(target.read_text())


def assert_alike(variants: dict[str, Any]) -> None:
    """float32 samples the CPU's tokens; attention is another function, so that the last digits differ."""
    for name, found in variants.items():
        if "bfloat16" in name:
            assert found["distance"] < 0.2, (name, found)
        else:
            assert found["same tokens"], name
            assert found["distance"] < 1e-3, (name, found)


def test_steps_on_a_gpu_are_the_cpu_s_and_a_planted_fault_is_found(ready: Project, gpu: Path) -> None:
    found = run("core", ready, gpu, TORCH_ALLOW_TF32_CUBLAS_OVERRIDE="1")
    assert_alike(found["variants"])
    assert "on the same device" in found["planted"]
    said = found["settings"]
    assert said["tf32 before"], "the variable would switch it on"
    assert not said["tf32"]
    assert said["refused"].startswith("aten::cumsum has no deterministic kernel on a GPU"), said
    assert found["notebook"] < 0
    plain, apart = found["waits"]
    assert plain <= 125, "two a token, two for each micro-batch; eight and twenty before they were counted"
    assert apart <= plain + 2 * 4, "three for what is scored apart in a micro-batch; 25 before they were counted"


@pytest.mark.exhaustive
def test_every_variant_of_a_step_runs_on_a_gpu(ready: Project, gpu: Path) -> None:
    variants = run("all", ready, gpu)["variants"]
    assert len(variants) >= 20
    assert_alike(variants)


def test_stages_on_a_gpu_go_on_to_the_same_bytes(ready: Project, gpu: Path) -> None:
    for name, found in run("stages", ready, gpu).items():
        assert found["same bytes"], name
        assert found["run"]["device"] == "cuda"
        assert found["run"]["arithmetic"] == "native"
        assert found["run"]["gpus"] == [f"{pretend_cuda.NAME}, CUDA 0.0"]


@pytest.mark.exhaustive  # test_large.py spreads a policy over two processes of a CPU
@pytest.mark.parametrize("kind", ["FSDP", "MULTI_GPU"])
def test_two_processes_on_two_gpus_train_what_one_cpu_does(
    ready: Project, gpu: Path, tmp_path: Path, kind: str
) -> None:
    """NCCL carries gradients and weights alone: whoever waits for rank 0's files waits in gloo, for hours."""
    project, calls = exactly(ready), tmp_path / "calls"
    project.edit(train__steps=2, train__arithmetic="native")
    succeed(project)
    truth = history(project)
    project.edit(train__device="cuda")
    calls.mkdir()
    environment = configured(project, 2)
    file = project.root / "processes.yaml"
    file.write_text(file.read_text().replace("MULTI_GPU", kind))
    said = succeed(project, **environment, **with_gpu(gpu, PRETEND_GPUS="2", PRETEND_CALLS=str(calls)))
    assert "has no effect" not in said
    assert recorded(project)["processes"] == ["2 sharded" if kind == "FSDP" else 2]
    for row, expected in zip(history(project), truth, strict=True):
        for name in set(expected) - {"grad_snr"}:
            assert row[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5, nan_ok=True), name
    for rank in ("0", "1"):
        names = {line.split()[0] for line in (calls / rank).read_text().splitlines() if line[0] != " "}
        assert names <= {"allreduce", "all_gather_single", "reduce_scatter_single"}, names
        assert names


def test_too_little_memory_names_the_settings_that_lower_it(ready: Project, gpu: Path) -> None:
    ready.edit(train__device="cuda", train__gradient_checkpointing=True)
    line = ready.refuse("train", **with_gpu(gpu, PRETEND_BYTES=str(100_000)))
    assert line.startswith("error: out of memory: CUDA out of memory. Tried to allocate")
    assert "train.micro_batch below 64; recipes.stable.precision: bfloat16; train.lora_rank: 16 (adapters)" in line
    assert "gradient_checkpointing" not in line, "it is on"


def test_more_processes_than_gpus_are_refused(ready: Project, gpu: Path) -> None:
    """The second process, as a launcher would start it."""
    ready.edit(train__device="cuda")
    second = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    line = ready.refuse("train", **second, **with_gpu(gpu, PRETEND_GPUS="1"))
    assert line.startswith("error: LOCAL_RANK = 1: each process needs a GPU of its own, and torch sees 1 here")


@pytest.mark.exhaustive
def test_the_benchmark_for_a_gpu_runs_without_dvc_and_mlflow(tmp_path: Path, gpu: Path) -> None:
    """trl alone may be missing. The notebook's loop and ours run; one seed gives one digest."""
    for name in ("dvc", "mlflow"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('not on this machine')")
    environment = with_gpu(gpu)
    environment["PYTHONPATH"] += os.pathsep + str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "run", "--tiny", "--out", str(tmp_path / "out")], cwd=ROOT,
        env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out/gpu.json").read_text())
    assert {name for name, part in found["arms"].items() if "failed" in part} <= {"trl"}, done.stdout
    assert "both runs have the same bytes" in done.stdout
    assert pretend_cuda.NAME in done.stdout
