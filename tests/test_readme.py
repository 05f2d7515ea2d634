"""Every command of the README and of the pages for its readers runs, but for NOT_RUN."""

import os
import re
import shlex
import shutil
import subprocess

import pytest

from tests.clones import Clone
from tests.project import ROOT

BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = [ROOT / "README.md", ROOT / "docs/EXPERIMENTS.md", ROOT / "docs/RECOVERY.md"]
# minutes and more, or the hub; other tests run the first six
NOT_RUN = (
    "make repro",
    "make cure",
    "make sweep",
    "reinforce tune",
    "make ui",
    "dvc repro --single-item --force train",
    "dvc exp run -S model=pythia-70m",
)


def commands(text: str) -> list[str]:
    """Commands of the bash blocks, without their comments."""
    lines = [line for block in BLOCK.findall(text) for line in block.splitlines() if line.strip()]
    return [re.split(r"\s+# ", line)[0].strip() for line in lines]


def test_links_of_the_readme_and_docs_lead_somewhere() -> None:
    for page in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "data/pocket").glob("**/*.md"),
    ]:
        for target in re.findall(
            r"\]\((?!https?:|#)([^)#]+)", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        ):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_make_alone_prints_the_targets() -> None:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
    said = subprocess.run(["make"], cwd=ROOT, env=outside, capture_output=True, text=True, check=True).stdout
    targets = ["help", "repro", "cure", "sweep", "test", "test-all", "test-faults", "unit", "audit", "ui", "bench",
               "clean"]  # fmt: skip
    assert [line.split()[0] for line in said.splitlines()] == targets


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_commands_run(tmp_path_factory: pytest.TempPathFactory) -> None:
    clone = Clone(tmp_path_factory.mktemp("readme") / "project", tmp_path_factory.mktemp("cache"), steps=2)
    clone.keep_rewards("words", "length", "embedding")
    clone("dvc", "repro", "cache")
    shutil.copy(ROOT / "tests/logs/grpo-healthy/trainer_state.json", clone.root)  # of somebody's run
    clone.commit()
    found = [command for page in PAGES for command in commands(page.read_text(encoding="utf-8"))]
    for named in NOT_RUN:
        assert any(command.startswith(named) for command in found), named
    run = [command for command in found if not command.startswith(NOT_RUN)]
    assert len(run) >= 8
    for command in run:
        out = clone(*shlex.split(command))
        if command.startswith("dvc exp show"):
            columns = {
                "Experiment",
                "reward",
                "recipe",
                "seed",
                "recipes.stable.lr",
                "recipes.stable.baseline",
                "verdict",
            }
            assert columns <= set(re.findall(r"[\w.]+", out))
            assert re.search(r"\w+-\w+", out), "the names of the experiments"
