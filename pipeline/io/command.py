"""DVC as a command, for the tools beside the stages."""

import os
import subprocess
import sys
from pathlib import Path

from pipeline.errors import UserError


def dvc(*arguments: str) -> str:
    """What a quick command prints. Raises UserError with its last line where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], env=environment(), capture_output=True, text=True
    )  # fmt: skip
    if done.returncode:
        raise UserError(f"`dvc {arguments[0]}` failed: {(done.stderr.strip() or 'without a word').splitlines()[-1]}")
    return done.stdout


def environment() -> dict[str, str]:
    """DVC's stages call `python`: the one that runs this comes first."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
