"""The main workspace, where resume states, locks and the tracking store are kept."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ruamel.yaml import YAML

from pipeline.paths import LOCK, POLICY, RUN_FILES


def root() -> Path:
    """The main workspace: $DVC_ROOT, or by hand the current directory. DVC sets $DVC_ROOT for stages, also inside
    --temp and --queue experiments, whose own folder is deleted afterwards.
    """
    return Path(os.environ.get("DVC_ROOT") or ".").resolve()


def resume_folder(train_key: str) -> Path:
    """Where a run keeps its resume states and the times of its steps."""
    return root() / ".checkpoints" / train_key


def is_committed(run_json: str, lock: Path = LOCK, untold: Mapping[str, Any] = MappingProxyType({})) -> bool:
    """Return whether DVC has committed this run.

    dvc.lock has this run.json and a policy as outputs of `train`, and DVC's cache has the policy: a fresh clone has the
    lock alone. untold: values of params.yaml, by key, that `train` depends on and run.json leaves out; those in
    dvc.lock have to be equal.
    """
    if not lock.is_file():
        return False
    stages = (YAML(typ="safe", pure=True).load(lock.read_text(encoding="utf-8")) or {}).get("stages", {})
    stage = stages.get("train", {})
    recorded = {out["path"]: str(out.get("md5")) for out in stage.get("outs", [])}
    told = stage.get("params", {}).get("params.yaml", {})
    if any(told.get(key, value) != value for key, value in untold.items()):
        return False
    digest = hashlib.md5(run_json.encode(), usedforsecurity=False).hexdigest()
    policy = recorded.get(POLICY.as_posix(), "")
    return recorded.get(RUN_FILES.run.as_posix()) == digest and policy.endswith(".dir") and _in_cache(policy)


def _in_cache(md5: str) -> bool:
    """Whether DVC's cache holds an output; True where DVC does not say where its cache is."""
    command = [sys.executable, "-m", "dvc", "cache", "dir"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode != 0 or (Path(done.stdout.strip()) / "files/md5" / md5[:2] / md5[2:]).exists()
