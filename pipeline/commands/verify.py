"""`reinforce verify`: does the committed code give the committed results on this machine?

Clones the commit into a temporary folder, runs `dvc repro` there without any cached result, and compares what dvc.lock
and reports/ say with what is committed. The workspace stays as it is.
"""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.arithmetic.environment import cpu_type
from pipeline.diagnosis.calibration import Row, null_statistics
from pipeline.errors import UserError
from pipeline.file_io import parse_csv
from pipeline.paths import REPORTS, RUN_FILES, RunFiles
from pipeline.runs.dvc_git import dvc, environment, git, head_commit
from pipeline.runs.results import read_result

ROUNDING = 1e-3  # relative, for the first step; other kernels change a token there in one run of some hundred
LAST_SHARE = 0.2  # of the steps; their mean reward is compared
TAIL = 0.005  # probability, on each side, that a batch of the same policy strays further


class Difference(NamedTuple):
    """The first cell of history.csv that differs."""

    step: int
    column: str
    committed: float
    found: float

    def __str__(self) -> str:
        return f"from step {self.step}, column {self.column}: {self.committed!r} committed, {self.found!r} here"


def main() -> None:
    """Raises UserError if the result differs, if nothing is committed, and if `dvc repro` fails."""
    commit = head_commit()
    history, diagnosis = (git("show", f"{commit}:./{file}") for file in (RUN_FILES.history, RUN_FILES.diagnosis))
    committed, verdict = parse_csv(history), json.loads(diagnosis)["verdict"]
    print(f"commit {commit[:12]} runs in a temporary folder, on {cpu_type()}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        git("clone", "--quiet", "--no-checkout", git("rev-parse", "--show-toplevel"), str(clone))
        git("-C", str(clone), "checkout", "--quiet", "--detach", commit)
        project = clone / git("rev-parse", "--show-prefix")
        # data that a user tracks by DVC lies in the cache
        (project / ".dvc/config.local").write_text(
            f"[cache]\n    dir = {Path(dvc('cache', 'dir').strip()).resolve()}\n"
        )
        if tracked := git("-C", str(project), "ls-files", "--", "*.dvc").splitlines():
            run_dvc(project, "checkout", "--quiet", *tracked)
        run_dvc(project, "repro", "--force", "--no-run-cache")
        changed = git("-C", str(project), "diff", "--name-only", "--relative").splitlines()
        if not changed:
            print("these are the committed bytes: every output in dvc.lock, every file of reports/")
            return
        files = RunFiles(project / REPORTS)
        run, found, calibration = (read_result(file) for file in (files.run, files.history, files.calibration))
        same_verdict = read_result(files.diagnosis)["verdict"] == verdict
    difference = first_difference(committed, found)
    if difference is None:
        raise UserError(f"another result: the training is the same to the byte, and these differ: {', '.join(changed)}")
    spread = null_statistics(calibration, run["params"]["train.prompts_per_step"])["reward_mean"]
    if run["arithmetic"] == "native" and same_verdict and is_alike(committed, found, spread.margin(TAIL)):
        print(
            f"another type of CPU, as native arithmetic has it: the first step is the same but for rounding, the last "
            f"rewards and the verdict are alike; {difference}"
        )
        return
    raise UserError(f"another result, {difference}")


def run_dvc(folder: Path, *arguments: str) -> None:
    """Run a DVC command in a folder and show its output as it comes. Raises UserError if the command fails."""
    variables = {name: value for name, value in environment().items() if not name.startswith(("DVC_", "MLFLOW_"))}
    status = subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=folder, env=variables).returncode
    if status:
        raise UserError(f"`dvc {arguments[0]}` failed with exit code {status}: its last lines above say why")


def first_difference(committed: Sequence[Row], found: Sequence[Row]) -> Difference | None:
    """Return the first cell that differs; a missing step or column counts as nan."""
    for step in range(max(len(committed), len(found))):
        ours, theirs = (rows[step] if step < len(rows) else {} for rows in (found, committed))
        for column in [*theirs, *(name for name in ours if name not in theirs)]:
            pair = theirs.get(column, math.nan), ours.get(column, math.nan)
            if column not in ours or column not in theirs or repr(pair[0]) != repr(pair[1]):
                return Difference(step, column, *pair)
    return None


def is_alike(committed: Sequence[Row], found: Sequence[Row], margin: float) -> bool:
    """Whether two runs differ only as runs on two CPUs do: the first step by rounding, the mean reward of the last
    steps by at most `margin`, which the sampling of one batch explains."""
    if len(committed) != len(found) or committed[0].keys() != found[0].keys():
        return False
    first = all(
        math.isclose(committed[0][name], found[0][name], rel_tol=ROUNDING, abs_tol=ROUNDING)
        or (math.isnan(committed[0][name]) and math.isnan(found[0][name]))
        for name in committed[0]
    )
    last = -max(1, round(LAST_SHARE * len(found)))
    means = [sum(row["reward_mean"] for row in rows[last:]) / -last for rows in (committed, found)]
    return first and abs(means[0] - means[1]) <= margin
