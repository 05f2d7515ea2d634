"""Digests of everything that computes, to compare CPUs: `python -m tests.emulation operations|stages FILE` writes a
JSON object. `stages` runs in a folder that `write_project` made. Under another type of CPU: `qemu-x86_64 -cpu Haswell
PYTHON -m ...`."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.arithmetic.environment import NUMPY, VARIABLES, choose_kernels, supports_portable
from tests.project import Project, copy_of_project
from tests.small import OUTPUTS, SIZES, contents

ROOT = Path(__file__).parents[1]
QEMU = shutil.which("qemu-x86_64")
CPUS = ("Haswell", "EPYC-Rome", "Skylake-Client")  # caches of different sizes, two makers
MARKS = [
    pytest.mark.slow,
    pytest.mark.exhaustive,
    pytest.mark.skipif(not supports_portable(), reason="needs an x86-64 CPU with AVX2 and FMA"),
    pytest.mark.skipif(QEMU is None, reason="needs Debian's qemu-user: apt-get install qemu-user"),
]
# M, K, N: few rows as in sampling, many as in scoring, sums as long as a gradient's, a vocabulary, odd ones
PRODUCTS = [
    (4, 256, 1024), (16, 1024, 256), (256, 64, 64), (64, 1856, 16), (16, 4096, 64), (1, 256, 1024), (37, 384, 128),
    (2, 2048, 512), (8, 512, 4096), (3, 8192, 3), (2, 3, 5), (300, 257, 29), (1856, 64, 16), (64, 128, 256),
]  # fmt: skip


def write_project(base: Path, policy: Path, encoder: Path, arithmetic: str) -> Project:
    """With two steps, all rewards that come with the project but the one of a user's."""
    made = copy_of_project(base)
    shutil.copytree(policy, made.root / "models/local/policy")
    shutil.copytree(encoder, made.root / "models/local/encoder")
    (made.root / "mlflow.py").write_text("raise ImportError('not here', name='mlflow')\n")  # it takes a minute
    made.edit(
        model="mine", models__mine={"source": "models/local/policy"}, encoder="mine",
        encoders__mine={"source": "models/local/encoder"}, evaluate__prompts=3, evaluate__samples_per_prompt=2,
        evaluate__bootstrap=100, train__calibration_batches=6, train__arithmetic=arithmetic,
        recipes__stable__lr=0.01, recipes__notebook__lr=0.01,
        **{f"train__{key}": value for key, value in {**SIZES, "steps": 2}.items()},
    )  # fmt: skip
    made.keep_rewards("embedding", "length", "words")
    return made


