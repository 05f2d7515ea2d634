"""The hub fails in every way we could think of: the stage waits and tries again or refuses in one line, writes nothing
that is not right, and succeeds with the undisturbed bytes once the hub is well."""

import functools
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from pipeline.data import hub as hub_of_project
from pipeline.data.hub import DamagedError, drop_damaged
from tests import repositories
from tests.faults import fault, first, rounds
from tests.fork_client import NOWHERE
from tests.hub import Failure, Hub
from tests.pickles import Malicious, pickled_weights
from tests.project import PINNED, PYTHIA, Project, copy_of_project

pytestmark = [pytest.mark.slow, pytest.mark.faults]
OASST1 = "OpenAssistant/oasst1"
STAGES = ("prepare", "cache")
PROMPT = b'{"prompt": "Hi there"}\n'
KEY = {
    "prepare": f"prompt_sets.oasst1: dataset {OASST1}@{PINNED}: ",
    "cache": f"models.pythia-70m: {PYTHIA}@step143000: ",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("repositories")
    return {
        "prepare": repositories.write_oasst1(base / "oasst1", repositories.STAND_IN),
        "cache": repositories.write_pythia(base / "pythia", None),
        "bert": repositories.write_bert(base / "bert"),
    }


def serve(hub: Hub, folders: dict[str, Path]) -> None:
    hub.add("datasets", OASST1, PINNED, folders["prepare"])
    hub.add("models", PYTHIA, "step143000", folders["cache"])


def project_with(base: Path, hub: Hub, folders: dict[str, Path]) -> Project:
    """Asks the hub for its prompts and its policy, and waits a second for an answer."""
    made = copy_of_project(base)
    shutil.copytree(folders["bert"], made.root / "models/local/bert")
    made.edit(encoders__tiny={"source": "models/local/bert"}, encoder="tiny", model="pythia-70m", prompts="oasst1")
    made.environment |= {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}
    (made.root / "data/prompts").mkdir()
    for name in ("train", "heldout"):  # which `cache` tries the policy on
        (made.root / f"data/prompts/{name}.jsonl").write_bytes(PROMPT)
    made.use(hub)
    return made


@pytest.fixture
def asking(tmp_path: Path, hub: Hub, folders: dict[str, Path]) -> Project:
    serve(hub, folders)
    return project_with(tmp_path, hub, folders)


def outputs(project: Project) -> dict[str, str]:
    """Digests of what the stages wrote, remains of unfinished files included."""
    below = (project.root / "data/prompts", project.root / "data/checkpoint", project.root / "reports")
    hidden = (project.root / "data").glob(".*")
    files = [path for folder in (*below, *hidden) for path in folder.rglob("*") if path.is_file()]
    files = [path for path in files if path.read_bytes() != PROMPT]
    return {str(path.relative_to(project.root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Undisturbed:
    """What a stage writes where nothing goes wrong, and which requests it makes."""

    def __init__(self, base: Path, folders: dict[str, Path]) -> None:
        self.base, self.folders = base, folders

    @functools.cache  # noqa: B019
    def of(self, stage: str) -> tuple[dict[str, str], list[str]]:
        hub = Hub()
        serve(hub, self.folders)
        project = project_with(self.base / stage, hub, self.folders)
        done = project.run(stage)
        hub.close()
        assert done.returncode == 0, done.stderr
        return outputs(project), [line for line in hub.requests if "agent-harnesses" not in line]  # which is optional


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"), folders)


def succeed(project: Project, stage: str, undisturbed: Undisturbed) -> None:
    done = project.run(stage)
    assert done.returncode == 0, done.stderr
    assert outputs(project) == undisturbed.of(stage)[0]


def refuse_then_succeed(project: Project, hub: Hub, stage: str, undisturbed: Undisturbed, line: str) -> None:
    """The stage refuses in one line, leaves nothing, and what it left in its cache does no harm later."""
    said = project.refuse(stage)
    assert said.startswith(f"error: {KEY[stage]}"), said
    assert line in said
    assert f"or choose `{'prompts' if stage == 'prepare' else 'model'}: pocket`, which needs no network" in said
    assert outputs(project) == {}
    hub.fail()
    project.use(hub)
    succeed(project, stage, undisturbed)


PASSING = {
    "hub answers 500, then well": Failure("500", "/revision/|/README.md", times=2),
    "hub resets the connection": Failure("reset", "/revision/", times=1),
    "hub does not answer in time": Failure("silent", "/revision/", times=1),
    "download cut in the middle": Failure("cut", "/cdn/", times=1),
    "download stalls in the middle": Failure("stall", "/cdn/", times=1),
    "download has another content once": Failure("alter", "/cdn/", times=1),
}
LASTING = {
    "hub answers 503": (Failure("503", "/revision/"), "answered 503: try again later"),
    "hub never answers": (Failure("silent", "/revision/"), "cannot be reached (ReadTimeout: timed out)"),
    "hub answers with a page to log in": (Failure("html", "/revision/"), "did not answer in JSON"),
    "download is short": (Failure("short", "/cdn/"), "sent only a part of a file"),
    "download has another content": (Failure("alter", "/cdn/"), "is not the file that the hub at http://127.0.0.1:"),
    "small file has another content": (Failure("alter", "GET .*(README.md|/config.json)"), "is not the file that"),
}  # fmt: skip
FEW = {"hub answers 500, then well", "hub resets the connection", "download cut in the middle",
       "download has another content once", "download has another content"}  # fmt: skip


def cases(kinds: Iterable[str]) -> list[Any]:
    """Each kind at each stage; the FEW at `prepare` under `make test`."""
    every = sorted(itertools.product(STAGES, kinds), key=lambda case: case[0] != "prepare" or case[1] not in FEW)
    return first(len(FEW & set(kinds)), every)


ONE_REQUEST = [("prepare", "reset"), ("prepare", "500"), ("cache", "reset"), ("cache", "500")]


@pytest.mark.parametrize(("stage", "kind"), cases(PASSING))
def test_what_passes_is_waited_for(asking: Project, hub: Hub, undisturbed: Undisturbed, stage: str, kind: str) -> None:
    with fault(kind):
        failure = PASSING[kind]
        hub.fail(Failure(failure.kind, failure.where, failure.times))
        succeed(asking, stage, undisturbed)
        assert hub.failed == failure.times


@pytest.mark.parametrize(("stage", "kind"), cases(LASTING))
def test_what_lasts_is_one_line_and_leaves_nothing(
    asking: Project, hub: Hub, undisturbed: Undisturbed, stage: str, kind: str
) -> None:
    with fault(kind):
        failure, line = LASTING[kind]
        hub.fail(Failure(failure.kind, failure.where))
        refuse_then_succeed(asking, hub, stage, undisturbed, line)
        assert hub.failed == 0


@pytest.mark.parametrize(
    ("status", "content", "said"),
    [
        (403, "application/json", "the hub at https://huggingface.co answered 403: check your token (`hf auth login`)"),
        (
            403,
            "text/html",
            "a proxy or a log-in page answered 403 for the hub at https://huggingface.co: see HTTPS_PROXY",
        ),
        (401, "text/html; charset=utf-8", "a proxy or a log-in page answered 401 for the hub"),
        (407, "text/plain", "a proxy or a log-in page answered 407 for the hub"),
        (502, "text/html", "the hub at https://huggingface.co answered 502: try again later"),
    ],
)
def test_a_proxys_refusal_is_not_taken_for_the_hubs(
    monkeypatch: pytest.MonkeyPatch, status: int, content: str, said: str
) -> None:
    import httpx2
    from huggingface_hub.utils import hf_raise_for_status

    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    request = httpx2.Request("GET", "https://huggingface.co/api/models/a/b/revision/main")
    response = httpx2.Response(status, headers={"content-type": content}, text="<html>no</html>", request=request)
    with pytest.raises(Exception, match=str(status)) as error:  # the client's own class for it
        hf_raise_for_status(response)
    assert (hub_of_project._meaning(error.value, "model: pocket") or "").startswith(said)


@pytest.mark.exhaustive  # takes the client half a minute
@pytest.mark.parametrize("stage", STAGES)
def test_nobody_listens(asking: Project, hub: Hub, undisturbed: Undisturbed, stage: str) -> None:
    with fault("hub refuses the connection"):
        asking.environment["HF_ENDPOINT"] = NOWHERE
        refuse_then_succeed(asking, hub, stage, undisturbed, f"the hub at {NOWHERE} cannot be reached (")


@pytest.mark.parametrize(("stage", "kind"), first(1, ONE_REQUEST))
def test_any_single_request_fails(
    tmp_path: Path, hub: Hub, folders: dict[str, Path], undisturbed: Undisturbed, stage: str, kind: str
) -> None:
    serve(hub, folders)
    requests = len(undisturbed.of(stage)[1])
    # a good `cache` takes seconds: every fourth
    for number in range(0, requests, 1 if stage == "prepare" else 4)[-rounds(requests, 1) :]:
        with fault({"500": "any one request answered 500", "reset": "any one request reset"}[kind]):
            project = project_with(tmp_path / str(number), hub, folders)
            hub.fail(Failure(kind, "^(?!.*agent-harnesses)", times=1, after=number))
            succeed(project, stage, undisturbed)
            assert hub.failed == 1


def test_content_damaged_in_the_local_cache_is_fetched_anew(
    asking: Project, hub: Hub, undisturbed: Undisturbed
) -> None:
    """As a disk or an earlier client may have left it, and however much was made of it since."""
    succeed(asking, "prepare", undisturbed)
    blobs = sorted(Path(asking.environment["HF_HOME"]).rglob("blobs/*"))
    for blob in blobs[: rounds(len(blobs), 1)]:
        with fault("a file of the local cache damaged"):
            blob.write_bytes(blob.read_bytes().swapcase())
            hub.requests.clear()
            succeed(asking, "prepare", undisturbed)
            assert [line for line in hub.requests if line.startswith("GET")], "not fetched"
    blobs[0].write_bytes(b"wrong")
    with fault("a file of the local cache damaged, hub away"):
        asking.environment["HF_HUB_OFFLINE"] = "1"
        before = outputs(asking)
        assert KEY["prepare"] in asking.refuse("prepare")
        assert outputs(asking) == before


def test_damaged_files_are_deleted_and_no_others(tmp_path: Path) -> None:
    """Large files are named by sha256, small ones by git's digest of a blob."""
    small, large = b"{}\n", b"weights" * 300_000
    names = {
        "config.json": (small, "0967ef424bce6791893e9a57bb952f80fd536e93"),  # of `git hash-object`
        "model.safetensors": (large, hashlib.sha256(large).hexdigest()),
        "data/x.bin": (large[:-1], hashlib.sha256(large[:-1]).hexdigest()),
    }
    snapshot, blobs = tmp_path / "snapshots/aa", tmp_path / "blobs"
    blobs.mkdir()
    for name, (content, digest) in names.items():
        (blobs / digest).write_bytes(content)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blobs / digest)
    (snapshot / "without-links.json").write_text("a copy, whose digest nobody knows")
    drop_damaged(snapshot)
    assert len(list(blobs.iterdir())) == 3
    for name, (content, digest) in names.items():
        with fault("a file of the local cache damaged"):
            (blobs / digest).write_bytes(content[:-1] + b"x")
            with pytest.raises(DamagedError, match=f"^{name}$"):
                drop_damaged(snapshot)
            assert not (snapshot / name).is_symlink()
            assert not (blobs / digest).exists()
    assert [path.name for path in snapshot.rglob("*") if path.is_file()] == ["without-links.json"]


# --- who answers, and with what ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_unknown_repository_or_revision(asking: Project, undisturbed: Undisturbed, stage: str) -> None:
    table = "prompt_sets__oasst1" if stage == "prepare" else "models__pythia-70m"
    for setting, value, meaning in [
        ("repo", "some/nothing", ("doesn't exist on the Hub", "the hub has no such repository")),
        ("revision", "b" * 40, ("the repository has no such revision",) * 2),
    ]:
        with fault(f"unknown {'repository' if setting == 'repo' else setting}"):
            whole = {"repo": OASST1 if stage == "prepare" else PYTHIA, "revision": PINNED, "language": "en"}
            whole |= {setting: value}
            if stage == "cache":
                del whole["language"]
            asking.edit(**{table: whole})
            assert meaning[stage == "cache"] in asking.refuse(stage)
            assert outputs(asking) == {}


@pytest.mark.exhaustive  # loads four checkpoints
def test_a_branch_that_moves_is_recorded_by_its_commit(
    asking: Project, hub: Hub, folders: dict[str, Path], tmp_path: Path
) -> None:
    """The files are those of one commit, which the manifest names; a pinned commit stays what it was."""
    first = hub.add("models", PYTHIA, "main", folders["cache"])
    other = shutil.copytree(folders["cache"], tmp_path / "other")
    settings = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps({**settings, "temperature": 0.7, "do_sample": True}))
    asking.edit(**{"models__pythia-70m__revision": "main"})

    def manifest() -> Any:
        assert asking.run("cache").returncode == 0
        return json.loads((asking.root / "data/checkpoint/manifest.json").read_text())["policy"]

    before = manifest()
    with fault("branch moved to another commit"):
        second = hub.add("models", PYTHIA, "main", other)
        after = manifest()
        assert (before["commit"], after["commit"]) == (first, second)
        differing = {name for name in before["files"] if before["files"][name] != after["files"][name]}
        assert differing == {"generation_config.json"}
    with fault("branch moved, a commit pinned"):
        asking.edit(**{"models__pythia-70m__revision": first})
        again = manifest()
        assert (again["commit"], again["files"]) == (first, before["files"])
    with fault("branch moves between two requests"):
        shutil.rmtree(asking.environment["HF_HOME"])
        asking.edit(**{"models__pythia-70m__revision": "moving"})
        hub.add("models", PYTHIA, "moving", folders["cache"])
        hub.move_after("models", PYTHIA, "moving", "/config.json", second)
        raced = manifest()
        assert (raced["commit"], raced["files"]) == (first, before["files"])
        assert hub.repos["models", PYTHIA].commits["moving"] == second


NAMES = {
    "cache": ["../../x.model", "/tmp/x.model", "x\0.model", "x\n.model", "C:\\x.model", "a/../../../../../x.model"],
    "prepare": ["data/../../../train-x.parquet", "../train-x.parquet", "/tmp/train-x.parquet", "data/train-\0.parquet"],
}


@pytest.mark.parametrize("stage", STAGES)
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, hub: Hub, folders: dict[str, Path], stage: str) -> None:
    served = shutil.copytree(folders[stage], tmp_path / "served")
    (served / "evil.model").write_text("evil")
    for number, name in enumerate(NAMES[stage][: rounds(9, 2)]):
        with fault("malicious file name in a listing"):
            kind, repo, revision = (
                ("models", PYTHIA, "step143000") if stage == "cache" else ("datasets", OASST1, PINNED)
            )
            commit = hub.add(kind, repo, revision, served)
            files = hub.repos[kind, repo].files[commit]
            old = "evil.model" if stage == "cache" else next(name for name in files if "/train" in name)
            hub.rename(kind, repo, commit, old, name)
            project = project_with(tmp_path / str(number), hub, folders)
            before = {path for path in tmp_path.rglob("*") if "hf" not in path.parts}
            assert KEY[stage].split("@")[0].split("dataset ")[-1] in project.refuse(stage)
            left = {path for path in tmp_path.rglob("*") if "hf" not in path.parts} - before
            assert all("__pycache__" in path.parts for path in left), left
            assert not Path("/tmp/x.model").exists()
            assert not Path("/tmp/train-x.parquet").exists()


def test_a_pickle_that_would_run_code_never_does(
    asking: Project, hub: Hub, folders: dict[str, Path], tmp_path: Path
) -> None:
    with fault("pickled weights that run code"):
        served = shutil.copytree(folders["cache"], tmp_path / "served")
        pickled_weights(Malicious())(served)
        hub.add("models", PYTHIA, "step143000", served)
        line = asking.refuse("cache")
        assert line.startswith("error: models.pythia-70m: pytorch_model.bin is damaged or holds more than weights: ")
        assert not list(tmp_path.rglob("run-by-the-pickle"))
        assert outputs(asking) == {}
