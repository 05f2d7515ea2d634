"""Run the experiments of -S options in DVC's queue, each under its name, until all of them are finished.

An experiment is named after its parameters and the code as it stands. So the same command continues after an
interruption or a failure: finished experiments do not run again.
"""

import re
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.config.load import PARAMS_FILE, load_params
from pipeline.config.schema import Params
from pipeline.errors import UserError
from pipeline.file_io import sha256
from pipeline.runs.dvc_git import dvc, git, head_commit
from pipeline.runs.provenance import digest

POLL_SECONDS = 5.0  # between two looks at what is finished
QUEUE_EVERY = 4  # looks; asking DVC for the state of its queue takes seconds of a core
PATIENCE = 4  # looks at a queue on which no worker works
NAME_DIGITS = 16  # of the digest in a name; an experiment with the name of a finished one is not run again
ENDING = 12  # looks at workers that should end by themselves
PENDING = ("Queued", "Running")
ROW = re.compile(r"^[0-9a-f]{7} +(\S+) .*\b(Queued|Running|Failed|Success)\s*$", re.MULTILINE)
WORKERS = re.compile(r"Worker status: (\d+) active, (\d+) idle")


def run(wanted: dict[str, list[str]], commit: str, jobs: int) -> None:
    """Run the experiments that are not finished, `jobs` at a time, and wait. Raises UserError if DVC refuses an
    experiment, one fails, the queue stands still, or at Ctrl-C."""
    done = finished(wanted, commit)
    print(f"{len(wanted)} experiments, {len(done)} of them finished", flush=True)
    try:
        if len(done) < len(wanted):
            let_workers_end(commit)
        queue(wanted, commit)
        wait(wanted, commit, jobs)
    except KeyboardInterrupt:
        dvc("queue", "stop")
        raise UserError(
            "interrupted: running experiments end by themselves (`dvc queue stop --kill` ends them now), the others "
            "stay queued; the same command goes on"
        ) from None


def experiments(overrides: list[str], commit: str) -> dict[str, list[str]]:
    """The -S values of every combination, by the name of its experiment. Raises UserError for options that DVC cannot
    read."""
    every, state = combinations(overrides), code_state(commit)
    swept = [place for place, values in enumerate(zip(*every, strict=True)) if len(set(values)) > 1]
    return {
        experiment_name("sweep", [values[place].partition("=")[2] for place in swept], values, state): values
        for values in every
    }


def combinations(overrides: list[str]) -> list[list[str]]:
    """Every combination of the values that -S options give. Raises UserError for options that DVC cannot read."""
    from dvc.utils.hydra import get_hydra_sweeps  # slow to import, and only needed here

    try:
        return [each["params.yaml"] for each in get_hydra_sweeps({"params.yaml": overrides})]
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("hydra", "dvc"):
            raise
        raise UserError(f"-S: {str(error).partition('See https')[0]}; should be KEY=VALUE or KEY=VALUE,VALUE") from None


def experiment_name(prefix: str, words: list[str], values: list[str], state: list[Any]) -> str:
    """prefix-word-digest: the words for people, the digest of the -S values and of the code's state."""
    shown = [re.sub(r"\W+", "-", word)[-20:].strip("-_") for word in words]
    return "-".join([prefix, *shown, digest([state, values])[:NAME_DIGITS]])


def code_state(commit: str) -> list[Any]:
    """What an experiment starts from, besides its -S values."""
    return [commit, edits(commit)]


def edits(commit: str) -> dict[str, str | None]:
    """The files that differ from the commit, each with a digest of its content; None for a removed file. dvc.lock and
    reports/ are left out: runs leave them behind, and they make no other experiment. A diff would not do: the user's
    settings change its text."""
    options = ("--name-only", "-z", "--no-renames", "--relative", "--no-ext-diff", "--ignore-submodules=none")
    names = git("-c", "diff.autoRefreshIndex=true", "diff", *options, commit, "--", ".", ":!reports", ":!dvc.lock")
    paths = sorted(name for name in names.split("\0") if name)
    return {path: sha256(Path(path)) if Path(path).is_file() else None for path in paths}


def check(wanted: Iterable[list[str]]) -> None:
    """Raises UserError if params.yaml is not valid with the values of one experiment, before an hour of the others."""
    for values in wanted:
        params_with(values)


def params_with(values: list[str]) -> Params:
    """The parameters of params.yaml with -S values; the file stays as it is. Raises UserError if they are not valid."""
    from dvc.exceptions import DvcException
    from dvc.utils.hydra import apply_overrides

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, PARAMS_FILE.name)
        shutil.copyfile(PARAMS_FILE, copy)
        try:
            apply_overrides(copy, values)
            return load_params(copy)
        except UserError as error:
            raise UserError(f"-S {' -S '.join(values)}: {str(error).replace(str(copy), copy.name)}") from None
        except DvcException as error:
            raise UserError(f"-S {' -S '.join(values)}: {error.__cause__ or error}") from None


