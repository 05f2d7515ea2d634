"""Every command of the README runs, those marked `long` or `hub` excepted."""

import os
import re
import shlex
import subprocess

import pytest

from tests.clones import Clone
from tests.conftest import ROOT

BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Commands of the bash blocks that are not marked in their comment."""
    lines = [line for block in BLOCK.findall(text) for line in block.splitlines() if line.strip()]
    pairs = [(line.partition("  #")[0].strip(), line.partition("  #")[2]) for line in lines]
    return [command for command, comment in pairs if not re.search(r"\b(long|hub)\b", comment)]


def test_marked_commands_are_left_out_and_others_are_not() -> None:
    text = "```bash\nmake repro    # long: all\ndvc repro   # a longish word\n```\n```\nnot bash\n```\n"
    assert commands(text) == ["dvc repro"]


def test_links_of_the_readme_and_docs_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "data/pocket").glob("**/*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_make_alone_prints_the_targets() -> None:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
    said = subprocess.run(["make"], cwd=ROOT, env=outside, capture_output=True, text=True, check=True).stdout
    targets = ["help", "repro", "cure", "sweep", "test", "test-all", "test-faults", "unit", "audit", "ui", "bench",
               "clean"]  # fmt: skip
    assert [line.split()[0] for line in said.splitlines()] == targets


@pytest.mark.slow
def test_the_commands_run(tmp_path_factory: pytest.TempPathFactory) -> None:
    clone = Clone(tmp_path_factory.mktemp("readme") / "project", tmp_path_factory.mktemp("cache"), steps=2)
    clone.keep_rewards("words", "length")
    clone("dvc", "repro", "cache")
    clone.commit()
    found = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(found) >= 6
    for command in found:
        clone(*shlex.split(command))
