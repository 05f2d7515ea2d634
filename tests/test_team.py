"""Two members of a team, as docs/TEAM.md sets them up: one MLflow server on PostgreSQL, one DVC remote over SSH, one
git repository, all real and on loopback. What one has run the other has without running it, and each run is there
once."""

import copy
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from tests.clones import Clone, end, tiny
from tests.experiments import points
from tests.servers import MlflowServer, Postgres, SshServer, postgres_programs

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]


@dataclass
class Team:
    """The members' workspaces, and the servers' own view."""

    first: Clone
    second: Clone
    database: Postgres
    mlflow: MlflowServer

    def runs(self) -> dict[str, str]:
        """Ids of the runs by train_key, in PostgreSQL."""
        rows = self.database.query(
            "select value, run_uuid from tags join runs using (run_uuid) "
            "where key = 'train_key' and lifecycle_stage = 'active'"
        ).splitlines()
        found = dict(row.split("|") for row in rows)
        assert len(found) == len(rows), "two runs of one training"
        return found

    def points(self, run: str) -> list[tuple[str, int, float]]:
        rows = self.database.query(f"select key, step, value from metrics where run_uuid = '{run}' and not is_nan")
        cells = (row.split("|") for row in rows.splitlines())
        return sorted((key, int(step), float(value)) for key, step, value in cells)

    def assert_complete(self, member: Clone) -> None:
        """The run in this member's workspace: every number of its history, and its report as the server hands it
        out."""
        run = self.runs()[train_key(member)]
        training = [point for point in self.points(run) if point[0].startswith("train/")]
        assert training == points(member.read("reports/train/history.csv"))
        status, place = self.database.query(
            f"select status, artifact_uri from runs where run_uuid = '{run}'"
        ).split("|")  # fmt: skip
        assert status == "FINISHED"
        assert place.startswith("mlflow-artifacts:/"), (
            "members write artifacts through the server, not to a path of theirs"
        )
        address = f"{self.mlflow.url}/api/2.0/mlflow-artifacts/artifacts/{place.removeprefix('mlflow-artifacts:/')}"
        served = requests.get(f"{address}/report.html", timeout=60)
        assert served.content == (member.root / "reports/page/report.html").read_bytes()


def train_key(member: Clone) -> str:
    return str(json.loads(member.read("reports/train/run.json"))["train_key"])


def join(first: Clone, root: Path, repository: Path) -> Clone:
    """Another member, with nothing but a git clone."""
    first("git", "clone", "-q", str(repository), str(root))
    member = copy.copy(first)
    member.root, member.environment = root, {**first.environment, "HF_HOME": str(root.parent / "hf")}
    return member


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Iterator[Team]:
    """The first member has run the pipeline and pushed it; the second has cloned."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    base = tmp_path_factory.mktemp("team")
    (base / "remote").mkdir()
    first = tiny(base / "first", prepared)
    database = Postgres(programs, "a secret of the server's")
    files = SshServer(base / "remote", base / "key")
    server = MlflowServer(base, database.uri)
    try:
        server.start()
        first.environment["MLFLOW_TRACKING_URI"] = server.url
        first("dvc", "remote", "add", "--default", "team", f"ssh://member@127.0.0.1:{files.port}/store")
        first("dvc", "remote", "modify", "--local", "team", "keyfile", str(base / "key"))
        first("dvc", "repro")
        first.commit()
        first("git", "init", "-q", "--bare", "--initial-branch=main", str(base / "repository"))
        first("git", "remote", "add", "origin", str(base / "repository"))
        first("git", "push", "-q", "origin", "HEAD:main")
        first("dvc", "push", "--run-cache")
        second = join(first, base / "second/project", base / "repository")
        second("dvc", "remote", "modify", "--local", "team", "keyfile", str(base / "key"))
        yield Team(first, second, database, server)
        for member in (first, second):
            end(member)
    finally:
        server.kill()
        files.close()
        database.close()


def test_what_one_member_ran_is_up_to_date_at_another(team: Team) -> None:
    team.assert_complete(team.first)
    before = team.points(team.runs()[train_key(team.first)])
    team.second("dvc", "pull", "--run-cache")
    assert "Data and pipelines are up to date" in team.second("dvc", "repro")
    assert train_key(team.second) == train_key(team.first)
    weights = "data/policy/model.safetensors"
    assert (team.second.root / weights).read_bytes() == (team.first.root / weights).read_bytes()
    team.second("python", "-m", "pipeline", "track")
    assert list(team.runs()) == [train_key(team.first)]
    assert team.points(team.runs()[train_key(team.first)]) == before
    assert not (team.second.root / ".checkpoints").exists(), "it has trained"
    assert not (team.second.root / "mlflow.db").exists()
    assert team.second("git", "status", "--porcelain") == ""


def test_two_members_train_at_the_same_time(team: Team) -> None:
    working = [
        subprocess.Popen(["dvc", "exp", "run", "-S", f"seed={seed}", "--name", f"seed-{seed}"], cwd=member.root,
                         env=member.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for seed, member in {1: team.first, 2: team.second}.items()
    ]  # fmt: skip
    for process in working:
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, said
        assert "warning: MLflow" not in said
    assert train_key(team.first) != train_key(team.second)
    for member in (team.first, team.second):
        team.assert_complete(member)
    assert len(team.runs()) == 3
    assert team.database.query("select name from experiments where name <> 'Default'") == "reinforce"
    team.second.restore()


def test_an_experiment_is_pulled_by_name(team: Team) -> None:
    team.first("dvc", "exp", "push", "origin", "seed-1")
    runs = team.runs()
    team.second("dvc", "exp", "pull", "origin", "seed-1")
    assert "seed-1" in team.second("dvc", "exp", "show", "--md")
    team.second("dvc", "exp", "apply", "seed-1")
    assert "Data and pipelines are up to date" in team.second("dvc", "repro")
    assert train_key(team.second) == train_key(team.first)
    assert team.runs() == runs
    team.second.restore()


def test_training_again_what_another_has_trained_adds_nothing(team: Team) -> None:
    """Without the experiment's name DVC finds nothing to take: the metrics, which git holds, are not in its remote."""
    run = team.runs()[train_key(team.first)]
    before = team.points(run)
    assert "train" in team.second.ran(team.second("dvc", "exp", "run", "-S", "seed=1"))
    assert train_key(team.second) == train_key(team.first)
    assert team.runs()[train_key(team.second)] == run
    assert team.points(run) == before
    team.assert_complete(team.second)
