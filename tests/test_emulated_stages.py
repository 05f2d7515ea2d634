"""Portable arithmetic: every file of a run is the same under each type of CPU, emulated."""

from pathlib import Path

import pytest

from pipeline.arithmetic.environment import supports_portable
from tests.emulation import CPUS, QEMU, run, write_project
from tests.repositories import write_pythia

pytestmark = [
    pytest.mark.slow,
    pytest.mark.exhaustive,
    pytest.mark.skipif(not supports_portable(), reason="needs an x86-64 CPU with AVX2 and FMA"),
    pytest.mark.skipif(QEMU is None, reason="needs Debian's qemu-user: apt-get install qemu-user"),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Path:
    """A small project."""
    base = tmp_path_factory.mktemp("emulated")
    policy = write_pythia(base / "policy", None, hidden_size=64, vocabulary=257)
    return write_project(base, policy, bert, "portable").root


@pytest.fixture(scope="module")
def native(emulated: Path) -> dict[str, str]:
    return run("stages", emulated, None)


@pytest.mark.parametrize("cpu", CPUS)
def test_every_file_of_a_run_is_the_same_under_another_cpu(emulated: Path, native: dict[str, str], cpu: str) -> None:
    there = run("stages", emulated, cpu)
    assert native.keys() == there.keys()
    assert [name for name in native if native[name] != there[name]] == []
    assert {"full: data/policy/model.safetensors", "adapters: reports/page/report.html"} <= native.keys()
