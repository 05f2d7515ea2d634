"""The tracking store is away, slow, locked, damaged or of another version, and dies: training goes on as if nothing
were, and `track` afterwards makes the record complete, with nothing twice."""

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.stages import track
from pipeline.tracking import mlflow_store
from tests.clones import tiny
from tests.faults import fault, first, rounds
from tests.mlflow_runs import (
    STEPS,
    assert_complete,
    lose_database,
    make_reports,
    start_trainer,
    stored_runs,
    train_live,
)
from tests.proxy import Proxy
from tests.servers import MlflowServer

pytestmark = [pytest.mark.faults, pytest.mark.slow]
CLOSE_SECONDS = 4.0  # in the place of the follower's own 15, for the sake of time


@pytest.fixture(scope="module")
def server(tmp_path_factory, empty_store) -> Iterator[MlflowServer]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "mlflow.db").write_bytes(empty_store.read_bytes())
    made = MlflowServer(folder)
    made.start()
    yield made
    made.kill()


@pytest.fixture
def proxy(server, tracking_folder, monkeypatch) -> Iterator[Proxy]:
    """Between us and the real server; an experiment of its own for each test. We wait a second, not thirty."""
    if server.process is None:
        server.start()
    made = Proxy(server.port)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", made.url)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", tracking_folder.name)
    yield made
    made.close()


