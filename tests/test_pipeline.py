"""The pipeline as a user runs it: `dvc repro` and `dvc exp run` in a clone, with sizes that finish quickly."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.clones import SMALL, Clone
from tests.hub import Hub
from tests.project import PINNED, PYTHIA

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Clone:
    """Reproduced once; the tests of this module take it as the ones before them leave it, committed."""
    made = Clone(tmp_path_factory.mktemp("clone") / "project", cache)
    assert made.ran(made("dvc", "repro")) == [
        "check",
        "prepare",
        "cache",
        "train",
        "evaluate",
        "diagnose",
        "plot",
        "track",
    ]
    made.commit()
    return made


def test_repro_leaves_everything_in_place_and_is_then_up_to_date(clone: Clone) -> None:
    assert "Data and pipelines are up to date" in clone("dvc", "repro")
    assert clone("git", "status", "--porcelain") == ""
    assert len(clone.read("reports/train/history.csv").splitlines()) == 1 + SMALL["steps"]
    run = json.loads(clone.read("reports/train/run.json"))
    assert clone.runs() == [run["train_key"]]
    assert not list((clone.root / ".checkpoints").glob("*/state-*.pt")), "committed outputs need no resume state"


def test_the_trained_policy_loads_with_transformers(clone: Clone) -> None:
    policy = AutoModelForCausalLM.from_pretrained(clone.root / "data/policy")
    tokenizer = AutoTokenizer.from_pretrained(clone.root / "data/policy")
    tokens = policy.generate(**tokenizer("Hi there, how", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(tokens[0]).startswith("Hi there, how")
    said = clone("python", "-m", "pipeline", "generate", "Hi there, how")
    assert said.count("Hi there, how") == 2


def test_another_reward_trains_once(clone: Clone) -> None:
    """`dvc repro` above and test_cure.py run what follows."""
    before = clone.runs()
    assert clone.ran(clone("dvc", "exp", "run", "-S", "reward=length", "train")) == ["check", "train"]
    added = set(clone.runs()) - set(before)
    assert len(added) == 1
    first = clone.read("reports/train/history.csv")
    clone.restore()
    again = clone("dvc", "exp", "run", "-S", "reward=length", "train")
    assert clone.ran(again) == [], "an identical run comes from the cache"
    assert clone.read("reports/train/history.csv") == first
    assert sorted(clone.runs()) == sorted({*before, *added})
    clone.restore()


def test_editing_a_reward_that_is_not_selected_never_retrains(clone: Clone) -> None:
    clone.edit(rewards={"length": {"kind": "length", "target": 33}})
    assert clone.ran(clone("dvc", "repro", "train")) == ["check"]
    assert list(json.loads(clone("dvc", "status", "--json"))) == ["evaluate"]
    clone.restore()


def test_a_wrong_selector_is_refused_before_anything_runs(clone: Clone) -> None:
    assert "nope" in clone("dvc", "exp", "run", "-S", "reward=nope", fails=True)
    clone.restore()
    assert "did you mean 'reward'?" in clone("dvc", "exp", "run", "-S", "+rewrad=length", fails=True)
    clone.restore()


@pytest.mark.exhaustive  # test_crash.py kills training, .ci/run compares a clean clone
def test_two_fresh_clones_give_the_same_lock_though_one_was_killed(clone: Clone, tmp_path: Path) -> None:
    """The second has caches of its own, another hash seed, umask, locale, time zone and folder for what is temporary;
    and all its processes are killed once it has trained a step."""
    other = Clone(tmp_path / "elsewhere" / "deep", tmp_path / "cache")
    (tmp_path / "tmp").mkdir()
    other.environment |= {"PYTHONHASHSEED": "7", "LC_ALL": "C", "TZ": "Asia/Kathmandu", "TMPDIR": str(tmp_path / "tmp")}
    old = os.umask(0o077)
    try:
        process = subprocess.Popen(["dvc", "repro"], cwd=other.root, env=other.environment, start_new_session=True,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        deadline = time.monotonic() + 600
        while not list((other.root / ".checkpoints").glob("*/state-00000001.pt")):
            assert time.monotonic() < deadline
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        other("dvc", "repro", "plot")
        assert unreadable(other.root) == []
        other("dvc", "repro")
        assert unreadable(other.root) == []
    finally:
        os.umask(old)
    assert other.read("dvc.lock") == clone.read("dvc.lock")
    assert len(other.runs()) == 1


def unreadable(root: Path) -> list[Path]:
    """What others may not read of a run's outputs, and the folders that they may not enter."""
    found = [path for folder in ("data", "reports") for path in (root / folder).rglob("*")]
    return [path for path in found if (0o755 if path.is_dir() else 0o644) & ~path.stat().st_mode]


@pytest.mark.exhaustive  # of the stages themselves: test_prepare.py and test_cache.py
def test_a_hub_model_and_dataset_pass_through_the_real_loading_code(
    tmp_path: Path, cache: Path, hub: Hub, oasst1: Path, pythia: Path
) -> None:
    hub.add("datasets", "OpenAssistant/oasst1", PINNED, oasst1)
    hub.add("models", PYTHIA, "step143000", pythia)
    made = Clone(tmp_path / "project", cache)
    made.environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
    out = made("dvc", "exp", "run", "-S", "model=pythia-70m", "-S", "prompts=oasst1", "evaluate")
    assert made.ran(out) == ["check", "prepare", "cache", "train", "evaluate"]
    run = json.loads(made.read("reports/train/run.json"))
    assert run["params"]["model.repo"] == PYTHIA
    assert (run["params"]["model"], run["params"]["prompts"]) == ("pythia-70m", "oasst1")
