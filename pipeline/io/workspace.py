"""Where what outlives one run is kept: resume states, locks and the tracking store."""

import hashlib
import os
from pathlib import Path

from ruamel.yaml import YAML


def root() -> Path:
    """The main workspace: $DVC_ROOT, which DVC sets for stages also inside --temp and --queue experiments, whose own
    folder is deleted afterwards; by hand, the current directory.
    """
    return Path(os.environ.get("DVC_ROOT") or ".").resolve()


def is_committed(run_json: str, lock: Path = Path("dvc.lock")) -> bool:
    """Whether dvc.lock has a run.json of this content, and a policy, as outputs of `train`: DVC then keeps both."""
    if not lock.is_file():
        return False
    stages = (YAML(typ="safe", pure=True).load(lock.read_text(encoding="utf-8")) or {}).get("stages", {})
    recorded = {out["path"]: str(out.get("md5")) for out in stages.get("train", {}).get("outs", [])}
    digest = hashlib.md5(run_json.encode(), usedforsecurity=False).hexdigest()
    return recorded.get("reports/train/run.json") == digest and recorded.get("data/policy", "").endswith(".dir")
