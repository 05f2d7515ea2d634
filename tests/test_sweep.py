"""`reinforce sweep` and `reinforce compare` on real experiments of DVC's queue: their table says what the files say,
read from either record, in this folder or in another clone."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest

from pipeline.errors import UserError
from pipeline.runs import dvc_queue
from pipeline.runs.dvc_git import dvc, head_commit
from tests.clones import Clone, end, tiny
from tests.experiments import PATIENCE_SECONDS, assert_complete, experiments
from tests.project import ROOT

IDENTITY = {f"GIT_{who}_{what}": "a@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
GRID = ("-S", "seed=1,2", "-S", "train.threads=1")


class Swept(NamedTuple):
    clone: Clone
    printed: str
    names: list[str]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Iterator[Swept]:
    """A sweep of two experiments at the same time."""
    base = tmp_path_factory.mktemp("swept")
    clone = tiny(base, prepared)
    printed = clone("python", "-m", "pipeline", "sweep", "--jobs", "2", *GRID)
    yield Swept(clone, printed, sorted(set(re.findall(r"finished \d of \d: (\S+)", printed))))
    end(clone)


def table(clone: Clone, *arguments: str) -> pd.DataFrame:
    clone("python", "-m", "pipeline", "compare", *arguments)
    return pd.read_csv(io.StringIO(clone.read("reports/compare/table.csv")), dtype={"seeds": str})


def show(clone: Clone, name: str, path: str) -> str:
    (ref,) = [line for line in clone("git", "for-each-ref", "--format=%(refname)").split() if line.endswith(f"/{name}")]
    return clone("git", "show", f"{ref}:{path}")


@pytest.mark.slow
def test_a_sweep_ends_with_its_comparison(swept: Swept) -> None:
    clone, printed, names = swept
    assert "2 experiments, 0 of them finished" in printed
    assert [re.sub("-[0-9a-f]{16}$", "", name) for name in names] == ["sweep-1", "sweep-2"]
    written = clone.read("reports/compare/table.md").partition("\n\n")[0]
    assert written in printed
    assert re.search(r"\| +seeds +\| +steps", written)
    assert clone("git", "status", "--porcelain") == ""


@pytest.mark.slow
def test_each_experiment_is_whole_and_its_own_in_both_records(swept: Swept) -> None:
    assert_complete(swept.clone, [1, 2])
    assert len({one["history"] for one in experiments(swept.clone).values()}) == 2


@pytest.mark.slow
def test_the_table_says_what_the_files_say(swept: Swept) -> None:
    clone, _, names = swept
    (row,) = table(clone, "--from", "dvc").to_dict("records")
    assert (row["seeds"], sorted(row["experiments"].split())) == ("1 2", names)
    histories = [pd.read_csv(io.StringIO(show(clone, name, "reports/train/history.csv"))) for name in names]
    ends = pd.Series([history["reward_mean"].tail(5).mean() for history in histories])
    assert row["training_reward_mean"] == pytest.approx(ends.mean(), rel=1e-12)
    assert row["training_reward_std"] == pytest.approx(ends.std(), rel=1e-9)
    metrics = [json.loads(show(clone, name, "reports/evaluate/metrics.json")) for name in names]
    gains = pd.Series([each["length"]["difference"]["mean"] for each in metrics])
    assert row["held_out_gain_mean"] == pytest.approx(gains.mean(), rel=1e-12)
    assert row["held_out_gain_std"] == pytest.approx(gains.std(), rel=1e-9)
    first = [json.loads(show(clone, name, "reports/diagnosis.json"))["findings"][:1] for name in names]
    titles = pd.Series([found[0]["title"].lower() if found else "healthy" for found in first])
    for title, count in titles.value_counts().items():
        assert re.search(rf"(^|, ){count} {title}", row["verdict"])


@pytest.mark.slow
def test_another_clone_reads_pulled_experiments_without_mlflow(
    swept: Swept, tmp_path: Path
) -> None:  # fmt: skip
    clone, _, names = swept
    subprocess.run(["git", "clone", "-q", clone.root, tmp_path / "other"], check=True)
    hook = tmp_path / "hook/sitecustomize.py"
    hook.parent.mkdir()
    hook.write_text("import sys\nif sys.argv[0] == '-m':\n    sys.modules['mlflow'] = None\n")

    def run(*command: str) -> str:
        environment = {**clone.environment, "PYTHONPATH": str(hook.parent)}
        done = subprocess.run(command, cwd=tmp_path / "other", env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("dvc", "exp", "pull", "--no-cache", "origin", *names)
    printed = run("python", "-m", "pipeline", "compare", "--from", "dvc")
    expected = clone("python", "-m", "pipeline", "compare", "--from", "dvc", *names)
    assert printed == expected
    assert (tmp_path / "other/reports/compare/curves.svg").read_text() == clone.read("reports/compare/curves.svg")


@pytest.mark.slow
def test_the_same_sweep_again_is_a_table_only(swept: Swept) -> None:
    clone, printed, _ = swept
    again = clone("python", "-m", "pipeline", "sweep", "--jobs", "2", *GRID)
    assert "2 experiments, 2 of them finished" in again
    assert "queued" not in again
    assert again[again.index("\n|") :] == printed[printed.index("\n|") :]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_failed_experiment_is_named_with_its_error(swept: Swept) -> None:
    clone = swept.clone
    size = ("-S", "train.max_tokens=9999")  # valid, and more than the model's context
    quicker = "from pipeline.__main__ import main\nfrom pipeline.runs import dvc_queue\n"
    quicker += "dvc_queue.POLL_SECONDS, dvc_queue.QUEUE_EVERY = 2, 2\n"
    quicker += "main()"
    said = clone(sys.executable, "-c", quicker, "sweep", *size, fails=True)
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert re.match(r"error: 1 of 1 experiments failed: sweep-[0-9a-f]{16}; `dvc queue logs sweep-", line)
    assert "beyond the model's 512" in line


def interrupt(clone: Clone, command: list[str]) -> None:
    """Ctrl-C while experiments train, then no workers any more: what docs say before the same command goes on."""
    process = subprocess.Popen(  # a shell's background jobs ignore SIGINT, and so does what they start
        ["env", "--default-signal=INT", *command],
        cwd=clone.root,
        env=clone.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not list((clone.root / ".checkpoints").glob("*/state-00*.pt")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=PATIENCE_SECONDS)[1]
    assert process.returncode == 1
    assert error.startswith("error: interrupted: running experiments end by themselves")
    assert error.count("\n") == 1
    clone("dvc", "queue", "stop", "--kill")
    while "Worker status: 0 active, 0 idle" not in clone("dvc", "queue", "status"):  # one that ends still takes tasks
        assert time.monotonic() < deadline
        time.sleep(2)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_an_interrupted_sweep_goes_on_by_the_same_command(swept: Swept) -> None:
    """Interrupted while one experiment trained and one waited."""
    clone, grid = swept.clone, ("-S", "seed=3,4", "-S", "train.threads=1")
    interrupt(clone, [sys.executable, "-m", "pipeline", "sweep", "--jobs", "1", *grid])
    assert "2 experiments, 0 of them finished" in clone("python", "-m", "pipeline", "sweep", "--jobs", "2", *grid)
    assert_complete(clone, [1, 2, 3, 4])


@pytest.mark.slow
@pytest.mark.exhaustive
def test_an_experiment_that_an_ending_worker_took_along_is_queued_again(swept: Swept) -> None:
    """It leaves the folder of what waits for that of what was taken, and nobody runs it."""
    clone = swept.clone
    end(clone)  # the workers of what was swept before wait some seconds for more
    patched = """
