"""Sweeps over pretraining steps through DVC's queue, as docs/CHECKPOINTS.md has them: revisions of a hub model and
local models that `dvc add` tracks. Each experiment trains from its own checkpoint."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clones import Clone, end, tiny
from tests.experiments import experiments, run_queue
from tests.hub import Hub
from tests.project import PYTHIA
from tests.repositories import write_pythia

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]  # three more experiments of a queue


@pytest.fixture
def clone(tmp_path: Path, prepared: Path) -> Iterator[Clone]:
    made = tiny(tmp_path, prepared)
    yield made
    end(made)


def manifest(clone: Clone, folder: str) -> Any:
    """Of the checkpoint with this digest, from DVC's cache."""
    cache = clone.root.parent / "cache/dvc/files/md5"
    files = {file["relpath"]: file["md5"] for file in json.loads((cache / folder[:2] / folder[2:]).read_text())}
    digest = files["manifest.json"]
    return json.loads((cache / digest[:2] / digest[2:]).read_text())


def test_each_experiment_of_a_sweep_has_its_checkpoint(clone: Clone, hub: Hub, tmp_path: Path) -> None:
    commits = {
        step: hub.add("models", PYTHIA, step, write_pythia(tmp_path / step, None, seed=seed))
        for seed, step in enumerate(["step1000", "step2000"])
    }
    write_pythia(clone.root / "models/local/early", None, seed=2)
    clone("dvc", "add", "models/local/early")
    clone("git", "add", "models/local/early.dvc")
    clone.commit()
    clone.environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
    sweep = ("-S", "model=pythia-70m", "-S", "models.pythia-70m.revision=step1000,step2000", "-S", "train.threads=1")
    clone("dvc", "exp", "run", "--queue", *sweep, "train")
    clone("dvc", "exp", "run", "--queue", "-S", "models.pocket.source=models/local/early", "train")
    run_queue(clone, 3)

    made = experiments(clone).values()
    found = {one["run"]["params"].get("model.revision", "early"): one for one in made}
    policies = {step: manifest(clone, one["outputs"]["data/checkpoint"])["policy"] for step, one in found.items()}
    early = policies.pop("early")
    assert early["origin"] == "models/local/early"
    assert {step: (policy["origin"], policy["commit"]) for step, policy in policies.items()} == {
        step: (PYTHIA, commit) for step, commit in commits.items()
    }
    assert len({policy["files"]["model.safetensors"] for policy in (early, *policies.values())}) == 3
    for key in ("checkpoint", "train_key"):
        assert len({one["run"][key] for one in made}) == 3
    assert len({one["run"]["prompts"] for one in made}) == 1
    assert len({one["history"] for one in made}) == 3
