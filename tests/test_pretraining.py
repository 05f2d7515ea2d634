"""A sweep over the pretraining steps of a hub model, as docs/CHECKPOINTS.md has it: each experiment has its checkpoint."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clones import Clone
from tests.conftest import PYTHIA
from tests.hub import Hub
from tests.repositories import write_pythia
from tests.test_concurrency import end, experiments, run_queue, tiny

pytestmark = pytest.mark.slow


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Clone]:
    made = tiny(tmp_path, tmp_path / "cache")
    yield made
    end(made)


def manifest(clone: Clone, folder: str) -> Any:
    """Of the checkpoint with this digest, from DVC's cache."""
    cache = clone.root.parent / "cache/dvc/files/md5"
    files = {file["relpath"]: file["md5"] for file in json.loads((cache / folder[:2] / folder[2:]).read_text())}
    digest = files["manifest.json"]
    return json.loads((cache / digest[:2] / digest[2:]).read_text())


def test_revisions_of_a_model_are_queued_and_each_is_trained_from(clone: Clone, hub: Hub, tmp_path: Path) -> None:
    commits = {
        step: hub.add("models", PYTHIA, step, write_pythia(tmp_path / step, None, seed=seed))
        for seed, step in enumerate(["step1000", "step2000"])
    }
    clone.environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
    sweep = ("-S", "model=pythia-70m", "-S", "models.pythia-70m.revision=step1000,step2000", "-S", "train.threads=1")
    clone("dvc", "exp", "run", "--queue", *sweep)
    run_queue(clone, 2)
    found = {made["run"]["params"]["model.revision"]: made for made in experiments(clone).values()}
    policies = {
        step: manifest(clone, made["outputs"]["data/checkpoint"])["policy"] for step, made in found.items()
    }  # fmt: skip
    assert {step: (policy["origin"], policy["commit"]) for step, policy in policies.items()} == {
        step: (PYTHIA, commit) for step, commit in commits.items()
    }
    one, other = found["step1000"], found["step2000"]
    assert policies["step1000"]["files"]["model.safetensors"] != policies["step2000"]["files"]["model.safetensors"]
    for key in ("checkpoint", "train_key"):
        assert one["run"][key] != other["run"][key]
    assert one["run"]["prompts"] == other["run"]["prompts"]
    assert one["history"] != other["history"]
