"""Portable arithmetic: every file of a run is the same under each type of CPU, emulated."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.emulation import CPUS, MARKS, run

pytestmark = MARKS


@pytest.fixture(scope="module")
def portable(emulated: Callable[[str], Path]) -> Path:
    return emulated("portable")


@pytest.fixture(scope="module")
def native(portable: Path) -> dict[str, str]:
    """Of this machine's own CPU."""
    return run("stages", portable, None)


@pytest.mark.parametrize("cpu", CPUS)
def test_every_file_of_a_run_is_the_same_under_another_cpu(portable: Path, native: dict[str, str], cpu: str) -> None:
    there = run("stages", portable, cpu)
    assert native.keys() == there.keys()
    assert [name for name in native if native[name] != there[name]] == []
    assert {"full: data/policy/model.safetensors", "adapters: reports/page/report.html"} <= native.keys()
