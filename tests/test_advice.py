"""What a message advises helps: each test makes the state in which the message appears, and does what it says.

The other commands' advice is followed where their tests are: the store's in tests/test_tracking.py and
test_tracking_faults.py, the queue's in test_sweep.py, the cure's in test_cure.py.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clones import Clone, end, tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, finished: Path) -> Iterator[Clone]:
    """A whole run, committed."""
    made = tiny(tmp_path_factory.mktemp("advice"), finished)
    made.commit()
    yield made
    end(made)


def refused(clone: Clone, *command: str) -> tuple[str, list[str]]:
    """The one line with which a command ends, and the commands that it names."""
    said = clone(sys.executable, "-m", *command, fails=True)
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    return line, re.findall("`([^`]+)`", line)


def run_of(clone: Clone) -> str:
    return str(json.loads(clone.read("reports/train/run.json"))["train_key"])


def compared(clone: Clone, *names: str) -> str:
    clone(sys.executable, "-m", "pipeline", "compare", "--from", "dvc", *names)
    return clone.read("reports/compare/table.csv")


def test_files_of_another_run(clone: Clone) -> None:
    first, lock = run_of(clone), clone.read("dvc.lock")
    clone.edit(train={"steps": 2})
    clone("dvc", "repro", "train")
    assert run_of(clone) != first

    # `dvc repro train` alone, and then `dvc exp save`, after which DVC takes all for right
    message, (forced,) = refused(clone, "pipeline.stages.track")
    assert "reports/evaluate/completions.jsonl, reports/evaluate/curve.jsonl, reports/diagnosis.json" in message
    clone("dvc", "exp", "save", "--name", "saved")
    assert "up to date" in clone("dvc", "repro")
    assert refused(clone, "pipeline.stages.track") == (message, [forced])
    assert refused(clone, "pipeline.stages.plot")[1] == [forced.replace(" plot", "")]
    assert refused(clone, "pipeline", "cure")[1] == [forced.replace(" plot", "")]
    assert ",1 not diagnosed," in compared(clone, "saved")
    clone("bash", "-c", forced)
    assert len(clone.runs()) == len(set(clone.runs())) == 2, "track has run"
    clone.commit()
    assert "not diagnosed" not in compared(clone)

    # the files that git has, without those that DVC has
    clone("git", "checkout", "-q", "HEAD~1")
    message, (checkout, forced) = refused(clone, "pipeline.stages.track")
    assert "reports/train/samples.jsonl" in message
    assert refused(clone, "pipeline.stages.diagnose")[0].partition(": of")[0] in message
    clone("bash", "-c", checkout)
    assert (run_of(clone), clone.read("dvc.lock")) == (first, lock)
    clone(sys.executable, "-m", "pipeline", "track")
    clone.restore()


@pytest.mark.exhaustive
def test_a_file_that_was_edited_by_hand_and_committed(clone: Clone) -> None:
    """There is nothing that `dvc checkout` could bring back."""
    path = clone.root / "reports/train/samples.jsonl"
    content = path.read_bytes()
    path.unlink()  # it may be a link into the cache
    path.write_bytes(content.replace(b"0", b"1", 1))
    clone("dvc", "commit", "-q", "-f", "train")
    message, (checkout, forced) = refused(clone, "pipeline.stages.track")
    assert message.startswith("error: reports/train/samples.jsonl: of another run than")
    clone("bash", "-c", checkout)
    assert refused(clone, "pipeline.stages.track") == (message, [checkout, forced])
    clone("bash", "-c", forced)
    assert path.read_bytes() == content
    clone(sys.executable, "-m", "pipeline", "track")
    clone.restore()


def test_a_missing_file(clone: Clone) -> None:
    (clone.root / "reports/page/report.html").unlink()
    message, (command,) = refused(clone, "pipeline.stages.track")
    assert message.startswith("error: reports/page/report.html: no such file")
    clone("bash", "-c", command)
    clone(sys.executable, "-m", "pipeline", "track")
    clone.restore()


# where DVC was told to commit the broken file, it takes it for right: the second command of the message helps
@pytest.mark.parametrize("committed", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_a_broken_file(clone: Clone, committed: bool) -> None:
    (clone.root / "reports/diagnosis.json").write_text("{}")
    if committed:
        clone("dvc", "commit", "-q", "-f", "diagnose")
    message, commands = refused(clone, "pipeline.stages.track")
    assert message.startswith("error: reports/diagnosis.json: has no verdict")
    clone("bash", "-c", commands[committed])
    clone(sys.executable, "-m", "pipeline", "track")
    clone.restore()


def test_dvc_commit_after_an_edit_counts_under_no_seed(clone: Clone) -> None:
    """dvc.lock then says that the run is of the edited parameters."""
    clone.edit(train={"steps": 4})
    clone("dvc", "commit", "-q", "-f", "train")
    clone("git", "commit", "-qam", "committed by force")
    said = clone(sys.executable, "-m", "pipeline", "compare", "--from", "dvc", fails=True)
    assert "note: HEAD: its dvc.lock names other parameters than `train` ran with" in said
    clone("git", "reset", "-q", "--hard", "HEAD~1")
    clone("dvc", "checkout", "-q")
