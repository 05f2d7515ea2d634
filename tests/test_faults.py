"""The count of faults, and that its page shows what was counted."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tests import faults
from tests.project import ROOT


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(faults, "injected", Counter())
    monkeypatch.setattr(faults, "survived", Counter())
    monkeypatch.setattr(faults, "COUNTS", tmp_path / "reliability.json")
    return tmp_path / "reliability.json"


def test_a_fault_whose_check_fails_is_lost(empty: Path) -> None:
    empty.write_text(json.dumps({"kill": {"injected": 9, "survived": 9}, "disk": {"injected": 2, "survived": 2}}))
    with faults.fault("kill"):
        pass
    with pytest.raises(AssertionError), faults.fault("kill"):
        raise AssertionError
    faults.save()
    assert faults.table().splitlines()[2:] == [
        "| disk | 2 | 2 | 0 |",
        "| kill | 2 | 1 | 1 |",
        "| **all** | 4 | 3 | 1 |",
    ]


def test_the_page_shows_the_counts() -> None:
    page = (ROOT / "docs/RELIABILITY.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in faults.table().splitlines() if line not in page] == []
