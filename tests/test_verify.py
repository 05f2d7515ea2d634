"""`reinforce verify`: the same bytes, another type of CPU, or another result."""

import json
import math
from pathlib import Path

import pytest

from pipeline.commands.verify import Difference, first_difference, is_alike
from tests.clones import Clone

ROWS = [{"step": float(step), "reward_mean": -5.0 + step, "entropy": 3.0, "undefined": math.nan} for step in range(10)]


def changed(step: int, **values: float) -> list[dict[str, float]]:
    return [row | (values if number >= step else {}) for number, row in enumerate(ROWS)]


def test_the_first_difference_is_named() -> None:
    assert first_difference(ROWS, [dict(row) for row in ROWS]) is None
    found = first_difference(ROWS, changed(3, entropy=3.0000000000000004))
    assert found == Difference(3, "entropy", 3.0, 3.0000000000000004)
    assert str(found) == "from step 3, column entropy: 3.0 committed, 3.0000000000000004 here"
    assert first_difference(ROWS, ROWS[:4]).step == 4  # type: ignore[union-attr]
    assert first_difference(ROWS, changed(0, more=1.0)).column == "more"  # type: ignore[union-attr]
    assert first_difference([{"a": math.nan}], [{"b": math.nan}]).column == "a"  # type: ignore[union-attr]
    assert first_difference([{"a": 0.0}], [{"a": -0.0}]) is not None


def test_other_rounding_is_told_from_another_result() -> None:
    def alike(rows: list[dict[str, float]]) -> bool:
        return is_alike(ROWS, rows, margin=0.5)

    assert alike(changed(0, entropy=3.0001))
    assert alike(changed(1, entropy=2.5)), "later steps go their own way"
    assert not alike(changed(0, entropy=3.01)), "the first step is not the same"
    assert alike([row | {"reward_mean": row["reward_mean"] + 0.4 * (step > 0)} for step, row in enumerate(ROWS)])
    assert not alike([row | {"reward_mean": row["reward_mean"] + 0.6 * (step > 0)} for step, row in enumerate(ROWS)])
    assert not alike(ROWS[:9])
    assert not alike([row | {"undefined": 1.0} for row in ROWS])


@pytest.mark.slow
@pytest.mark.exhaustive
def test_verify_runs_the_commit_and_compares_every_file(tmp_path: Path) -> None:
    clone = Clone(tmp_path / "project", tmp_path / "cache", steps=2)
    clone.keep_rewards("length")
    clone("dvc", "repro")
    diagnosis = clone.root / "reports/diagnosis.json"
    diagnosis.write_text(json.dumps(json.loads(diagnosis.read_text()) | {"headline": "all is well"}))
    clone.commit()
    said = clone("reinforce", "verify", fails=True)
    assert (
        "error: another result: the training is the same to the byte, and these differ: reports/diagnosis.json" in said
    )
    clone("dvc", "repro", "--force", "--single-item", "diagnose")
    clone.commit()
    history = clone.root / "reports/train/history.csv"
    history.unlink()  # the workspace has no say, and stays as it is
    assert "these are the committed bytes" in clone("reinforce", "verify")
    assert not history.exists()
