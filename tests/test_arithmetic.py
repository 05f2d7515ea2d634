"""train.arithmetic: portable kernels compute what torch's own do, and the same bytes under every type of CPU."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.arithmetic import bfloat16, environment, kernels
from pipeline.arithmetic.environment import NUMPY, VARIABLES, choose_kernels
from pipeline.stages import train
from tests.project import ROOT, Project

needs_portable = pytest.mark.skipif(not environment.supports_portable(), reason="needs an x86-64 CPU with AVX2 and FMA")


# --- the kernels, called directly: torch's own products in float64 are the truth


def close(found: Tensor, truth: Tensor, terms: int) -> bool:
    """Within the error of `terms` roundings of float32, and of one of the result's type."""
    step = torch.finfo(found.dtype).eps
    scale = 1 + (truth.abs().max() if truth.numel() else 0)
    return bool(((found.double() - truth).abs() <= (terms * 2**-24 + step) * scale).all())


@needs_portable
@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(5, 7, 3), (1, 64, 1), (33, 300, 65), (4, 0, 3), (0, 4, 3), (4, 3, 0)])
def test_products_are_those_of_torch(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, k, n = size
    draw = torch.Generator().manual_seed(m + k + n)
    a, b, c = (torch.randn(shape, generator=draw).to(dtype) for shape in ((2, m, k), (2, k, n), (2, m, n)))
    exact = a.double() @ b.double()
    for left, right in ((a, b), (a.mT.contiguous().mT, b), (a, b.mT.contiguous().mT)):
        assert close(kernels.bmm(left, right), exact, k)
        assert close(kernels.mm(left[0], right[0]), exact[0], k)
        assert close(kernels.baddbmm(c, left, right, beta=0.5, alpha=2), 0.5 * c.double() + 2 * exact, k + 2)
        assert close(
            kernels.addmm(c[0], left[0], right[0], beta=0.5, alpha=2), 0.5 * c[0].double() + 2 * exact[0], k + 2
        )
        bias = c[0, 0] if m else c.new_ones(n)
        for scale in (1, 2):
            found = kernels.addmm(bias, left[0], right[0], alpha=scale)
            assert close(found, bias.double() + scale * exact[0], k + 2)
    nothing = torch.full_like(c[0], math.nan)
    assert close(kernels.addmm(nothing, a[0], b[0], beta=0), exact[0], k), "beta = 0 leaves c out, whatever it holds"
    assert kernels.mm(a[0], b[0]).dtype == dtype


@needs_portable
def test_whole_numbers_are_multiplied_as_before() -> None:
    a, b = torch.arange(6).view(2, 3), torch.arange(12).view(3, 4)
    assert torch.equal(kernels.mm(a, b), torch.tensor([[20, 23, 26, 29], [56, 68, 80, 92]]))
    assert torch.equal(kernels.bmm(a[None], b[None])[0], kernels.mm(a, b))


@needs_portable
def test_an_overflow_is_infinite_without_a_warning() -> None:
    huge = torch.full((2, 3, 3), 1e30)
    assert kernels.bmm(huge, huge).isposinf().all()
    assert kernels.mm(huge[0], huge[0]).isposinf().all()


@needs_portable
@pytest.mark.numeric
def test_square_roots_are_those_of_ieee_754() -> None:
    """math.sqrt is exact in float64, and rounding it once more to float32 is right too (Figueroa 1995)."""
    values = torch.rand(5000, generator=torch.Generator().manual_seed(0)) * 100
    exact = torch.tensor([math.sqrt(value) for value in values.tolist()], dtype=torch.float64)
    assert torch.equal(kernels.sqrt(values), exact.float())
    assert torch.equal(kernels.sqrt(values.double()), exact)
    assert torch.equal(kernels.power(values, 0.5), exact.float())
    assert kernels.sqrt(torch.tensor(4.0)).item() == 2
    assert kernels.sqrt(torch.tensor(-1.0)).isnan()
    assert torch.equal(kernels.sqrt(torch.tensor([4, 9])), torch.tensor([2.0, 3.0]))
    assert kernels.sqrt(torch.tensor([4.0]).bfloat16()).dtype == torch.bfloat16


@needs_portable
@pytest.mark.parametrize("values", [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1, 2, 3]), torch.tensor([1.5]).half()])
@pytest.mark.parametrize("exponent", [2, 3, -1.5, 0.5, 0])
def test_powers_are_those_of_torch(values: torch.Tensor, exponent: float) -> None:
    expected = torch.pow(values, exponent)
    found = kernels.power(values, exponent)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)


# --- the environment, chosen before torch is loaded


def in_python(program: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in {**VARIABLES, **NUMPY}}
    return subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env={**kept, **variables}, capture_output=True, text=True
    )


@needs_portable
def test_a_stage_chooses_the_kernels_before_torch_is_loaded(project: Project) -> None:
    program = (
        "import os, pipeline.stages.train, torch; from pipeline.distributed.device import configure_torch;"
        "configure_torch('cpu', 1, 'portable'); print(torch.backends.cpu.get_cpu_capability(), os.environ['MKL_CBWR'])"
    )
    for given in ({}, {"MKL_CBWR": "AVX2", "ATEN_CPU_CAPABILITY": "default"}):
        done = in_python(program, project.root, **given)
        assert done.stdout.split() == ["AVX2", "COMPATIBLE"], done.stderr


@needs_portable
def test_a_native_run_keeps_the_environment_as_it_is(project: Project) -> None:
    project.edit(train__arithmetic="native")
    done = in_python("import os, pipeline.stages; print(os.environ.get('MKL_CBWR'))", project.root)
    assert done.stdout.split() == ["None"], done.stderr