from pipeline.__main__ import main
from pipeline.runs import dvc_queue
dvc, dvc_queue.POLL_SECONDS, dvc_queue.QUEUE_EVERY, dvc_queue.PATIENCE = dvc_queue.dvc, 0.1, 1, 1
dvc_queue.dvc = lambda *arguments: "" if arguments[:2] == ("queue", "start") else dvc(*arguments)
"""
    grid, broker = ("-S", "train.steps=2", "-S", "seed=7"), clone.root / ".dvc/tmp/exps/celery/broker"
    clone(sys.executable, "-c", f"{patched}dvc_queue.wait = lambda *_: None\nmain()", "sweep", *grid, fails=True)
    assert re.search("sweep-.* Queued", clone("dvc", "queue", "status"))
    (message,) = (broker / "in").glob("*.celery.msg")  # not what is left of talk with workers
    message.rename(broker / "processed" / message.name)
    assert re.search("sweep-.* Running", clone("dvc", "queue", "status"))
    said = clone(sys.executable, "-c", f"{patched}main()", "sweep", *grid, fails=True)
    assert said.count("queued 1 of 1: sweep-") == 1
    assert "nobody works on the queue, 1 experiments are left: the same command" in said
    assert re.search("sweep-.* Queued", clone("dvc", "queue", "status"))


# --- what needs no experiments


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("seed: 0\n")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "start"]):
        subprocess.run(["git", *command], check=True, env={**os.environ, **IDENTITY})
    return tmp_path


def test_each_combination_has_a_name_of_code_and_parameters(repository: Path) -> None:
    def names(*overrides: str) -> list[str]:
        return list(dvc_queue.experiments(list(overrides), head_commit()))

    grid = ("recipe=notebook,stable", "seed=range(0,3)", "train.threads=1")
    first = names(*grid)
    assert len(set(first)) == 6
    assert first[0].startswith("sweep-notebook-0-")
    assert names(*grid) == first
    assert set(names(*grid[:2], "train.threads=2")).isdisjoint(first)
    assert len(names("models.pythia-70m.revision=step1000,step16000", "model=pythia-70m")) == 2
    for key, value in (
        ("color.ui", "always"),
        ("diff.noprefix", "true"),
        ("diff.external", "false"),
        ("core.pager", "false"),
    ):
        subprocess.run(["git", "config", key, value], check=True)
    assert names(*grid) == first
    (repository / "params.yaml").write_text("seed: 1\n")
    edited = names(*grid)
    assert set(edited).isdisjoint(first)
    subprocess.run(["git", "config", "diff.context", "9"], check=True)
    assert names(*grid) == edited
    (repository / "params.yaml").write_text("seed: 0\n")
    assert names(*grid) == first
    (repository / "params.yaml").unlink()
    assert set(names(*grid)).isdisjoint({*first, *edited})


def test_an_experiment_needs_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^`git rev-parse` failed: fatal: not a git repository"):
        head_commit()
    subprocess.run(["git", "init", "-q"], check=True)
    with pytest.raises(UserError, match="no commit yet, and experiments start from one: `git commit` first"):
        head_commit()


@pytest.mark.parametrize("override", ["recipe", "recipe=a,b)", "seed=glob(*)"])
def test_an_override_that_is_none_is_refused(repository: Path, override: str) -> None:
    with pytest.raises(UserError, match=r"^-S: .*should be KEY=VALUE"):
        dvc_queue.experiments([override], "HEAD")


def test_a_combination_that_is_not_valid_is_refused_before_any_is_queued(
    repository: Path,
) -> None:
    shutil.copy(ROOT / "params.yaml", repository)
    for overrides, message in (
        (["reward=length,lenght"], r"^-S reward=lenght: params.yaml: reward: .* did you mean 'length'"),
        (["seed=1", "recipes.stable.lr=fast"], r"^-S seed=1 -S recipes.stable.lr=fast: params.yaml: .*lr"),
        (["recipe.lr=1"], r"^-S recipe.lr=1: .*"),
    ):
        with pytest.raises(UserError, match=message):
            dvc_queue.check(dvc_queue.experiments(overrides, "HEAD").values())
    before = (repository / "params.yaml").read_bytes()
    dvc_queue.check(dvc_queue.experiments(["reward=length,words", "recipes.stable.lr=3e-5"], "HEAD").values())
    assert (repository / "params.yaml").read_bytes() == before


def test_what_dvc_refuses_is_said_in_its_own_words(repository: Path) -> None:
    with pytest.raises(UserError, match=r"^`dvc queue` failed: you are not inside of a DVC repository"):
        dvc("queue", "status")
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], check=True)
    subprocess.run(["git", "commit", "-qam", "dvc"], check=True, env={**os.environ, **IDENTITY})
    with pytest.raises(UserError, match=r"^`dvc exp` failed: .*Could not override 'sede'.* full_key: sede"):
        dvc("exp", "run", "--queue", "-S", "sede=1")


def test_what_dvc_says_is_passed_on_to_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As dvc.rwlock and dvc.cli word it, in colours and behind a warning."""
    monkeypatch.chdir(tmp_path)
    said = (
        "\x1b[33mWARNING\x1b[39m: slow\n"
        "\x1b[31mERROR\x1b[39m: 'data' is busy, it is being blocked by:\n  (PID 1): dvc\n\n"
        "If there are no processes with such PIDs, you can manually remove '.dvc/tmp/rwlock' and try again.\n\n"
        "Having any troubles? Hit us up at dvc.org/support, we are always happy to help!\n"
    )
    (tmp_path / "dvc.py").write_text(f"import sys\nsys.exit({said!r})\n")
    with pytest.raises(UserError) as refused:
        dvc("queue", "status")
    assert str(refused.value) == (
        "`dvc queue` failed: 'data' is busy, it is being blocked by: (PID 1): dvc If there are no processes "
        "with such PIDs, "
        "you can manually remove '.dvc/tmp/rwlock' and try again."
    )


