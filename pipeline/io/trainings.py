"""The trainings that were done, from either of their records: MLflow's store, or the experiments that DVC keeps in git.

Both say the same of the same training, so that a comparison does not depend on where it was read. mlflow takes seconds
to import and may not be installed, so it is imported inside functions.
"""

import contextlib
import csv
import functools
import hashlib
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML

from pipeline.errors import UserError
from pipeline.io import tracking
from pipeline.io.provenance import digest, flatten
from pipeline.params import SELECTORS, Params

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

HISTORY, DIAGNOSIS, EVALUATION = "reports/train/history.csv", "reports/diagnosis.json", "reports/evaluate/metrics.json"
EXPERIMENT = re.compile(r"(\w+) (\d+) refs/exps/([0-9a-f]{2}/[0-9a-f]{38})/(.+)")
Curve = dict[int, float]  # value by step; undefined ones are left out


class Training(NamedTuple):
    """What is known of one training."""

    name: str
    params: dict[str, str]  # selected ones by MLflow's names, values as MLflow writes them; `seed` is one
    code: str  # digest of the code that made it, ours and the user's; of its own kind in each record
    data: str  # digest of prompts and checkpoint; of its own kind in each record
    made: float  # seconds since 1970: of two trainings of the same, the later one counts
    columns: frozenset[str]  # of its history
    curve: Callable[[str], Curve]  # of a column
    gain: float | None  # held-out reward, trained policy minus checkpoint; None: not evaluated
    measured: str | None  # digest of the held-out prompts and of how the gain was measured on them; as `code`
    kinds: tuple[str, ...] | None  # findings of the verdict, the first one first; None: not diagnosed
    onset: int | None  # step of the first one


# --- MLflow's record


def from_mlflow() -> list[Training]:
    """Every finished run of the store. Raises UserError where there is no store, and within `readable` where it fails."""
    path = tracking.sqlite_file()
    if path and not path.is_file():
        return []  # looking must not make one
    tracking.defaults(timeout=30, retries=3)
    client, experiment = tracking.open_store()
    runs: list[Run] = []
    token = None
    while token != "":
        page = client.search_runs([experiment], "attributes.status = 'FINISHED'", page_token=token)
        runs, token = runs + list(page), page.token or ""
    return [_of_run(client, run) for run in runs if "train_key" in run.data.tags and "seed" in run.data.params]


def _of_run(client: "MlflowClient", run: "Run") -> Training:
    params, tags, metrics = dict(run.data.params), run.data.tags, run.data.metrics
    params.pop("processes", None)  # how it was launched: another number is the same experiment
    inputs = sorted(used.dataset.digest for used in run.inputs.dataset_inputs) if run.inputs else []

    @functools.cache
    def curve(column: str) -> Curve:
        points = client.get_metric_history(run.info.run_id, f"train/{column}")
        return {point.step: point.value for point in points if math.isfinite(point.value)}

    kinds = tags.get("collapse_kinds")
    return Training(
        name=tags.get("dvc_exp_name") or run.info.run_name,
        params=params,
        code=digest([tags.get("code"), tags.get("custom")]),
        data=digest(inputs),
        made=run.info.start_time / 1000,
        columns=frozenset(key.removeprefix("train/") for key in metrics if key.startswith("train/")),
        curve=curve,
        gain=metrics.get(f"evaluate/{params.get('reward')}/difference/mean"),
        measured=tags.get("measured"),
        kinds=None if kinds is None else tuple(kinds.split(", ")) if kinds != "none" else (),
        onset=int(tags["collapse_onset"]) if tags.get("collapse_onset", "none") != "none" else None,
    )


