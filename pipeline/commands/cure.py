"""`reinforce cure`: runs the recommended change as an experiment and lays both runs side by side.

The experiment has a folder of its own (`dvc exp run --temp`): the workspace keeps its reports. Writes
reports/cure.html.
"""

import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from pipeline.config.load import load_params
from pipeline.config.overrides import option
from pipeline.errors import UserError
from pipeline.file_io import write_text
from pipeline.paths import REPORTS, RUN_FILES
from pipeline.report import cure_figure, cure_page, style
from pipeline.report.inputs import Inputs, load
from pipeline.runs.dvc_git import check_beside_workspace, dvc, environment, git
from pipeline.runs.provenance import digest

PAGE = REPORTS / "cure.html"


def main() -> None:
    """Raises UserError where there is no up-to-date run to cure, no change to try, or where DVC fails."""
    if not RUN_FILES.diagnosis.is_file():
        raise UserError(f"{RUN_FILES.diagnosis}: no such file; run `dvc repro` first")
    collapsed = load()
    refuse_stale()
    diagnosis = collapsed.diagnosis
    if diagnosis["verdict"] == "healthy":
        print(
            f"nothing to cure in this folder: {diagnosis['headline']} `dvc exp apply NAME` brings an experiment here, "
            "`dvc exp show` has their names"
        )
        return
    if not diagnosis["cure"]:
        raise UserError(f"{diagnosis['verdict']}: no change of params.yaml is known to cure it; see docs/COLLAPSE.md")
    changes = diagnosis["cure"]["changes"]
    name = experiment_name(collapsed)
    command = ["dvc", "exp", "run", "--temp", "--name", name]
    command += [part for key, value in changes.items() for part in ("-S", option(key, value))]
    revision = find(name)
    if revision:
        print(f"{name} has been tried: `dvc exp remove {name}` makes it anew", flush=True)
    else:
        print(f"to be tried, in a folder of its own: {shlex.join(command)}", flush=True)
        revision = run(command, name)
    with tempfile.TemporaryDirectory() as folder:
        after = fetch(revision, name, Path(folder) / REPORTS)
    figure, narrow = (style.png(cure_figure.overlay(collapsed, after, narrow=phone)) for phone in (False, True))
    write_text(PAGE, cure_page.render(collapsed, after, figure, narrow, name))
    answer = cure_page.answer(collapsed, after)
    print(f"{answer.title}: {answer.text} Both runs side by side: {PAGE}")


def refuse_stale() -> None:
    """Raises UserError unless the reports are those of the code and parameters that the experiment would start from."""
    changed = json.loads(dvc("status", "--json", "--with-deps", "evaluate", "diagnose"))
    if changed:
        raise UserError(
            f"the run in {REPORTS} is of other code, data or parameters ({', '.join(changed)}); run `dvc repro`"
        )


def experiment_name(run: Inputs) -> str:
    """The same name for the same training, held-out evaluation and changes, whatever the commit."""
    parts = [run.run["train_key"], run.diagnosis["cure"]["changes"], run.rewards]
    return f"cure-{digest(parts)[:16]}"


def find(name: str) -> str | None:
    """The revision of a finished experiment of this name, on any commit."""
    return next(iter(git("for-each-ref", "--format=%(objectname)", f"refs/exps/*/*/{name}").split()), None)


def run(command: list[str], name: str) -> str:
    """Run the experiment, show its output as it comes, and return its revision."""
    check_beside_workspace(load_params().rewards.values())
    process = subprocess.Popen([sys.executable, "-m", *command], env=environment())
    try:
        status = process.wait()
    except KeyboardInterrupt:  # Ctrl-C has reached DVC too, which saves and tidies up
        process.wait()
        raise UserError("interrupted; the same command goes on from the last saved step") from None
    revision = find(name)
    if status or not revision:
        raise UserError(f"`dvc exp run` failed with exit code {status}: its last lines above say why")
    return revision


def fetch(revision: str, name: str, folder: Path) -> Inputs:
    """The experiment's reports, read from git and DVC's cache."""
    from dvc.api import DVCFileSystem  # slow to import, and only needed here

    try:
        DVCFileSystem(rev=revision).get(str(REPORTS), str(folder), recursive=True)
        return load(folder)
    except (OSError, UserError) as error:
        said = (
            str(error).replace(str(folder), str(REPORTS)).partition("; run `dvc repro")[0]
        )  # that advice is for the workspace
        raise UserError(f"experiment {name}: {said}; `dvc exp remove {name}`, then try again") from None