@needs_portable
def test_portable_arithmetic_samples_the_same_tokens_in_parts() -> None:
    program = """
import pipeline.stages, torch
from pipeline.distributed.device import configure_torch
configure_torch("cpu", 1, "portable")
from pathlib import Path
from pipeline.models import cache_size
from pipeline.models.load import load_policy
from pipeline.models.sampling import pad_prompts, sample
from tests.models import token_lists, uniform
policy = load_policy(Path("data/pocket/checkpoint"), torch.device("cpu"))
found = []
for bound in (2**30, 10 * 2**20, 2**20):
    cache_size.CACHE_BYTES["cpu"] = bound
    inputs = pad_prompts(token_lists([3, 9, 5, 12], 4096), 0, torch.device("cpu"))
    found.append(sample(policy, *inputs, torch.full((4,), 24), uniform(32, 24), [0]))
print(*(torch.equal(part.completions, found[0].completions) for part in found))
print(*((part.logprobs - found[0].logprobs).abs().max().item() < 1e-4 for part in found))
"""
    done = in_python(program, ROOT)
    assert done.stdout.split() == ["True"] * 6, done.stderr


@needs_portable
@pytest.mark.parametrize("first", ["torch", "numpy"])
def test_a_process_with_other_kernels_says_so_and_stops(project: Project, first: str) -> None:
    program = (
        f"import {first}, pipeline.stages; from pipeline.distributed.device import configure_torch;"
        "from pipeline.errors import run_stage; run_stage(lambda: configure_torch('cpu', 1, 'portable'))"
    )
    done = in_python(program, project.root)
    assert done.returncode == 1
    assert done.stderr.startswith("error: train.arithmetic = portable: torch or numpy was")
    assert "MKL_CBWR=COMPATIBLE" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_params_file_that_is_not_valid_chooses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    choose_kernels()
    Path("params.yaml").write_text("train: [")
    choose_kernels()


@pytest.mark.parametrize("flags", ["sse4_2 avx", "avx2 sse4_2", None])
def test_a_cpu_without_the_instructions_trains_natively_and_says_so(
    here: Project, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], flags: str | None
) -> None:
    info = here.root / "cpuinfo"
    if flags is not None:
        info.write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\n")
    monkeypatch.setattr(environment, "CPU_INFO", info)
    here.edit(train__steps=1)
    train.main()
    assert json.loads(Path("reports/train/run.json").read_text())["arithmetic"] == "native"
    assert "note: train.arithmetic = portable needs" in capfd.readouterr().err


@needs_portable
def test_a_run_is_not_continued_in_the_other_arithmetic(here: Project, capfd: pytest.CaptureFixture[str]) -> None:
    here.edit(train__steps=1, recipes__stable__precision="bfloat16")
    keys = set()
    for arithmetic in ("portable", "native"):
        here.edit(train__arithmetic=arithmetic)
        train.main()
        run = json.loads(Path("reports/train/run.json").read_text())
        assert run["arithmetic"] == arithmetic
        keys.add(run["train_key"])
        assert ("multiplies bfloat16 in float32" in capfd.readouterr().err) == (arithmetic == "portable")
    assert len(keys) == len(list(here.root.glob(".checkpoints/*/"))) == 2


# --- bfloat16 where the CPU has no arithmetic for it


@needs_portable
def test_a_cpu_that_has_only_avx2_takes_longer_in_bfloat16(tmp_path: Path) -> None:
    """oneDNN, kept from the other instructions of this CPU, multiplies as on such a one: 4 to 7 times as slow as in
    float32 where that was measured."""
    program = "from pipeline.arithmetic.bfloat16 import bfloat16_note; print(bfloat16_note('native'))"
    done = in_python(program, tmp_path, PYTHONPATH=str(ROOT), ONEDNN_MAX_CPU_ISA="AVX2")
    said = re.match(r"this CPU has no arithmetic for bfloat16: its products take ([\d.]+) times as long", done.stdout)
    assert said, done.stderr
    assert 1.5 < float(said[1]) < 50


@pytest.mark.parametrize(
    ("reward", "changes"),
    [
        ("length", {"recipes__stable__precision": "bfloat16"}),
        ("embedding", {"rewards__embedding__precision": "bfloat16"}),
    ],
)
@pytest.mark.parametrize("ratio", [4.4, 0.25])
def test_a_run_in_bfloat16_says_first_what_it_costs(
    here: Project, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], reward: str,
    changes: dict[str, str], ratio: float,
) -> None:  # fmt: skip
    """A CPU that has none, and one that has it; each by a measurement that is given."""
    monkeypatch.setattr(bfloat16, "products_ratio", lambda: ratio)
    monkeypatch.setattr(train, "train", lambda *_: None)
    here.edit(train__arithmetic="native", reward=reward, **changes)
    train.main()
    said = capfd.readouterr().err
    assert ("its products take 4.4 times as long as in float32" in said) == (ratio > 1)
    assert ("train.arithmetic: portable saves the memory" in said) == (ratio > 1)
    here.edit(**dict.fromkeys(changes, "float32"))
    train.main()
    assert "bfloat16" not in capfd.readouterr().err


@needs_portable
@pytest.mark.parametrize(("flag", "native"), [("amx_bf16", "is faster"), ("avx512f", "would be slower")])
def test_portable_bfloat16_says_whether_native_is_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, native: str
) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nflags\t\t: fpu avx2 fma {flag}\n")
    monkeypatch.setattr(environment, "CPU_INFO", info)
    assert f"train.arithmetic: native {native} on this CPU" in str(bfloat16.bfloat16_note("portable"))