def run(what: str, folder: Path, cpu: str | None) -> dict[str, str]:
    """The digests as a process of its own finds them, on this machine or under another CPU."""
    target = folder.parent / f"{what}.json"
    shutil.rmtree(folder / ".checkpoints", ignore_errors=True)
    emulator = [str(QEMU), "-cpu", cpu] if cpu else []
    kept = {name: value for name, value in os.environ.items() if name not in {**VARIABLES, **NUMPY}}
    done = subprocess.run(
        [*emulator, sys.executable, "-m", "tests.emulation", what, str(target)],
        cwd=folder, env={**kept, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(target.read_text())


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def stage_digests(root: Path) -> dict[str, str]:
    """Of every file that the stages write, of a run that trains all weights and of one with adapters and the notebook's
    recipe."""
    from pipeline.stages import cache, diagnose, evaluate, plot, prepare, train

    project, found = Project(root, {}), {}
    for name, changes in (
        ("full", {"train__lora_rank": 0, "recipe": "stable"}),
        ("adapters", {"train__lora_rank": 2, "recipe": "notebook"}),
    ):
        project.edit(**changes)
        for stage in (prepare, cache, train, evaluate, diagnose, plot):
            stage.main()
        found |= {f"{name}: {path}": digest(content) for path, content in contents(root).items()}
        for folder in OUTPUTS:
            shutil.rmtree(root / folder)
    return found


def operation_digests() -> dict[str, str]:
    """Of single operations of torch and numpy, with the portable kernels if the environment chose them."""
    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from pipeline.arithmetic.kernels import use_portable_kernels

    if VARIABLES.items() <= os.environ.items():
        use_portable_kernels()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    x, y = draw(300, 257), draw(257, 128)
    p, heads = x.abs() + 0.1, draw(4, 4, 64, 64)
    array = p.numpy()

    def adam() -> Tensor:
        weights = torch.nn.Parameter(x.clone())
        optimizer = torch.optim.Adam([weights], lr=1e-3, fused=True)
        for gradient in (x * p, (x * p).sin(), p):
            weights.grad = gradient
            optimizer.step()
        return weights

    def gradient() -> Tensor:
        weights = y.clone().requires_grad_()
        F.gelu(F.layer_norm(x @ weights, (128,))).log_softmax(-1)[:, 3].sum().backward()
        return weights.grad

    operations: dict[str, Callable[[], Tensor]] = {
        "randn": lambda: x, "rand": lambda: torch.rand(1000, generator=generator),
        "uniform64": lambda: torch.rand(1000, generator=generator, dtype=torch.float64), "exp": x.exp, "log": p.log,
        "sqrt": p.sqrt, "sqrt64": p.double().sqrt, "rsqrt": p.rsqrt, "power": lambda: p**1.7,
        "half_power": lambda: p**0.5, "half_power_in_place": lambda: p.clone().pow_(0.5),
        "sqrt_in_place": lambda: p.clone().sqrt_(), "sqrt_bfloat16": lambda: p.bfloat16().sqrt().float(),
        "foreach_sqrt": lambda: torch._foreach_sqrt([p])[0], "minus_half_power": lambda: p**-0.5,
        "minus_power": lambda: p**-2.0, "square": lambda: x**2, "reciprocal": p.reciprocal, "divide": lambda: x / p,
        "tanh": x.tanh, "erf": x.erf, "sin": x.sin, "cos": x.cos, "sigmoid": x.sigmoid, "gelu": lambda: F.gelu(x),
        "gelu_tanh": lambda: F.gelu(x, approximate="tanh"), "silu": lambda: F.silu(x),
        "softmax": lambda: x.softmax(-1), "log_softmax": lambda: x.log_softmax(-1),
        "logsumexp": lambda: x.logsumexp(-1), "layer_norm": lambda: F.layer_norm(x, (257,)), "sum": x.sum,
        "rows": lambda: x.sum(1), "columns": lambda: x.sum(0), "norm": x.norm,
        "vector_norm": lambda: torch.linalg.vector_norm(x, dim=1), "cumsum": lambda: x.softmax(-1).cumsum(-1),
        "mean": x.mean, "var": lambda: x.var(1), "std": lambda: x.std(), "addcdiv": lambda: torch.addcdiv(x, x, p),
        "lerp": lambda: torch.lerp(x, p, 0.1), "bfloat16": lambda: x.bfloat16().float(),
        "product_bfloat16": lambda: (x.bfloat16() @ y.bfloat16()).float(),
        "product64": lambda: x.double() @ y.double(), "matrix_vector": lambda: x @ y[:, 0],
        "dot": lambda: y[:, 0] @ y[:, 1], "addmm": lambda: F.linear(x, y.t(), y[0]),
        "baddbmm": lambda: torch.baddbmm(heads[0], heads[1], heads[2]),
        "attention": lambda: F.scaled_dot_product_attention(heads, heads, heads, is_causal=True),
        "einsum": lambda: torch.einsum("bhqd,bhkd->bhqk", heads, heads),
        "convolution": lambda: F.conv1d(x[None, :64], y[:64, :63].reshape(64, 1, 63)[:, :, :4], groups=64),
        "adam": adam, "gradient": gradient, "numpy_exp": lambda: torch.from_numpy(np.exp(array)),
        "numpy_log64": lambda: torch.from_numpy(np.log(array.astype(float))),
        "numpy_std": lambda: torch.from_numpy(array.std(1)),
        "numpy_tanh64": lambda: torch.from_numpy(np.tanh(array.astype(float))),
    }  # fmt: skip
    for m, k, n in PRODUCTS:
        a, b = draw(m, k), draw(k, n)
        operations[f"product {m}x{k}x{n}"] = lambda a=a, b=b: a @ b
        operations[f"product {m}x{k}x{n}, transposed"] = lambda a=a, b=b: (
            a.t().contiguous().t() @ b.t().contiguous().t()
        )
        batch = draw(3, min(m, 64), min(k, 64)), draw(3, min(k, 64), min(n, 64))
        operations[f"batch {m}x{k}x{n}"] = lambda batch=batch: torch.bmm(*batch)
    return {name: digest(compute().detach().contiguous().numpy().tobytes()) for name, compute in operations.items()}


if __name__ == "__main__":
    what, target = sys.argv[1], Path(sys.argv[2])
    choose_kernels()
    found = operation_digests() if what == "operations" else stage_digests(Path.cwd())
    target.write_text(json.dumps(found))
