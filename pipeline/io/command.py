"""DVC as a command, for the tools beside the stages."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

from pipeline.errors import UserError


def dvc(*arguments: str) -> str:
    """What a quick command prints. Raises UserError with what it says of its failure."""
    # Files, not pipes: the workers that `queue start` leaves behind would hold a pipe open until the queue is empty.
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        command = [sys.executable, "-m", "dvc", *arguments]
        status = subprocess.run(command, env=environment(), stdout=output, stderr=errors).returncode
        printed, said = (_text(file) for file in (output, errors))
    if status:
        error = re.search(r"^ERROR: (.+(?:\n.+)*)", said, re.MULTILINE)  # to the next empty line
        raise UserError(
            f"`dvc {arguments[0]}` failed: {error[1] if error else (said.strip() or 'without a word').splitlines()[-1]}"
        )
    return printed


def check_folder() -> None:
    """Raises UserError in a folder in which DVC 3.67 cannot run experiments beside the workspace (--temp, --queue): it
    takes the path for a URL and fails at its end, or says that it went well and keeps nothing."""
    path = str(Path.cwd())
    wrong = sorted({sign for sign in path if sign in "#?%" or not sign.isascii()})
    if wrong:
        raise UserError(
            f"{path}: DVC cannot run --temp or --queue experiments below a folder with {' '.join(wrong)} in its name; move "
            "the project (`dvc repro` and `dvc exp run` work here)"
        )


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", errors="replace")


def environment() -> dict[str, str]:
    """DVC's stages call `python`: the one that runs this comes first."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