def follow_to_the_end(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The warnings of a follower whose store gives trouble, given all the time that it wants."""
    capsys.readouterr()  # what `track` has said of an earlier round
    train_live(STEPS, status="FINISHED")
    said = capsys.readouterr().err.splitlines()
    assert all(line.startswith("warning: MLflow: ") and line.endswith("completes the record") for line in said), said
    return said


def track_twice() -> None:
    """The record is complete, and running it again changes nothing."""
    make_reports()
    track.main()
    client, run = assert_complete()
    before = sorted(mlflow_store.logged_points(client, run))
    track.main()
    client, run = assert_complete()
    assert sorted(mlflow_store.logged_points(client, run)) == before
    assert {item.path for item in client.list_artifacts(run.info.run_id)} == {"figures", "tables", "report.html"}


def train_elsewhere(seconds: float = 0.0) -> list[str]:
    """The warnings of a training in a process of its own, as trainings are: what is not sent in time is lost. Each of
    its blocks takes `seconds`."""
    trainer = start_trainer("", seconds, CLOSE_SECONDS)
    said = trainer.communicate(timeout=300)[1].splitlines()
    assert trainer.returncode == 0, said
    assert all(line.startswith("warning: MLflow: ") and line.endswith("completes the record") for line in said), said
    return said


def track_refuses(advice: str) -> None:
    """In one line, in time, with nothing written."""
    make_reports()
    started = time.monotonic()
    with pytest.raises(UserError, match=r"reinforce track") as failure:
        track.main()
    assert advice in str(failure.value)
    assert "\n" not in str(failure.value)
    assert time.monotonic() - started < 100
    assert not Path("reports/track/track.json").exists()


# --- a real server, over HTTP --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", first(1, ["lost", "late", "reset", "500", "cut", "page"]))
def test_one_request_of_a_real_server_fails(proxy, monkeypatch, capsys, kind):
    """Whichever it is: the run is complete in the end, and there is one of it."""
    for number in range(rounds(3, 1)):
        with fault(f"one request to MLflow: {kind}"):
            monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", f"{kind}-{number}")
            proxy.fail(kind, first=3 + 3 * number, times=1)  # the fourth request makes the run
            follow_to_the_end(capsys)
            proxy.fail("")
            track_twice()


def test_one_request_of_track_fails(proxy, monkeypatch):
    """It may fail, and then says so; the next one makes the record complete."""
    make_reports()
    for number in range(rounds(6, 1)):
        with fault("one request of track to MLflow: lost"):
            monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", f"track-{number}")
            proxy.fail("lost", first=3 + 3 * number, times=1)
            with contextlib.suppress(UserError):
                track.main()
            proxy.fail("")
            track_twice()


@pytest.mark.parametrize(
    ("kind", "number"), first(1, [("reset", 12), ("reset", 0), ("late", 0), ("lost", 6), ("page", 0)])
)
def test_a_server_that_fails_until_the_end(proxy, kind, number):
    with fault(f"MLflow {'away from the start' if not number else 'gone during a run'}: {kind}"):
        proxy.fail(kind, first=number)
        assert train_elsewhere(seconds=1.0)
        track_refuses("127.0.0.1")
        proxy.fail("")
        track_twice()


@pytest.mark.exhaustive  # a server takes 20 s to be up
@pytest.mark.parametrize("back", ["during the run", "after the run"])
def test_a_server_that_is_killed(server, proxy, back):
    with fault(f"MLflow's server killed, back {back}"):

        def kills(step: int) -> None:
            if step == 5:
                assert stored_runs()[1][0].data.metrics
                server.kill()
            if step == 9 and back == "during the run":
                server.start()

        train_live(STEPS, flush_every=1, status="FINISHED", meanwhile=kills)
        if server.process is None:
            server.start()
        else:
            assert_complete()
        track_twice()


# --- SQLite --------------------------------------------------------------------------------------------------------


def test_a_database_that_another_process_holds(tracking_folder):
    for number in range(rounds(3, 1)):
        Path("reports/track/track.json").unlink(missing_ok=True)
        with (
            fault("MLflow's database locked by another process"),
            closing(sqlite3.connect("mlflow.db", isolation_level=None)) as other,
        ):
            other.execute("BEGIN EXCLUSIVE")
            train_elsewhere()
            if number:
                track_refuses("is locked; another process holds it: wait for it, or end it")
            other.execute("ROLLBACK")
            track_twice()
        for run in stored_runs()[1]:
            mlflow_store.open_store()[0].delete_run(run.info.run_id)


def test_a_database_held_for_a_moment(tracking_folder, capsys):
    with fault("MLflow's database locked for three seconds"):
        other = sqlite3.connect("mlflow.db", isolation_level=None, check_same_thread=False)
        other.execute("BEGIN EXCLUSIVE")
        threading.Timer(3, other.close).start()
        train_live(STEPS, status="FINISHED")
        assert capsys.readouterr().err == ""
        assert_complete()


def _alembic(statement: str, *more: str) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        with closing(sqlite3.connect(path)) as store, store:
            for sql in (statement, *more):
                store.execute(sql)

    return spoil


def _from(offset: int) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[:offset] + b"\xa5" * (len(content) - offset))

    return spoil


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


SPOILT = {
    "MLflow's database damaged after its header": (_from(4096), "move the file away and it is made anew"),
    "MLflow's database of a newer version": (
        _alembic("update alembic_version set version_num = 'ffffffffffff'"),
        "mlflow.db` helps an older store; move one of a newer MLflow away",
    ),
    "MLflow's database overwritten": (_from(0), "move the file away and it is made anew"),
    "MLflow's database cut in half": (_cut, "move the file away and it is made anew"),
    "MLflow's database of an older version": (
        _alembic("update alembic_version set version_num = '451aebb31d03'"),
        "mlflow.db` helps an older store; move one of a newer MLflow away",
    ),
    "MLflow's database of a foreign version, a table missing": (
        _alembic("update alembic_version set version_num = 'ffffffffffff'", "drop table trace_info"),
        "a newer MLflow made it: move the file away and it is made anew",
    ),
}


@pytest.mark.parametrize("kind", first(2, SPOILT))
def test_a_database_that_is_no_longer_one(tracking_folder, monkeypatch, capsys, kind):
    """It is left as it is, for whoever can read it; moved away, a new one is made."""
    with fault(kind):
        spoil, advice = SPOILT[kind]
        spoil(Path("mlflow.db"))
        before = Path("mlflow.db").read_bytes()
        assert follow_to_the_end(capsys)
        track_refuses(advice)
        assert Path("mlflow.db").read_bytes() == before
        lose_database()
        track_twice()


def test_an_empty_file_in_the_place_of_the_database(tracking_folder, capsys):
    with fault("MLflow's database empty"):
        Path("mlflow.db").write_bytes(b"")
        make_reports()
        track_twice()
        assert not Path("mlflow.db.new").exists()


@pytest.mark.exhaustive  # trains for real
def test_a_real_training_does_not_mind(tmp_path, prepared):
    histories = []
    for kind, uri in [("", ""), ("away", "http://127.0.0.1:9")]:
        clone = tiny(tmp_path / (kind or "well"), prepared)
        with fault(f"MLflow {kind}, a training with DVC") if kind else contextlib.nullcontext():
            if uri:
                clone.environment["MLFLOW_TRACKING_URI"] = uri
            out = clone("dvc", "repro", "train")
            assert ("warning: MLflow: " in out) == bool(kind)
            histories.append(clone.read("reports/train/history.csv"))
            assert histories[-1] == histories[0]
