"""The memory of a training step: the simulation counts what is there, and the formula of docs/SCALE.md agrees."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import material, memory
from benchmarks.memory_formula import Step, packed, predicted, sizes
from benchmarks.simulated_memory import BLOCK, Device, simulate
from pipeline.models.adapters import add_lora

ROOT = Path(__file__).resolve().parents[1]
NEAR = 0.04  # the formula against the simulation
HALF = {"precision": "bfloat16"}
UPDATE = Step((6, 9), 8, 8, 8)
CASES: dict[str, tuple[dict[str, Any], Step, bool]] = {
    "float32": ({}, UPDATE, True),
    "bfloat16": (HALF, UPDATE, True),
    "checkpointing, gradient descent": (HALF | {"gradient_checkpointing": True, "optimizer": "sgd"}, UPDATE, True),
    "adapters on a CPU": (HALF | {"lora_rank": 16}, UPDATE, False),
    "many samples": (HALF | {"lora_rank": 16, "gradient_checkpointing": True}, Step((30, 30), 32, 3, 16), True),
}


@pytest.mark.parametrize("case", CASES)
def test_the_formula_is_near_the_simulation(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each phase, of a policy so small that no part hides behind the weights."""
    monkeypatch.setitem(material.SHAPES, "small", (128, 2, 4))
    monkeypatch.setattr(material, "VOCABULARY", 2560)
    settings, step, gpu = CASES[case]
    found = simulate("small", settings, step, gpu)
    assert predicted("small", settings, step, gpu=gpu) == pytest.approx(
        {phase: found[phase] for phase in ("held", "sampling", "update", "all")}, rel=NEAR
    )
    assert (found["all"] == found["sampling"]) == (case == "many samples")


def test_the_device_counts_what_is_there_by_hand() -> None:
    """A view and a change in place take nothing, what is let go of is gone, and sizes are rounded up."""
    with Device() as device:
        with device.fake:
            first = torch.empty(BLOCK, dtype=torch.float32)
        second = first * 2
        second.view(2, -1).add_(1)
        assert (device.held, device.peak) == (8 * BLOCK, 8 * BLOCK)
        del first
        third = second[:1] + 1
        assert (device.held, device.peak) == (5 * BLOCK, 8 * BLOCK)
        del second, third
        assert device.held == 0


def test_rows_of_a_micro_batch_by_hand() -> None:
    """Rows have 64 tokens at most: a prompt of 8 and two completions of 19 that the model is given, 46. Each of the 32
    rows predicts 2 x 19 tokens after a completion's, and the first of both after the prompt."""
    found = packed(Step((8,) * 16, 8, 20, 64))
    assert (found.positions, found.width, found.predicted) == (32 * 46, 46, 32 * (2 * 19 + 1))


def test_the_formula_knows_pythia_s_sizes_and_its_page_shows_it() -> None:
    published = {
        "pythia-70m": 70_426_624,
        "pythia-160m": 162_322_944,
        "pythia-410m": 405_334_016,
        "pythia-2_8b": 2_775_208_960,
    }
    for shape, parameters in published.items():  # Biderman et al., arXiv 2304.01373, and the models' cards
        assert sizes(shape).all == parameters
    adapted = material.policy("pythia-14m")
    assert sizes("pythia-14m").all == sum(p.numel() for p in adapted.parameters())
    add_lora(adapted, memory.RANK, 1, torch.Generator())
    assert sizes("pythia-14m").adapters == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    page = (ROOT / "docs/SCALE.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in memory.tables().splitlines() if line not in page] == []


def test_the_page_s_tables_are_within_their_promise() -> None:
    """5%: the formula over the simulation, of every row on a GPU that there is."""
    rows = [row for row in memory.read_rows() if row.device == "gpu"]
    assert len(rows) >= 33
    for row in rows:
        formula = predicted(row.shape, memory.changes(row.setting), row.step)
        for phase, found in formula.items():
            assert found == pytest.approx(row.bytes[phase], rel=0.05), (row.shape, row.setting, phase)
