"""Fixtures that several test files share: a hub on loopback, what it serves, and a copy of the project to run in."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests import faults, repositories
from tests.forks import Forks
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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files with slow tests first: of several processes none is left with them when the other has nothing more to do.
    Exhaustive tests run only where -m names them."""
    if "exhaustive" not in config.option.markexpr:
        left_out = pytest.mark.skip(reason="exhaustive: `make test-all` runs it, or pytest -m exhaustive")
        for item in items:
            if item.get_closest_marker("exhaustive"):
                item.add_marker(left_out)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands its counts to the process that started it."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["faults"] = [dict(faults.injected), dict(faults.survived)]
    elif faults.FULL and faults.injected:
        faults.save()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for counter, counts in zip((faults.injected, faults.survived), node.workeroutput["faults"], strict=True):
        counter.update(counts)


@pytest.fixture
def hub() -> Iterator[Hub]:
    """An empty hub on loopback; `add` gives it repositories."""
    server = Hub()
    yield server
    server.close()


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

    def run(self, stage: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *module_of(stage), *arguments],
            cwd=self.root, env={**self.environment, **environment}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip

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


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return copy_of_project(tmp_path)


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
    nowhere = "http://127.0.0.1:9"  # nothing listens here: a stage that asks the hub unbidden fails at once
    return Project(root, {**kept, "HF_HOME": str(base / "hf"), "HF_ENDPOINT": nowhere})


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    server = Forks(tmp_path_factory.mktemp("forks"))
    yield server
    server.close()


@pytest.fixture
def torch_as_before() -> Iterator[None]:
    """For stages that run in this process: they set torch's threads and determinism."""
    import torch

    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def real_texts() -> dict[str, list[str]]:
    """The real English texts of OASST1, in the dataset's order."""
    if not (SHARED / "oasst1").is_dir():
        pytest.skip(f"the real OASST1 texts are not in {SHARED / 'oasst1'}")
    folder = SHARED / "oasst1"
    return {split: repositories.read_texts(folder / f"{split}-en.jsonl.gz") for split in ("train", "validation")}


@pytest.fixture(scope="session")
def oasst1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OASST1 as the hub stores it: of the real texts where they are there, else of a small stand-in."""
    folder = SHARED / "oasst1"
    texts = repositories.STAND_IN
    if folder.is_dir():
        texts = {split: repositories.read_texts(folder / f"{split}-en.jsonl.gz") for split in texts}
    return repositories.write_oasst1(tmp_path_factory.mktemp("datasets") / "oasst1", texts)


@pytest.fixture(scope="session")
def pythia_tokenizer() -> Path | None:
    path = SHARED / "pythia" / "tokenizer.json"
    return path if path.is_file() else None


@pytest.fixture(scope="session")
def pythia(tmp_path_factory: pytest.TempPathFactory, pythia_tokenizer: Path | None) -> Path:
    """A checkpoint of Pythia's architecture and vocabulary, small, with safetensors."""
    return repositories.write_pythia(tmp_path_factory.mktemp("models") / "pythia", pythia_tokenizer)


@pytest.fixture(scope="session")
def pythia_pickled(tmp_path_factory: pytest.TempPathFactory, pythia_tokenizer: Path | None) -> Path:
    """The same checkpoint with nothing but pytorch_model.bin."""
    return repositories.write_pythia(tmp_path_factory.mktemp("models") / "pickled", pythia_tokenizer, pickled=True)


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny sentence encoder."""
    return repositories.write_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Project:
    """A project whose stages take seconds (see tests/small.py)."""
    from tests.small import make  # which needs this file

    policy = repositories.write_pythia(tmp_path_factory.mktemp("models") / "small", None, vocabulary=257)
    return make(tmp_path_factory.mktemp("small"), policy, bert)


@pytest.fixture(scope="session")
def small_run(small: Project, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What all its stages wrote, by name, and the audit events of each."""
    from tests.small import run_audited

    return run_audited(small, tmp_path_factory.mktemp("audit"))
