"""Where what outlives one run is kept: resume states, locks and the tracking store."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from ruamel.yaml import YAML


def root() -> Path:
    """The main workspace: $DVC_ROOT, which DVC sets for stages also inside --temp and --queue experiments, whose own
    folder is deleted afterwards; by hand, the current directory.
    """
    return Path(os.environ.get("DVC_ROOT") or ".").resolve()


def is_committed(run_json: str, lock: Path = Path("dvc.lock")) -> bool:
    """Whether dvc.lock has a run.json of this content, and a policy, as outputs of `train`, and DVC's cache the policy: in
    a fresh clone the lock is there and nothing else."""
    if not lock.is_file():
        return False
    stages = (YAML(typ="safe", pure=True).load(lock.read_text(encoding="utf-8")) or {}).get("stages", {})
    recorded = {out["path"]: str(out.get("md5")) for out in stages.get("train", {}).get("outs", [])}
    digest = hashlib.md5(run_json.encode(), usedforsecurity=False).hexdigest()
    policy = recorded.get("data/policy", "")
    return recorded.get("reports/train/run.json") == digest and policy.endswith(".dir") and _in_cache(policy)


def _in_cache(md5: str) -> bool:
    """Whether DVC's cache holds an output; where DVC does not say where its cache is, that the lock has it must do."""
    command = [sys.executable, "-m", "dvc", "cache", "dir"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode != 0 or (Path(done.stdout.strip()) / "files/md5" / md5[:2] / md5[2:]).exists()
