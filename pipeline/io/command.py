"""DVC as a command, for the tools beside the stages."""

import os
import re
import subprocess
import sys
from pathlib import Path

from pipeline.errors import UserError


def dvc(*arguments: str) -> str:
    """What a quick command prints. Raises UserError with what it says of its failure."""
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], env=environment(), capture_output=True, text=True
    )  # fmt: skip
    if done.returncode:
        said = done.stderr.strip() or "without a word"
        error = re.search(r"^ERROR: (.+(?:\n.+)*)", said, re.MULTILINE)  # to the next empty line
        raise UserError(f"`dvc {arguments[0]}` failed: {error[1] if error else said.splitlines()[-1]}")
    return done.stdout


def environment() -> dict[str, str]:
    """DVC's stages call `python`: the one that runs this comes first."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
