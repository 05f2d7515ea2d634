"""Portable arithmetic: each operation gives the same bytes under each emulated CPU; native arithmetic does not."""

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
def emulated(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> dict[str, Path]:
    """A small project for each arithmetic."""
    base = tmp_path_factory.mktemp("emulated")
    policy = write_pythia(base / "policy", None, hidden_size=64, vocabulary=257)
    return {name: write_project(base / name, policy, bert, name).root for name in ("portable", "native")}


def test_each_operation_is_the_same_under_every_cpu(emulated: dict[str, Path]) -> None:
    """By name, so that a difference says which one."""
    here = run("operations", emulated["portable"], None)
    for cpu in CPUS:
        there = run("operations", emulated["portable"], cpu)
        assert [name for name in here if here[name] != there[name]] == [], cpu


def test_native_operations_differ_between_cpus(emulated: dict[str, Path]) -> None:
    """So the test above can fail: two makers of CPUs, two sets of bytes."""
    intel, amd = (run("operations", emulated["native"], cpu) for cpu in CPUS[:2])
    assert {"gradient", "attention", "sqrt"} <= {name for name in intel if intel[name] != amd[name]}
