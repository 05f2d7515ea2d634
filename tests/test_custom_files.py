"""Which files of custom/ a run depends on: those that the selected reward uses, and no others."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.schema import CustomReward, LengthReward, SumReward
from pipeline.rewards.custom_files import custom_digests
from tests.project import Project


def custom(file: str) -> CustomReward:
    return CustomReward(kind="custom", function=f"custom/{file}:reward")


def used(*rewards: Any) -> list[str]:
    return [path.removeprefix("custom/") for path in custom_digests(rewards)]


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """custom/ with a reward for each way to import, and helpers that import further ones."""
    monkeypatch.chdir(tmp_path)
    texts = {
        "plain.py": "import re\nre.compile('a')\n",
        "absolute.py": "from custom.helper import x\n",
        "module.py": "def f():\n    import custom.pack.part as p\n",
        "name.py": "from custom import helper\n",
        "beside.py": "import helper\n",
        "sub/below.py": "import near\nfrom ..other import y\n",
        "sub/near.py": "",
        "helper.py": "from custom import other\n",
        "other.py": "",
        "pack/__init__.py": "",
        "pack/part.py": "",
        "dynamic.py": "import importlib\n",
        "run.py": "exec('1')\n",
        "reads.py": "open('custom/other.py')\n",
        "spoiled.py": "def (:\n",
    }
    for name, text in texts.items():
        path = tmp_path / "custom" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "custom"


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("plain.py", ["plain.py"]),
        ("absolute.py", ["absolute.py", "helper.py", "other.py"]),
        ("module.py", ["module.py", "pack/__init__.py", "pack/part.py"]),
        ("name.py", ["helper.py", "name.py", "other.py"]),
        ("beside.py", ["beside.py", "helper.py", "other.py"]),
        ("sub/below.py", ["other.py", "sub/below.py", "sub/near.py"]),
    ],
)
def test_a_reward_depends_on_what_it_imports(file: str, expected: list[str]) -> None:
    assert used(custom(file)) == expected


@pytest.mark.parametrize("file", ["dynamic.py", "run.py", "reads.py", "spoiled.py"])
def test_where_the_text_does_not_tell_all_files_count(file: str, files: Path) -> None:
    assert len(used(custom(file))) == len(list(files.rglob("*.py")))


def test_rewards_of_the_project_depend_on_none_and_a_sum_on_its_terms(files: Path) -> None:
    length = LengthReward(kind="length", target=3)
    assert used(length) == []
    terms = [{"weight": 1.0, "reward": length}, {"weight": 2.0, "reward": custom("plain.py")}]
    assert used(SumReward(kind="sum", terms=terms)) == ["plain.py"]


def test_a_file_that_is_not_python_s_counts_for_each_custom_reward(files: Path) -> None:
    (files / "words.txt").write_text("a")
    (files / "__pycache__").mkdir()
    (files / "__pycache__/plain.pyc").write_text("a")
    before = custom_digests([custom("plain.py")])
    assert list(before) == ["custom/plain.py", "custom/words.txt"]
    (files / "words.txt").write_text("b")
    assert custom_digests([custom("plain.py")]) != before


def test_an_unused_file_changes_no_dependency(project: Project) -> None:
    def outputs() -> list[bytes]:
        assert project.run("check").returncode == 0
        return [(project.root / f"reports/custom/{name}.json").read_bytes() for name in ("selected", "all")]

    before = outputs()
    (project.root / "custom/second.py").write_text("def reward(prompts, completions): return [0.0] * len(prompts)\n")
    assert outputs() == before
    project.edit(rewards__second={"kind": "custom", "function": "custom/second.py:reward"})
    selected, every = outputs()
    assert selected == before[0]
    assert every != before[1]
    project.edit(reward="second")
    assert outputs()[0] != before[0]
