"""What a message advises helps: each test makes the state in which the message appears, and does what it says.

The other commands' advice is followed where their tests are: the store's in tests/test_tracking.py and
test_tracking_faults.py, the queue's in test_sweep.py.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clones import Clone
from tests.test_concurrency import end, tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    """A whole run, committed."""
    base = tmp_path_factory.mktemp("advice")
    made = tiny(base, base / "cache")
    made("dvc", "repro")
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
    clone(sys.executable, "-m", "pipeline.compare", "--from", "dvc", *names)
    return clone.read("reports/compare/table.csv")


def test_files_of_another_run(clone: Clone) -> None:
    first, lock = run_of(clone), clone.read("dvc.lock")
    clone.edit(train={"steps": 2})
    clone("dvc", "repro", "train")
    assert run_of(clone) != first

    # `dvc repro train` alone, and then `dvc exp save`, after which DVC takes all for right
    message, (forced,) = refused(clone, "pipeline.track")
    assert "reports/diagnosis.json, reports/evaluate/metrics.json" in message
    clone("dvc", "exp", "save", "--name", "saved")
    assert "up to date" in clone("dvc", "repro")
    assert refused(clone, "pipeline.track") == (message, [forced])
    assert refused(clone, "pipeline.plot")[1] == [forced.replace(" plot", "")]
    assert refused(clone, "pipeline.cure")[1] == [forced.replace(" plot", "")]
    assert ",1 not diagnosed," in compared(clone, "saved")
    clone("bash", "-c", forced)
    assert len(clone.runs()) == len(set(clone.runs())) == 2, "track has run"
    clone.commit()
    assert "not diagnosed" not in compared(clone)

    # the files that git has, without those that DVC has
    clone("git", "checkout", "-q", "HEAD~1")
    message, (checkout, forced) = refused(clone, "pipeline.track")
    assert message.startswith("error: reports/train/samples.jsonl, ") or "samples.jsonl" in message
    assert refused(clone, "pipeline.diagnose")[0].partition(": of")[0] in message
    clone("bash", "-c", checkout)
    assert (run_of(clone), clone.read("dvc.lock")) == (first, lock)
    clone(sys.executable, "-m", "pipeline.track")

    # a file that was edited by hand and committed: there is nothing that `dvc checkout` could bring back
    path = clone.root / "reports/train/samples.jsonl"
    path.chmod(0o644)
    content = path.read_bytes()
    path.unlink()  # it may be a link into the cache
    path.write_bytes(content.replace(b"0", b"1", 1))
    clone("dvc", "commit", "-q", "-f", "train")
    clone("bash", "-c", checkout)
    message, (_, forced) = refused(clone, "pipeline.track")
    assert message.startswith("error: reports/train/samples.jsonl: of another run than")
    clone("bash", "-c", forced)
    assert path.read_bytes() == content
    clone(sys.executable, "-m", "pipeline.track")
    clone.restore()


@pytest.mark.parametrize(
    ("path", "text"),
    [("reports/diagnosis.json", "{}"), ("reports/evaluate/measured.json", "[]"), ("reports/report.html", None),
     ("reports/prepare.json", None), ("reports/figures/reward.png", "no figure")],
)  # fmt: skip
def test_files_that_are_missing_or_broken(clone: Clone, path: str, text: str | None) -> None:
    for committed in (False, True):
        (clone.root / path).unlink()
        if text is not None:
            (clone.root / path).write_text(text)
        elif committed:
            continue
        if committed:  # DVC takes it for right
            clone("dvc", "commit", "-q", "-f")
        message, commands = refused(clone, "pipeline.track")
        assert path in message
        clone("bash", "-c", commands[committed])
        clone(sys.executable, "-m", "pipeline.track")
        clone("dvc", "repro")
    clone.restore()


def test_dvc_commit_after_an_edit_counts_under_no_seed(clone: Clone) -> None:
    """dvc.lock then says that the run is of the edited parameters."""
    clone.edit(train={"steps": 4})
    clone("dvc", "commit", "-q", "-f", "train")
    clone("git", "commit", "-qam", "committed by force")
    said = clone(sys.executable, "-m", "pipeline.compare", "--from", "dvc", fails=True)
    assert "note: HEAD: its dvc.lock names other parameters than `train` ran with" in said
    clone("git", "reset", "-q", "--hard", "HEAD~1")
    clone("dvc", "checkout", "-q")


def test_a_cure_that_was_tried_is_made_anew(clone: Clone) -> None:
    clone("dvc", "exp", "run", "-S", "recipe=notebook")
    said = clone(sys.executable, "-m", "pipeline.cure")
    name = re.findall(r"cure-[0-9a-f]{16}", said)[0]
    clone.commit()
    again = clone(sys.executable, "-m", "pipeline.cure")
    (command,) = re.findall(f"{name} has been tried: `([^`]+)` makes it anew", again)
    clone("bash", "-c", command)
    assert "to be tried, in a folder of its own" in clone(sys.executable, "-m", "pipeline.cure")


def test_dvcs_refusal_has_its_remedy(clone: Clone) -> None:
    """That a command of DVC holds its lock for ever, says DVC in three paragraphs; the last one is what to do."""
    holder = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        lock = {str(clone.root / "data/policy"): {"write": {"pid": holder.pid, "cmd": "dvc"}}}
        (clone.root / ".dvc/tmp/rwlock").write_text(json.dumps(lock))
        code = "from pipeline.io.command import dvc; from pipeline.errors import run_stage; import sys; sys.argv[1:] = []; "
        code += "run_stage(lambda: dvc('checkout', 'data/policy'))"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=clone.root, env=clone.environment, capture_output=True, text=True
        )
        assert done.returncode == 1
        assert re.search(r"manually remove '.*/rwlock' and try again\.$", done.stderr.strip())
        assert done.stderr.count("\n") == 1
    finally:
        holder.communicate(b"\n")
        Path(clone.root / ".dvc/tmp/rwlock").unlink()
