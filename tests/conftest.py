"""Fixtures that several test files share."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from pipeline.arithmetic.environment import choose_kernels
from tests import faults, repositories
from tests.browser import CHROMIUM, FLAGS
from tests.clones import finish_tiny, prepare_tiny
from tests.forks import Forks, keeping_imports, start_server
from tests.hub import Hub
from tests.project import SHARED, Project, copy_of_project

if "ATEN_CPU_CAPABILITY" not in os.environ:  # `make test-all` has the numeric tests run with the kernels of other CPUs
    choose_kernels()  # before a test loads torch: stages that run in this process ask for it


def leaves_out_exhaustive(config: pytest.Config) -> bool:
    return "exhaustive" not in config.option.markexpr and not faults.FULL


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if leaves_out_exhaustive(config):
        terminalreporter.write_line("exhaustive tests were left out: `make test-all` or pytest -m exhaustive runs them")


def pytest_sessionstart(session: pytest.Session) -> None:
    """One for all processes of pytest-xdist, which imports while they collect; a single one starts it when it is
    needed."""
    if getattr(session.config.option, "numprocesses", None) and not hasattr(session.config, "workerinput"):
        start_server()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """To look for garbage in what test modules import took half the time of collecting, and later the time of many
    tests."""
    with keeping_imports():
        return (yield)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files with slow tests first: of several processes none is left with them when the other has nothing more to do.
    Exhaustive tests run only where they are asked for."""
    if leaves_out_exhaustive(config):
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]
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


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return copy_of_project(tmp_path)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `clones.tiny` copies, made once for all processes of pytest-xdist."""
    return made_once(tmp_path_factory, "prepared", prepare_tiny)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    """The same with a whole run that collapses."""
    return made_once(tmp_path_factory, "finished", lambda base: finish_tiny(base, prepared))


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    with FileLock(shared / f"{name}.lock"):
        if not (shared / name).exists():
            make(shared / "unfinished" / name)
            (shared / "unfinished" / name).rename(shared / name)
    return shared / name


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Forks:
    return Forks(tmp_path_factory.mktemp("forks"))


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
    from tests.small import make

    policy = repositories.write_pythia(tmp_path_factory.mktemp("models") / "small", None, vocabulary=257)
    return make(tmp_path_factory.mktemp("small"), policy, bert)


@pytest.fixture(scope="session")
def small_run(small: Project, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What all its stages wrote, by name, and the audit events of each."""
    from tests.small import run_audited

    return run_audited(small, tmp_path_factory.mktemp("audit"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Path:
    """What `cache` leaves, of a tiny policy and a tiny encoder. With Pythia's vocabulary a run would take twice as
    long."""
    from tests.training import with_encoder

    folder = tmp_path_factory.mktemp("cached") / "checkpoint"
    return with_encoder(repositories.write_pythia(folder / "policy", None, vocabulary=257), bert)


@pytest.fixture(scope="session")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory, pythia: Path, bert: Path) -> Path:
    """The same with Pythia's vocabulary: states of 20 MB, which take some time to write."""
    from tests.training import with_encoder

    folder = tmp_path_factory.mktemp("cached") / "checkpoint"
    return with_encoder(shutil.copytree(pythia, folder / "policy"), bert)


@pytest.fixture
def ready(project: Project, checkpoint: Path) -> Project:
    """A project in which `train` can run, for 6 quick steps with the length reward."""
    from tests.training import make_ready

    return make_ready(project, checkpoint)


@pytest.fixture
def here(ready: Project, monkeypatch: pytest.MonkeyPatch, torch_as_before: None) -> Project:
    """`ready` as the current directory, for stages that run in this process: quicker, where a process adds nothing."""
    ready.enter(monkeypatch)
    return ready


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Callable[[str], Path]:
    """Makes a small project with an arithmetic (see tests/emulation.py)."""
    from tests.emulation import write_project

    base = tmp_path_factory.mktemp("emulated")
    policy = repositories.write_pythia(base / "policy", None, hidden_size=64, vocabulary=257)
    return lambda arithmetic: write_project(base / arithmetic, policy, bert, arithmetic).root


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without experiments: its fifty migrations take seconds."""
    from pipeline.tracking import mlflow_store

    def make(base: Path) -> None:
        base.mkdir(parents=True)
        mlflow_store._prepare_database(base / "mlflow.db")

    return made_once(tmp_path_factory, "store", make) / "mlflow.db"


@pytest.fixture
def tracking_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> Path:
    """The current directory: empty but for a store without experiments."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, tmp_path)
    for name in ("DVC_ROOT", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DVC_STAGE", "track")
    for name in ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.setenv(name, "1")
    return tmp_path


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()
