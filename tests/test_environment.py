"""What a user's environment and another person's machine may hold: docs/ENVIRONMENT.md. Bytes: test_determinism.py."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import file_io
from pipeline.distributed import device
from pipeline.errors import UserError
from pipeline.runs import dvc_git
from pipeline.stages import check, train
from pipeline.tracking import mlflow_store
from tests.project import ROOT, copy_checkout


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_others_can_read_what_is_written(tmp_path: Path) -> None:
    """safetensors and a user's umask leave 0600; DVC commits a single file anew, so that `plot` lets others read
    again."""
    with file_io.atomic_folder(tmp_path / "deep/policy") as folder:
        (folder / "part").mkdir()
        (folder / "part/model.safetensors").touch(mode=0o600)
    file_io.write_text(tmp_path / "reports/report.html", "text")
    (tmp_path / "reports/run.json").touch(mode=0o600)
    file_io.make_all_readable(tmp_path / "reports")
    modes = {path.relative_to(tmp_path).as_posix(): oct(path.stat().st_mode)[-3:] for path in tmp_path.rglob("*")}
    assert modes == {
        "deep": "755", "deep/policy": "755", "deep/policy/part": "755", "deep/policy/part/model.safetensors": "644",
        "reports": "755", "reports/report.html": "644", "reports/run.json": "644",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("uri", "file"),
    [("", "mlflow.db"), ("sqlite:///mlflow.db?timeout=60", "mlflow.db"), ("sqlite:///a/b.db", "a/b.db"),
     ("sqlite+pysqlite:///p.db", "p.db"), ("sqlite:////elsewhere/m.db", "/elsewhere/m.db")],
)  # fmt: skip
@pytest.mark.parametrize("folder", ["plain", "my%20project", "a b", "a#b", "a?b", "ü"])
def test_options_are_no_part_of_a_store_s_file_and_paths_are_escaped(
    uri: str, file: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqlalchemy.engine import make_url

    (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / folder)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert mlflow_store.sqlite_file() == tmp_path / folder / file
    url = make_url(mlflow_store.store_uri())  # as mlflow reads it
    assert url.database == str(tmp_path / folder / file)
    assert dict(url.query) == ({"timeout": "60"} if "timeout" in uri else {})


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:", "sqlite:///x.db?timeout=abc"])
def test_a_store_that_keeps_nothing_is_refused(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI = "):
        mlflow_store.check_store()


def test_a_pool_is_refused_where_mlflow_has_no_such(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.store.db.utils import create_sqlalchemy_engine
    from sqlalchemy.exc import ArgumentError

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in mlflow_store.POOLS:
        monkeypatch.setenv("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", name)
        mlflow_store.check_store()
        create_sqlalchemy_engine("sqlite://")
    for name in ("Puddle", "Pool", "AsyncAdaptedQueuePool"):
        monkeypatch.setenv("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", name)
        with pytest.raises(UserError, match=f"MLFLOW_SQLALCHEMYSTORE_POOLCLASS = '{name}': should be one of"):
            mlflow_store.check_store()
        with pytest.raises((ValueError, ArgumentError), match=r"Invalid poolclass|cannot be used"):
            create_sqlalchemy_engine("sqlite://")


def test_mlflow_writes_at_once_whatever_the_user_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_ENABLE_ASYNC_LOGGING", "MLFLOW_TRUNCATE_LONG_VALUES", "MLFLOW_LOGGING_LEVEL", "NO_PROXY"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    mlflow_store.defaults(timeout=1, retries=0)
    assert os.environ["MLFLOW_ENABLE_ASYNC_LOGGING"] == "false"
    assert "MLFLOW_LOGGING_LEVEL" not in os.environ
    assert os.environ["NO_PROXY"] == "true,127.0.0.1"


def test_what_another_launcher_left_over(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*device.LAUNCHER, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert not device.is_launched()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not device.is_launched()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"WORLD_SIZE = 2, and MASTER_ADDR, MASTER_PORT is not set.*`unset RANK"):
        device.is_launched()
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match=r"WORLD_SIZE = 'two': should be a whole number"):
        device.is_launched()


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    launched = {"RANK": "5", "WORLD_SIZE": "6", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "LOCAL_RANK": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert device.own_gpu().index == 1
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"LOCAL_RANK = 2: each process needs a GPU .* torch sees 2 here; .* at most 2"):
        device.own_gpu()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert device.own_gpu().index == 0, "LOCAL_RANK is a leftover"


@pytest.mark.parametrize(
    ("name", "works"), [("plain", True), ("a b", True), ("a#b", False), ("a%20b", False), ("ü", False)]
)
def test_a_folder_in_which_dvc_loses_experiments(
    name: str, works: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository(tmp_path / name)
    monkeypatch.chdir(tmp_path / name)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    if works:
        dvc_git.check_folder()
    else:
        with pytest.raises(UserError, match="DVC cannot run --temp or --queue experiments below"):
            dvc_git.check_folder()


def test_an_experiment_that_dvc_would_lose_ends_in_its_first_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DVC 3.67 swallows that it cannot fetch into a shallow clone: `--temp` ends with 0 and no experiment is there."""
    repository(tmp_path / "whole")
    clone = ["git", "clone", "-q", "--depth", "1", (tmp_path / "whole").as_uri(), str(tmp_path / "shallow")]
    subprocess.run(clone, check=True)
    experiment = tmp_path / "shallow/.dvc/tmp/exps/standalone/x"  # as DVC makes it, and tells its stages
    experiment.mkdir(parents=True)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "shallow"))
    monkeypatch.setenv("DVC_EXP_NAME", "sour-lime")
    monkeypatch.chdir(experiment)
    for stage in (check, train):  # the first one's result may come from DVC's run cache
        with pytest.raises(UserError, match=r"shallow clone .*; `git fetch --unshallow` first"):
            stage.main()
    monkeypatch.chdir(tmp_path / "shallow")  # `dvc exp run` in the workspace is kept: only params.yaml is missing here
    with pytest.raises(UserError, match=r"params.yaml"):
        check.main()


