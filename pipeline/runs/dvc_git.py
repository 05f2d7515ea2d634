"""DVC and git as commands, for the tools beside the stages. Their error messages are passed on as they are.

Only the output of git's plumbing commands is read, since no setting of the user changes it.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from pipeline.config.schema import Reward
from pipeline.errors import UserError
from pipeline.rewards.custom_files import custom_rewards
from pipeline.runs import workspace


def dvc(*arguments: str) -> str:
    """Return the output of a quick DVC command. Raises UserError with DVC's message if it fails."""
    # Files, not pipes: the workers that `queue start` leaves behind would hold a pipe open until the queue is empty.
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        command = [sys.executable, "-m", "dvc", *arguments]
        status = subprocess.run(command, env=environment(), stdout=output, stderr=errors).returncode
        printed, said = (_text(file) for file in (output, errors))
    if status:
        raise UserError(f"`dvc {arguments[0]}` failed: {_refusal(said)}")
    return printed


def _refusal(said: str) -> str:
    """DVC's error message to its end: an empty line may stand between the error and the remedy."""
    text = re.split(r"^Having any troubles\?", said, maxsplit=1, flags=re.MULTILINE)[0]
    # progress and warnings come before the error; with -v its line begins with a time
    error = re.search(r"^(?:\d{4}-\S+ \S+ )?ERROR: (.+)", text, re.MULTILINE | re.DOTALL)
    return error[1] if error else (text.strip() or "without a word").splitlines()[-1]


def check_experiment_folder() -> None:
    """Raises UserError in the folder of a --temp or --queue experiment whose result DVC could not save."""
    if "DVC_EXP_NAME" in os.environ and Path.cwd() != workspace.root():
        check_folder()


def check_folder() -> None:
    """Raise UserError where DVC 3.67 cannot keep experiments that run beside the workspace (--temp, --queue).

    DVC takes the path for a URL, and cannot fetch into a shallow clone. It then fails at the end of the run, or reports
    success and keeps nothing.
    """
    path = str(workspace.root())
    wrong = sorted({sign for sign in path if sign in "#?%" or not sign.isascii()})
    if wrong:
        raise UserError(
            f"{path}: DVC cannot run --temp or --queue experiments below a folder with {' '.join(wrong)} in its name; "
            "move the project (`dvc repro` and `dvc exp run` work here)"
        )
    if git("-C", path, "rev-parse", "--is-shallow-repository") == "true":
        raise UserError(
            f"{path}: DVC keeps no --temp or --queue experiment in a shallow clone (`git clone --depth`); `git fetch "
            "--unshallow` first (`dvc repro` and `dvc exp run` work here)"
        )


def check_beside_workspace(rewards: Iterable[Reward]) -> None:
    """Call this before an experiment starts beside the workspace. Raises UserError as `check_folder` does, and if git
    does not track the file of a custom reward: the experiment would lack it, and `check` and `evaluate` read every
    reward."""
    check_folder()
    files = sorted({reward.function.partition(":")[0] for reward in custom_rewards(rewards)})
    tracked = git("ls-files", "--", *files).splitlines() if files else []
    for file in files:
        if Path(file).is_file() and file not in tracked:
            raise UserError(
                f"{file} is not tracked by git, and an experiment in a folder of its own has only what is: `git add "
                f"{file}` (`dvc exp apply` takes that back, `git commit` stays)"
            )


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", file.read().decode("utf-8", errors="replace"))  # colours


def git(*arguments: str) -> str:
    """Return the output of a git command. Raises UserError with git's message if it fails."""
    return git_bytes(*arguments).decode("utf-8", errors="surrogateescape").strip()


def git_bytes(*arguments: str, given: str = "") -> bytes:
    """The output of a git command as unchanged bytes; `given` is its input."""
    done = _run_git(*arguments, given=given)
    if done.returncode:
        said = done.stderr.decode("utf-8", errors="replace").strip()
        raise UserError(f"`git {arguments[0]}` failed: {said or f'exit code {done.returncode}'}")
    return done.stdout


def _run_git(*arguments: str, given: str = "") -> subprocess.CompletedProcess[bytes]:
    # `:!reports` must be read as a pattern, whatever the user's variables say; reading takes no lock
    variables = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_LITERAL_PATHSPECS": "0"}
    try:
        return subprocess.run(["git", *arguments], input=given.encode(), env=variables, capture_output=True)
    except OSError as error:
        raise UserError(f"git cannot be run: {error.strerror}") from None


def head_commit() -> str:
    """The commit that experiments start from. Raises UserError where there is none."""
    done = _run_git("rev-parse", "--verify", "--quiet", "HEAD^{commit}")
    if done.returncode == 1 and not done.stderr.strip():  # this is the only failure that git is quiet about
        raise UserError("this git repository has no commit yet, and experiments start from one: `git commit` first")
    return git("rev-parse", "--verify", "HEAD^{commit}")


def environment() -> dict[str, str]:
    """The environment for DVC. Its stages call `python`, so this Python's folder comes first in PATH."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
