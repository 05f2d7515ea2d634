"""Every causal family that transformers ships: `cache` finds it exact, in which layout, or refuses it in one line."""

import re
from pathlib import Path

import pytest

from tests import families
from tests.project import ROOT

TABLE = ROOT / "docs/MODELS.md"
ROW = re.compile(
    r"^\| `([\w-]+)` \| (exact|exact, slower|exact, much slower|refused|not tried) \| (.*) \|$", re.MULTILINE
)


def table() -> dict[str, tuple[str, str]]:
    """family -> (result, why) as docs/MODELS.md has them."""
    return {family: (result, why) for family, result, why in ROW.findall(TABLE.read_text(encoding="utf-8"))}


def test_the_table_names_every_family() -> None:
    assert sorted(table()) == families.families()
    assert {family for family, (result, _) in table().items() if result == "not tried"} == families.NOT_BUILT.keys()


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")  # of transformers' own, on building some of them
@pytest.mark.parametrize("family", sorted(set(families.families()) - families.NOT_BUILT.keys()))
def test_a_family_is_exact_or_refused(family: str, tmp_path: Path, bert: Path) -> None:
    """Anything but a UserError, or one of several lines, fails. What comes out is what the table says."""
    result, _ = families.try_cache(family, tmp_path, bert)
    assert result == table()[family][0]
    assert (tmp_path / "data/checkpoint").exists() == (result != "refused")


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "changes", [{"train.gradient_checkpointing": True}, {"train.lora_rank": 2}], ids=["again", "lora"]
)
@pytest.mark.parametrize(
    "family", ["gpt2", "gpt_neox", "llama", "opt", "qwen3", "gemma2", "mixtral", "bloom", "mamba", "roberta", "lfm2"]
)
def test_memory_settings_change_no_number(family: str, changes: dict[str, int], tmp_path: Path, bert: Path) -> None:
    result, said = families.try_cache(family, tmp_path, bert, **changes)
    if family == "mamba" and changes.get("train.lora_rank"):
        assert result == "refused"  # by peft: the fused kernel of a mixer passes by its output's adapter
        assert "incompatible with Mamba" in said
    else:
        assert result == table()[family][0]
