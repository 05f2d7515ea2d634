"""CONTRIBUTING.md's examples are whole changes: applied to a copy, they pass their own tests and touch as many files as
it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.project import CHECKOUT, ROOT, copy_checkout

EXAMPLES = re.findall(
    r"^### (.*?): (\d) files\n(.*?)^```diff\n(.*?)^```$",
    (ROOT / "CONTRIBUTING.md").read_text(),
    re.DOTALL | re.MULTILINE,
)
MOST = {"A baseline": 3, "A KL estimator": 3, "A kind of reward": 4, "A metric of training": 3, "A key of a recipe": 3,
        "A stage": 6}  # fmt: skip


def apply(diff: str, copy: Path, *options: str) -> None:
    subprocess.run(["git", "apply", "--whitespace=nowarn", *options], cwd=copy, input=diff, text=True, check=True)


@pytest.mark.slow
def test_the_examples_are_whole_changes(tmp_path: Path) -> None:
    """Each applies by itself; then all of them at once, so that pytest starts once for their tests."""
    assert [title for title, *_ in EXAMPLES] == list(MOST)
    copy = tmp_path / "copy"
    copy_checkout(copy, *CHECKOUT)
    for title, count, _, diff in EXAMPLES:
        assert len(set(re.findall(r"^\+\+\+ b/(.*)$", diff, re.MULTILINE))) == int(count) <= MOST[title]
        apply(diff, copy, "--check")
    for *_, diff in EXAMPLES:
        apply(diff, copy)
    commands = [re.findall(r"`pytest (\S+) -k (\w+)`", text) for _, _, text, _ in EXAMPLES]
    files, words = zip(*(command for (command,) in commands), strict=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-n", "0", "-p", "no:cacheprovider", *files, "-k", " or ".join(words)],
        cwd=copy, env={**os.environ, "PYTHONPATH": str(copy)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    for file, word in zip(files, words, strict=True):
        assert re.search(rf"^{file}::\w*{word}\S* PASSED", done.stdout, re.MULTILINE), word
