"""CONTRIBUTING.md's examples are whole changes: applied to a copy, they pass their own tests and touch as many files as it says."""

import os
import re
import shlex
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
MOST = {
    "A baseline": 3,
    "A KL estimator": 3,
    "A kind of reward": 4,
    "A metric of training": 3,
    "A key of a recipe": 3,
    "A stage": 6,
}


def test_each_extension_has_an_example() -> None:
    assert [title for title, *_ in EXAMPLES] == list(MOST)


@pytest.mark.slow
@pytest.mark.parametrize(("title", "count", "text", "diff"), EXAMPLES, ids=[title for title, *_ in EXAMPLES])
def test_an_example_is_a_whole_change(title: str, count: str, text: str, diff: str, tmp_path: Path) -> None:
    files = set(re.findall(r"^\+\+\+ b/(.*)$", diff, re.MULTILINE))
    assert len(files) == int(count) <= MOST[title]
    copy = tmp_path / "copy"
    copy_checkout(copy, *CHECKOUT)
    subprocess.run(["git", "apply", "--whitespace=nowarn", "-"], cwd=copy, input=diff, text=True, check=True)
    (command,) = re.findall(r"`pytest (.*?)`", text)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *shlex.split(command)],
        cwd=copy, env={**os.environ, "PYTHONPATH": str(copy)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert re.search(r"^\d+ passed", done.stdout, re.MULTILINE)
