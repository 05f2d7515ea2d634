"""Portable arithmetic: each operation gives the same bytes under each emulated CPU; native arithmetic does not."""

from collections.abc import Callable
from pathlib import Path

from tests.emulation import CPUS, MARKS, run

pytestmark = MARKS


def test_each_operation_is_the_same_under_every_cpu(emulated: Callable[[str], Path]) -> None:
    """By name, so that a difference says which one."""
    folder = emulated("portable")
    here = run("operations", folder, None)
    for cpu in CPUS:
        there = run("operations", folder, cpu)
        assert [name for name in here if here[name] != there[name]] == [], cpu


def test_native_operations_differ_between_cpus(emulated: Callable[[str], Path]) -> None:
    """So the test above can fail: two makers of CPUs, two sets of bytes."""
    folder = emulated("native")
    intel, amd = (run("operations", folder, cpu) for cpu in CPUS[:2])
    assert {"gradient", "attention", "sqrt"} <= {name for name in intel if intel[name] != amd[name]}
