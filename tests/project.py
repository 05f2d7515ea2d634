"""A copy of the project to run in, and what tests need to know of the project itself."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.fork_client import NOWHERE, can_fork
from tests.forks import Recorded
from tests.hub import Hub

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"  # the real OASST1 texts and Pythia's tokenizer, where someone put them
PINNED = "fdf72ae0827c1cda404aff25b6603abec9e3399b"  # of OASST1, in params.yaml
PYTHIA = "EleutherAI/pythia-70m-deduped"
# what the tests themselves need of the project
CHECKOUT = (
    "pipeline",
    "tests",
    "docs",
    "benchmarks",
    "custom",
    "data/pocket",
    "params.yaml",
    "dvc.yaml",
    "pyproject.toml",
)


@dataclass
class Project:
    """A copy of the project in a temporary directory, with a Hugging Face cache of its own and no network."""

    root: Path
    environment: dict[str, str]

    def edit(self, **changes: Any) -> None:
        """Sets keys of params.yaml: dots in a name are written as two underscores."""
        yaml = YAML()
        tree = yaml.load(self.root / "params.yaml")
        for name, value in changes.items():
            *tables, key = name.split("__")
            table = tree
            for part in tables:
                table = table.setdefault(part, {})
            table[key] = value
        yaml.dump(tree, self.root / "params.yaml")

    def keep_rewards(self, *names: str) -> None:
        """Drops the other rewards: `evaluate` measures all there are, and the embedding takes its time."""
        yaml = YAML()
        tree = yaml.load(self.root / "params.yaml")
        for name in set(tree["rewards"]) - set(names):
            del tree["rewards"][name]
        yaml.dump(tree, self.root / "params.yaml")

    def use(self, hub: Hub) -> None:
        self.environment["HF_ENDPOINT"] = hub.url

    def enter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Makes it the current directory, for stages that run in this process, without MLflow."""
        monkeypatch.chdir(self.root)
        monkeypatch.setitem(sys.modules, "mlflow", None)
        monkeypatch.delenv("DVC_ROOT", raising=False)

    def run(self, stage: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """A stage or command: with these variables in a new process, else forked off one that has imported all."""
        command = [*module_of(stage), *arguments]
        if environment or not can_fork(self.environment):
            return subprocess.run(
                [sys.executable, "-m", *command],
                cwd=self.root, env={**self.environment, **environment}, capture_output=True, text=True, timeout=900,
            )  # fmt: skip
        with TemporaryDirectory() as folder:
            output, errors = Path(folder, "output"), Path(folder, "errors")
            code = Recorded(command, self.root, self.environment, output, errors).wait()
            said = (file.read_text(encoding="utf-8") for file in (output, errors))
            return subprocess.CompletedProcess(command, code, *said)

    def refuse(self, stage: str, **environment: str) -> str:
        """Runs a stage that must fail as a user's mistake does: exit code 1, one line, no traceback. Gives the line."""
        result = self.run(stage, **environment)
        assert result.returncode == 1, result.stderr
        assert "Traceback" not in result.stderr
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, result.stderr
        assert result.stderr.rstrip().endswith(errors[0])
        return errors[0]


def module_of(name: str) -> list[str]:
    """What stands behind `python -m` for a stage or a command."""
    if (ROOT / f"pipeline/commands/{name}.py").exists():
        return ["pipeline", name]
    return [f"pipeline.stages.{name}"]


def copy_checkout(target: Path, *names: str) -> None:
    """Copies files and folders of the project, without what Python and long benchmarks leave there."""

    def ignored(folder: str, entries: list[str]) -> set[str]:
        runs = {"runs"} if Path(folder) == ROOT / "benchmarks" else set()  # pipeline/runs is a package
        return runs | set(shutil.ignore_patterns("__pycache__", "make-state*")(folder, entries))

    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=ignored)
        else:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


def copy_of_project(base: Path) -> Project:
    root = base / "project"
    copy_checkout(root, "pipeline", "custom", "data/pocket", "params.yaml", "dvc.yaml")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_", "DVC_"))}
    return Project(root, {**kept, "HF_HOME": str(base / "hf"), "HF_ENDPOINT": NOWHERE})