def finished(wanted: dict[str, list[str]], commit: str) -> set[str]:
    """The wanted experiments whose results DVC has."""
    return results(commit) & wanted.keys()


def results(commit: str) -> set[str]:
    """The names of all experiments of a commit whose results DVC has."""
    listing = git("for-each-ref", "--format=%(refname:lstrip=4)", f"refs/exps/{commit[:2]}/{commit[2:]}")
    return set(listing.split())


def let_workers_end(commit: str) -> None:
    """Wait some seconds until the workers that find nothing more in the queue have ended.

    A worker that is about to end may still take an experiment. It runs it but no longer answers DVC: nobody seems to
    work.
    """
    for _ in range(ENDING):
        states, workers = status()
        pending = {name for name, state in states.items() if state in PENDING}
        if not workers or pending - results(commit):  # DVC lists an experiment as pending for seconds after its result
            return
        time.sleep(POLL_SECONDS)


def queue(wanted: dict[str, list[str]], commit: str) -> None:
    """Queue the experiments that are neither finished nor in the queue."""
    done, states = finished(wanted, commit), status()[0]
    for place, (name, values) in enumerate(wanted.items(), start=1):
        if name in done or states.get(name) in PENDING:
            continue
        if name in states:  # failed, or its result was removed
            dvc("queue", "remove", name)
        raise_if_changed(name, values)
        options = [part for value in values for part in ("-S", value)]
        dvc("exp", "run", "--queue", "--name", name, *options)
        print(f"queued {place} of {len(wanted)}: {name}", flush=True)


def raise_if_changed(name: str, values: list[str]) -> None:
    """Raises UserError if the code or the commit has changed since the experiment was named: DVC would run the new
    code."""
    if not name.endswith(digest([code_state(head_commit()), values])[:NAME_DIGITS]):
        raise UserError(
            f"files or the commit changed since this command began, so {name} was not queued; undo that and repeat the "
            "command, which then goes on; or just repeat it, to begin anew with the change"
        )


def wait(wanted: dict[str, list[str]], commit: str, jobs: int) -> None:
    """Wait until every experiment is finished. Raises UserError if one failed, after the others have ended."""
    seen, idle, lost, looks, revived = finished(wanted, commit), 0, 0, 0, False
    if len(seen) < len(wanted):
        dvc("queue", "start", "--jobs", str(jobs))
    while len(seen) < len(wanted):
        time.sleep(POLL_SECONDS)
        looks, before, seen = looks + 1, seen, finished(wanted, commit)
        for number, name in enumerate(sorted(seen - before), start=len(before) + 1):
            print(f"finished {number} of {len(wanted)}: {name}", flush=True)
        if len(seen) == len(wanted) or (looks % QUEUE_EVERY and not lost):
            continue
        states, workers = status()
        left = sorted(wanted.keys() - finished(wanted, commit))  # one that is not pending either has failed
        pending = {name: states[name] for name in left if states.get(name) in PENDING}
        lost = lost + 1 if left and not pending else 0
        if lost > 1:  # twice in a row: DVC calls an experiment failed while it saves its results
            raise UserError(
                f"{len(left)} of {len(wanted)} experiments failed: {', '.join(left)}; {why(left[0])}; "
                "the same command tries them again"
            )
        idle = idle + 1 if pending and not workers else 0
        if idle >= PATIENCE:
            if revived:
                raise UserError(f"nobody works on the queue, {len(pending)} experiments are left: the same command")
            # A worker that ends may take experiments from the queue and never start them; DVC calls them running for
            # ever.
            if stuck := sorted(name for name, state in pending.items() if state == "Running"):
                dvc("queue", "kill", *stuck)
            queue(wanted, commit)
            dvc("queue", "start", "--jobs", str(jobs))
            idle, revived = 0, True
        if idle == 2 and "Queued" in pending.values():  # not at once: a second start beside a slow one doubles the jobs
            dvc("queue", "start", "--jobs", str(jobs))  # the workers of a sweep that was interrupted have gone


def status() -> tuple[dict[str, str], int]:
    """The state of each experiment that the queue knows, by name, and how many workers there are."""
    text = dvc("queue", "status")
    workers = WORKERS.search(text)
    # DVC may still list a removed experiment as failed. A pending one of the same name is sorted behind it and counts.
    rows = sorted(ROW.findall(text), key=lambda row: row[1] in PENDING)
    return dict(rows), sum(map(int, workers.groups())) if workers else 0


def why(name: str) -> str:
    """The line of an experiment's output that names its error, and how to see the rest."""
    try:
        lines = [line for line in dvc("queue", "logs", name).splitlines() if re.match("(error|ERROR):", line)]
    except UserError:
        lines = []
    return f"`dvc queue logs {name}` says why" + (f": {lines[0]}" if lines else "")