def repository(folder: Path) -> None:
    """One of two commits: a clone of depth 1 lacks the first."""
    folder.mkdir()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "-q"], cwd=folder, check=True)
    for message in ("first", "second"):
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", message], cwd=folder, check=True)


def test_git_keeps_line_endings_whatever_autocrlf_says(tmp_path: Path) -> None:
    """A clone as Git for Windows makes it: the digests are those of the files here."""
    clone = ["git", "clone", "-q", "--depth", "1", "-c", "core.autocrlf=true", ROOT.as_uri(), str(tmp_path / "clone")]
    subprocess.run(clone, check=True)
    for name in ("pipeline/stages/train.py", "params.yaml", "data/pocket/prompts/train.jsonl"):
        assert b"\r" not in (tmp_path / "clone" / name).read_bytes()


def test_another_python_says_so_in_one_line(tmp_path: Path) -> None:
    """DVC starts `python`, the first in PATH; one without our packages would end in a traceback."""
    copy_checkout(tmp_path, "pipeline")
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-m", "pipeline.stages.check"], cwd=tmp_path, capture_output=True, text=True
    )  # -S: as an interpreter in which nothing is installed
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "is not the Python that the project is installed in: `source .venv/bin/activate`" in done.stderr


@pytest.mark.parametrize(
    ("variables", "says"),
    [({"PYTHONSAFEPATH": "1"}, "`unset PYTHONSAFEPATH`"), ({"PYTHONOPTIMIZE": "2"}, "`unset PYTHONOPTIMIZE`")],
)
def test_python_s_own_variables_are_named_where_they_are_in_the_way(
    variables: dict[str, str], says: str, tmp_path: Path
) -> None:
    """With PYTHONSAFEPATH the installed folder's code runs, whatever the folder of the experiment holds."""
    copy_checkout(tmp_path, "pipeline")
    installed = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-m", "pipeline.stages.check"]
    done = subprocess.run(command, cwd=tmp_path, env=installed, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: Python ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


def test_a_lock_of_dvc_s_that_a_full_disk_cut_off_is_deleted(tmp_path: Path) -> None:
    """README: every later command of DVC's is refused until .dvc/tmp/rwlock is gone."""

    def dvc(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=tmp_path, capture_output=True, text=True)

    assert dvc("init", "--no-scm").returncode == 0
    (tmp_path / "dvc.yaml").write_text("stages:\n  s:\n    cmd: echo\n")
    lock = tmp_path / ".dvc/tmp/rwlock"
    lock.parent.mkdir(exist_ok=True)
    lock.write_text('{"read": {"/a"')
    refused = dvc("repro")
    assert refused.returncode != 0
    assert "Unable to read RWLock-file" in refused.stderr
    lock.unlink()
    assert dvc("repro").returncode == 0
