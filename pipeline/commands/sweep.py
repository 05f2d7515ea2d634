"""`reinforce sweep -S recipe=notebook,stable -S 'seed=range(0,3)'`: an experiment for each combination of values, by
DVC's queue, then their comparison. The same command continues a sweep that was interrupted or had failed
experiments."""

import argparse
import subprocess
import sys

from pipeline.config.load import load_params
from pipeline.errors import UserError
from pipeline.runs import dvc_queue
from pipeline.runs.dvc_git import check_beside_workspace, environment, head_commit


def main(options: argparse.Namespace) -> None:
    """Raises UserError if an override is malformed or not valid, DVC refuses an experiment, one fails, or the queue
    stands still."""
    if options.jobs < 1:
        raise UserError(f"--jobs {options.jobs}: should be 1 or more")
    check_beside_workspace(load_params().rewards.values())
    commit = head_commit()  # DVC keeps experiments under this commit
    wanted = dvc_queue.experiments(options.overrides, commit)
    dvc_queue.check(wanted.values())
    dvc_queue.run(wanted, commit, options.jobs)
    command = ["-m", "pipeline", "compare", "--from", "dvc", *wanted]
    sys.exit(subprocess.run([sys.executable, *command], env=environment()).returncode)
