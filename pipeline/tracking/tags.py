"""The tags of a run in MLflow: where it came from, its verdict, its held-out gain."""

import os
import sys
from typing import Any

from pipeline.errors import UserError
from pipeline.paths import RUN_FILES
from pipeline.runs import provenance
from pipeline.runs.dvc_git import git
from pipeline.runs.results import gain_text

TAG_CHARACTERS = 5000  # every MLflow store keeps at least this much of a tag's value


def digests(run: dict[str, Any]) -> dict[str, str]:
    return {name: str(run.get(name, "")) for name in provenance.DIGESTS}


def run_tags(run: dict[str, Any], diagnosis: dict[str, Any], evaluate_key: str, measured: str) -> dict[str, str]:
    """Where the run came from, as of now. A tag whose value is unknown (no git, no experiment) keeps its earlier
    value."""
    commit, changes = _commit()
    tags = {
        "evaluate_key": evaluate_key,
        "measured": measured,  # what was evaluated on, and how
        **digests(run),
        "git_commit": commit,
        "mlflow.source.git.commit": commit,
        "git_dirty": None if changes is None else str(bool(changes)).lower(),
        "verdict": diagnosis["verdict"],
        "collapse_onset": str(diagnosis["onset"]).lower(),  # none: healthy
        "collapse_kinds": ", ".join(finding["kind"] for finding in diagnosis["findings"]) or "none",
        "cure": _cure(diagnosis),
        "dvc_exp_name": os.environ.get("DVC_EXP_NAME"),
        "dvc_exp_baseline_rev": os.environ.get("DVC_EXP_BASELINE_REV"),
    }
    return {key: value for key, value in tags.items() if value}


def _cure(diagnosis: dict[str, Any]) -> str:
    """The command of the cure, or where it is: a reward's list of words can make it long, MLflow would cut it, and half
    of it is another command."""
    command = diagnosis["cure"]["command"] if diagnosis["cure"] else "none"
    return command if len(command) <= TAG_CHARACTERS else f"in {RUN_FILES.diagnosis}"


def gain_tag(trained: Any) -> dict[str, str]:
    """The held-out gain, shown beside the verdict: a healthy run need not have learned."""
    return {"heldout_gain": gain_text(trained["difference"])} if trained else {}


def _commit() -> tuple[str | None, str | None]:
    """HEAD and the changes against it; None for both, and a note with git's message, if git fails."""
    try:
        changes = git("status", "--porcelain", "--untracked-files=normal", "--", ".", ":!reports", ":!dvc.lock")
        return git("rev-parse", "--verify", "HEAD"), changes
    except UserError as error:
        print(f"note: the run's commit is not recorded: {error}", file=sys.stderr)
        return None, None
