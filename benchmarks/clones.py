"""A clone of the current commit in which a benchmark runs the stages themselves."""

import os
import subprocess
from pathlib import Path

from pipeline.config.load import PARAMS_FILE
from pipeline.runs.dvc_git import head_commit

MADE = "made.txt"  # in a clone: what its prompts and checkpoint were made for; gone with another commit


def environment(clone: Path) -> dict[str, str]:
    """The clone's own code, whatever is installed."""
    return os.environ | {"PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1"}


def make_clone(folder: Path) -> Path:
    """A clone of the current commit; an older one is brought to it, and prepares anew."""
    here, commit = Path.cwd(), head_commit()
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["git", "clone", "--quiet", "--no-checkout", here, folder], check=True)
    at = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True).stdout
    if at.strip() != commit or not (folder / PARAMS_FILE.name).exists():
        (folder / MADE).unlink(missing_ok=True)
        subprocess.run(["git", "fetch", "--quiet", here, commit], cwd=folder, check=True)
        subprocess.run(["git", "checkout", "--quiet", "--force", "--detach", commit], cwd=folder, check=True)
    return folder