def test_a_command_does_not_wait_for_the_workers_that_it_leaves_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """They inherit its output: read through a pipe, `dvc queue start` would last as long as the queue."""
    monkeypatch.chdir(tmp_path)
    worker = "import time; time.sleep(60)"
    (tmp_path / "dvc.py").write_text(
        f"import subprocess, sys\nworker = subprocess.Popen([sys.executable, '-c', {worker!r}])\nprint(worker.pid)\n"
    )
    before = time.monotonic()
    pid = int(dvc("queue", "start"))
    os.kill(pid, signal.SIGKILL)  # it is still there
    assert time.monotonic() - before < 40


def test_the_queue_is_read_as_dvc_prints_it(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = (
        "Task     Name              Created       Status\n7da09db  sweep-a-0-19e714  05:17 AM      Running\n"
        "1daeeaf  sweep-b-1-3c6bf8  Nov 22, 2026  Failed\n9554dbe  other             05:17 AM      Success\n"
        "6f2a1b0  sweep-a-0-19e714  05:11 AM      Failed\n"
        "\nWorker status: 2 active, 1 idle\n"
    )
    monkeypatch.setattr(dvc_queue, "dvc", lambda *arguments: printed)
    assert dvc_queue.status() == ({"sweep-a-0-19e714": "Running", "sweep-b-1-3c6bf8": "Failed", "other": "Success"}, 3)


@pytest.mark.parametrize(
    ("looks", "expected"),
    [
        ([({}, 0)], 1),
        ([({"old": "Running"}, 2), ({"old": "Success"}, 1), ({"old": "Success"}, 0)], 3),
        ([({"another": "Running"}, 2)], 1),  # somebody's: these workers go on
        ([({"old": "Success"}, 1)] * 99, dvc_queue.ENDING),
    ],
)
def test_nothing_is_queued_while_workers_are_ending(
    looks: list[tuple[dict[str, str], int]], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = iter(looks)
    called: list[str] = []
    monkeypatch.setattr(dvc_queue, "POLL_SECONDS", 0)
    monkeypatch.setattr(dvc_queue, "results", lambda commit: {"old"})
    monkeypatch.setattr(dvc_queue, "status", lambda: called.append("look") or next(seen))
    monkeypatch.setattr(dvc_queue, "queue", lambda *_: called.append("queue"))
    monkeypatch.setattr(dvc_queue, "wait", lambda *_: None)
    dvc_queue.run({"new": []}, "c", jobs=2)
    assert called == ["look"] * expected + ["queue"]
    dvc_queue.run({"old": []}, "c", jobs=2)
    assert called[expected + 1 :] == ["queue"], "which then queues nothing"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("Running", r"nobody works on the queue, 1 experiments are left: the same command"),
        ("Failed", r"1 of 1 experiments failed: one; `dvc queue logs one` says why: ERROR: no; the same command"),
    ],
)
def test_a_queue_that_stands_still_ends_the_waiting(state: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dvc_queue, "POLL_SECONDS", 0)
    monkeypatch.setattr(dvc_queue, "finished", lambda *_: set())
    monkeypatch.setattr(dvc_queue, "status", lambda: ({"one": state}, 0))
    monkeypatch.setattr(dvc_queue, "raise_if_changed", lambda *_: None)
    asked = []

    def dvc(*arguments: str) -> str:
        asked.append(arguments[:2])
        return "loading\nERROR: no\n"

    monkeypatch.setattr(dvc_queue, "dvc", dvc)
    with pytest.raises(UserError, match=message):
        dvc_queue.wait({"one": []}, "c", jobs=1)
    assert asked.count(("queue", "kill")) == (state == "Running")  # once, then a person has to look