@contextlib.contextmanager
def readable(instead: str = ", or `--from dvc`") -> Iterator[None]:
    """Raises UserError with one line where the block finds MLflow missing or its store unreadable, and what to do
    `instead`."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        if error.name != "mlflow":
            raise
        raise UserError(f"mlflow is not installed: pip install -e '.[pipeline]'{instead}") from None
    except Exception as error:
        # mlflow's, SQLAlchemy's and alembic's own classes, which only they could name, and what the system says
        if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in (
            "mlflow",
            "sqlalchemy",
            "alembic",
        ):
            raise UserError(f"MLflow store {tracking.reason(error)}{instead}") from None
        raise


# --- DVC's record


def from_dvc(every_commit: bool) -> list[Training]:
    """HEAD itself and its experiments, or those of every commit, as git holds them: nothing else is needed to read them.

    Raises UserError outside a git repository.
    """
    head = _git("log", "-1", "--format=%H %ct")
    if head is None:
        raise UserError("DVC's experiments are commits of a git repository, and here is none; or read `--from mlflow`")
    commit, time = head.split()
    found = [_of_commit("HEAD", commit, float(time))]
    listing = _git("for-each-ref", "--format=%(objectname) %(committerdate:unix) %(refname)", "refs/exps") or ""
    for line in listing.splitlines():
        if (parts := EXPERIMENT.fullmatch(line)) and (every_commit or parts[3].replace("/", "") == commit):
            found.append(_of_commit(parts[4], parts[1], float(parts[2])))
    return [training for training in found if training]


def _of_commit(name: str, revision: str, made: float) -> Training | None:
    """The training whose results a commit holds; None for a commit without one, or of another age of the project."""
    stages = (YAML(typ="safe", pure=True).load(_show(revision, "dvc.lock") or "{}") or {}).get("stages", {})
    made_by_train = {out["path"]: out["md5"] for out in stages.get("train", {}).get("outs", [])}
    history = _result(revision, stages, "train", HISTORY, made_by_train)
    try:
        params = _params(stages["train"]["params"]["params.yaml"])
    except KeyError:
        params = {}
    if not history or not params:
        if made_by_train:
            print(
                f"note: {name}: its commit does not hold what its dvc.lock says of `train`; left out", file=sys.stderr
            )
        return None
    deps = [(dep["path"], dep["md5"]) for dep in stages["train"]["deps"]]
    rows = list(csv.DictReader(io.StringIO(history)))
    evaluation = json.loads(_result(revision, stages, "evaluate", EVALUATION, made_by_train) or "{}")
    diagnosis = json.loads(_result(revision, stages, "diagnose", DIAGNOSIS, made_by_train) or "{}")
    evaluate = stages.get("evaluate", {})
    heldout = [dep["md5"] for dep in evaluate.get("deps", []) if dep["path"] == "data/prompts"]
    return Training(
        name=name,
        params=params,
        code=digest([used for used in deps if not used[0].startswith("data/")]),
        data=digest([used for used in deps if used[0].startswith("data/")]),
        made=made,
        columns=frozenset(rows[0]) - {"step"} if rows else frozenset(),
        curve=lambda column: {
            int(row["step"]): value for row in rows if math.isfinite(value := float(row.get(column) or "nan"))
        },
        gain=evaluation.get(params["reward"], {}).get("difference", {}).get("mean"),
        measured=digest([heldout, evaluate.get("params", {}).get("params.yaml", {}).get("evaluate")])
        if evaluation
        else None,
        kinds=tuple(finding["kind"] for finding in diagnosis["findings"]) if diagnosis else None,
        onset=diagnosis.get("onset"),
    )


def _result(revision: str, stages: dict[str, Any], stage: str, path: str, made_by_train: dict[str, str]) -> str | None:
    """What a stage made of this training. An experiment of `train` alone still has the other stages' files of the commit
    that it started from: those are not its results."""
    entry, text = stages.get(stage, {}), _show(revision, path)
    used = {dep["path"]: dep["md5"] for dep in entry.get("deps", []) if dep["path"] in made_by_train}
    recorded = {out["path"]: out["md5"] for out in entry.get("outs", [])}
    fits = all(made_by_train[path] == md5 for path, md5 in used.items())
    if text is None or not fits or hashlib.md5(text.encode(), usedforsecurity=False).hexdigest() != recorded.get(path):
        return None
    return text


def _params(trained: dict[str, Any]) -> dict[str, str]:
    """The parameters that dvc.lock says `train` ran with, by MLflow's names and in its words: see tracking.log_params."""
    tables = {name: _dumped(table, f"{trained[name]}", trained) for name, table in SELECTORS.items()}
    chosen = {name: trained[name] for name in (*SELECTORS, "seed")}
    params = chosen | flatten({**tables, "train": _dumped("train", "", trained)})
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in params.items()}
    return {
        re.sub(r"[^\w\-. :]", "_", key)[:250]: text[: tracking.PARAM_CHARACTERS] for key, text in texts.items()
    }  # fmt: skip


def _dumped(section: str, name: str, trained: dict[str, Any]) -> Any:
    """A table with the defaults that the file leaves out, as train.py records it; as it is where it is of another age."""
    value = trained[f"{section}.{name}" if name else section]
    shape: Any = Params.model_fields[section].annotation
    try:
        checked = TypeAdapter(shape).validate_python({name: value} if name else value)
    except ValidationError:
        return value
    return (checked[name] if name else checked).model_dump()


def _show(revision: str, path: str) -> str | None:
    """A file of a commit; None where it has none of that name."""
    return _git("cat-file", "blob", f"{revision}:./{path}")


def _git(*arguments: str) -> str | None:
    """What a git command prints, None where it fails or there is no git."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True)
    except FileNotFoundError:
        return None
    return done.stdout.decode("utf-8") if done.returncode == 0 else None