def test_a_failed_experiment_ends_the_waiting_after_the_others_have_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks = iter([("Failed", "Running")] * 3 + [("Failed", "Success")] * 9)
    states = {"one": "Queued", "two": "Queued"}

    def status() -> tuple[dict[str, str], int]:
        states.update(zip(states, next(looks), strict=True))
        return dict(states), 1

    monkeypatch.setattr(dvc_queue, "POLL_SECONDS", 0)
    monkeypatch.setattr(dvc_queue, "status", status)
    monkeypatch.setattr(dvc_queue, "finished", lambda *_: {name for name in states if states[name] == "Success"})
    monkeypatch.setattr(dvc_queue, "dvc", lambda *arguments: "")
    with pytest.raises(UserError, match="1 of 2 experiments failed: one; `dvc queue logs one` says why; the same"):
        dvc_queue.wait({"one": [], "two": []}, "c", jobs=1)
    assert capsys.readouterr().out == "finished 1 of 2: two\n"


def test_make_passes_its_variables_on() -> None:
    command = ["make", "-n", "-o", ".venv/bin/installed", "sweep", "RECIPES=stable", "STEPS=10", "JOBS=3"]
    command += ["OVERRIDES=-S model=pythia-70m -S 'models.pythia-70m.revision=step1000,step16000'"]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
    done = subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True, check=True)
    said = done.stdout.replace("\\\n", " ")
    expected = """reinforce sweep --jobs 3 -S 'recipe=stable' -S 'reward=embedding,length' -S 'seed=range(0,3)'
        -S train.threads=1 -S train.steps=10 -S model=pythia-70m -S 'models.pythia-70m.revision=step1000,step16000'"""
    assert said.split()[-len(expected.split()) :] == expected.split()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_both_records_give_one_table_and_an_evaluation_adds_no_seed(swept: Swept) -> None:
    """The last one: the MLflow run of seed 1 then has the name of the experiment that evaluated it again."""
    clone = swept.clone

    def both() -> pd.DataFrame:
        texts = set()
        for source in ("dvc", "mlflow"):
            rows = table(clone, "--from", source)
            texts.add(clone.read("reports/compare/table.csv") + clone.read("reports/compare/curves.csv"))
        assert len(texts) == 1
        return rows

    before = both()
    again = ("--name", "again", "-S", "seed=1", "-S", "train.threads=1")
    said = clone("dvc", "exp", "run", "--temp", *again, "-S", "evaluate.samples_per_prompt=3")
    assert "evaluate" in clone.ran(said)
    after = both()
    assert list(after["seeds"]) == list(before["seeds"])
    assert "again" in after["experiments"][0].split()
    assert after["held_out_gain_mean"][0] != before["held_out_gain_mean"][0]
    clone("dvc", "exp", "remove", "again")
    clone("git", "diff", "--quiet")
