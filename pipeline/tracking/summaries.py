"""The finished runs, from either of their records: MLflow's store, or the experiments that DVC keeps in git.

Both give the same comparison. What identifies a run is read from the digests that `train` recorded, never from the
params that MLflow shows. mlflow takes seconds to import and may not be installed, so functions import it.
"""

import contextlib
import functools
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline import paths
from pipeline.config.schema import SELECTORS, Params
from pipeline.errors import UserError
from pipeline.file_io import parse_csv
from pipeline.paths import RUN_FILES
from pipeline.runs.consistency import JUDGED, digests_in, evaluates, measured_in
from pipeline.runs.dvc_git import git, git_bytes, head_commit
from pipeline.runs.provenance import digest, flat_params, params_digests
from pipeline.tracking import mlflow_store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

LOCK, HISTORY, SUMMARY, DIAGNOSIS, EVALUATION, MEASURED = (
    file.as_posix()
    for file in (
        paths.LOCK, RUN_FILES.history, RUN_FILES.summary, RUN_FILES.diagnosis, RUN_FILES.metrics, RUN_FILES.measured
    )
)  # fmt: skip
EXPERIMENT = re.compile(r"(\w+) (\d+) refs/exps/([0-9a-f]{2}/[0-9a-f]{38})/(.+)")
Curve = dict[int, float]  # value by step; undefined ones are left out


class RunSummary(NamedTuple):
    """What is known of one run."""

    name: str
    params: dict[str, str]  # the selected params; names and cut values as MLflow shows them; `seed` is one
    config: str  # digest of all params but the seed, uncut: runs that share it are seeds of one configuration
    code: str  # digest of the code that made it, ours and the user's
    data: str  # digest of prompts and checkpoint
    made: float  # seconds since 1970: of two runs of one configuration and seed, the later one counts
    columns: frozenset[str]  # columns of its history
    curve: Callable[[str], Curve]  # of a column
    gain: float | None  # held-out reward, trained policy minus reference; None: not evaluated
    gain_interval: tuple[float, float] | None  # its 95% interval; None: one prompt only, or not evaluated
    measured: str | None  # digest of the held-out prompts and of how the gain was measured on them
    kinds: tuple[str, ...] | None  # findings of the verdict, the first one first; None: not diagnosed
    onset: int | None  # step of the first one


# --- MLflow's record


def from_mlflow() -> list[RunSummary]:
    """Return every finished run of the store. Raises UserError where there is no store or it cannot be read."""
    path = mlflow_store.sqlite_file()
    if path and not path.is_file():
        return []  # reading must not create a store
    mlflow_store.defaults(timeout=30, retries=3)
    client, experiment = mlflow_store.open_store()
    runs: list[Run] = []
    token = None
    while token != "":
        page = client.search_runs([experiment], "attributes.status = 'FINISHED'", page_token=token)
        runs, token = runs + list(page), page.token or ""
    return _with_config(
        [_of_run(client, run) for run in runs if "train_key" in run.data.tags and "seed" in run.data.params]
    )


def _of_run(client: "MlflowClient", run: "Run") -> RunSummary:
    params, tags, metrics = dict(run.data.params), run.data.tags, run.data.metrics
    params.pop("processes", None)  # how the run was launched: with another number it is the same experiment
    inputs: list[str | None] = [tags.get("prompts"), tags.get("checkpoint")]
    if None in inputs:  # the run is older than these tags
        inputs = [*sorted(used.dataset.digest for used in run.inputs.dataset_inputs)] if run.inputs else []

    @functools.cache
    def curve(column: str) -> Curve:
        points = client.get_metric_history(run.info.run_id, f"train/{column}")
        return {point.step: point.value for point in points if math.isfinite(point.value)}

    kinds, gained = tags.get("collapse_kinds"), f"evaluate/{params.get('reward')}/difference"
    return RunSummary(
        name=tags.get("dvc_exp_name") or run.info.run_name,
        params=params,
        config=tags.get("config", ""),
        code=digest([tags.get("code"), tags.get("custom")]),
        data=digest(inputs),
        made=run.info.start_time / 1000,
        columns=frozenset(key.removeprefix("train/") for key in metrics if key.startswith("train/")),
        curve=curve,
        gain=metrics.get(f"{gained}/mean"),
        gain_interval=_interval(metrics.get(f"{gained}/low"), metrics.get(f"{gained}/high")),
        measured=tags.get("measured"),
        kinds=None if kinds is None else tuple(kinds.split(", ")) if kinds != "none" else (),
        onset=int(tags["collapse_onset"]) if tags.get("collapse_onset", "none") != "none" else None,
    )


def _interval(low: float | None, high: float | None) -> tuple[float, float] | None:
    return None if low is None or high is None else (low, high)


def _with_config(found: list[RunSummary]) -> list[RunSummary]:
    """Fill in `config` for runs that are older than the tag.

    They get the `config` of a run with the same params, else a digest of their own. Params that MLflow may have cut
    identify nothing: such a run stands alone.
    """

    def shown(training: RunSummary) -> dict[str, str]:
        return {key: value for key, value in training.params.items() if key != "seed"}

    known = {digest(shown(training)): training.config for training in found if training.config}

    def config(training: RunSummary) -> str:
        cut = any(len(value) >= mlflow_store.PARAM_CHARACTERS for value in training.params.values())
        of_params = digest([training.name, training.params, training.made] if cut else shown(training))
        return training.config or known.get(of_params, of_params)

    return [training._replace(config=config(training)) for training in found]


@contextlib.contextmanager
def readable(instead: str = ", or `--from dvc`") -> Iterator[None]:
    """Raises a one-line UserError if the block finds MLflow missing or its store unreadable. instead: what else to
    do."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        if error.name != "mlflow":
            raise
        raise UserError(f"mlflow is not installed: pip install -e '.[pipeline]'{instead}") from None
    except Exception as error:
        # system errors, and the own classes of mlflow, SQLAlchemy and alembic, which may not be installed
        if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in (
            "mlflow",
            "sqlalchemy",
            "alembic",
        ):
            raise UserError(f"MLflow store {mlflow_store.describe_error(error)}{instead}") from None
        raise


# --- DVC's record


def from_dvc(every_commit: bool) -> list[RunSummary]:
    """Return the runs of HEAD and its experiments, or of every commit, read from git alone.

    Raises UserError outside a git repository, and where git refuses.
    """
    try:
        commit = head_commit()
        time = git("rev-list", "--max-count=1", "--timestamp", commit).split()[0]
        listing = git("for-each-ref", "--format=%(objectname) %(committerdate:unix) %(refname)", "refs/exps")
    except UserError as error:
        raise UserError(f"DVC's experiments are kept in git: {error}; or read `--from mlflow`") from None
    found = [_of_commit("HEAD", commit, float(time))]
    for line in listing.splitlines():
        if (parts := EXPERIMENT.fullmatch(line)) and (every_commit or parts[3].replace("/", "") == commit):
            found.append(_of_commit(parts[4], parts[1], float(parts[2])))
    return [training for training in found if training]


def _of_commit(name: str, revision: str, made: float) -> RunSummary | None:
    """The run whose results a commit holds; None for a commit without a run, or of another version of the project."""
    files = _show(revision, LOCK, HISTORY, SUMMARY, DIAGNOSIS, EVALUATION, MEASURED)
    try:
        stages = (YAML(typ="safe", pure=True).load(files[LOCK] or "") or {}).get("stages", {})
        recorded = {
            stage: {out["path"]: out["md5"] for out in entry.get("outs", [])} for stage, entry in stages.items()
        }
        made_by_train = recorded.get("train", {})
        if not made_by_train:
            return None
        locked = stages["train"]["params"]["params.yaml"]
        chosen, tables = {name: locked[name] for name in (*SELECTORS, "seed")}, _tables(locked)
        deps = [(dep["path"], dep["md5"]) for dep in stages["train"]["deps"]]
    except (YAMLError, AttributeError, KeyError, TypeError):
        _left_out(name, "its dvc.lock is not one that this version reads")
        return None
    history = files[HISTORY]
    held = {path: _md5(text) for path in (HISTORY, SUMMARY) if (text := files[path]) is not None}
    if history is None or any(held.get(path) != made_by_train.get(path) for path in (HISTORY, SUMMARY)):
        _left_out(name, "its commit does not hold what its dvc.lock says of `train`")
        return None
    run = digests_in(_json(files[SUMMARY]))  # empty in commits from before summary.json had digests
    if run and _sha256(history) != run.get("history.csv"):
        _left_out(name, f"{HISTORY} and {SUMMARY} are of different runs")
        return None
    models = {name: table for name, table in tables.items() if isinstance(table, BaseModel)}
    digests = params_digests(chosen, models)
    # tables of another version of the project cannot be validated, and tell nothing
    if run and len(models) == len(tables) and digests["written_params"] != run.get("written_params"):
        _left_out(name, "its dvc.lock names other parameters than `train` ran with, as after `dvc commit -f`")
        return None
    tables |= {name: table.model_dump() for name, table in models.items()}
    names = {name: chosen[name] for name in SELECTORS}
    evaluation, diagnosis = _evaluation(files, stages, recorded, run), _diagnosis(files, stages, recorded, run)
    difference = evaluation[0].get(chosen["reward"], {}).get("difference", {}) if evaluation else {}
    rows = parse_csv(history)
    return RunSummary(
        name=name,
        params=mlflow_store.param_texts(chosen | flat_params(tables)),
        config=run.get("config") or digest([names, tables]),
        code=digest(
            [run["code"], run["custom"]] if run else [used for used in deps if not used[0].startswith("data/")]
        ),
        data=digest(
            [run["prompts"], run["checkpoint"]] if run else [used for used in deps if used[0].startswith("data/")]
        ),
        made=made,
        columns=frozenset(rows[0]) - {"step"},
        curve=lambda column: {
            int(row["step"]): row[column] for row in rows if math.isfinite(row.get(column, math.nan))
        },
        gain=difference.get("mean"),
        gain_interval=_interval(difference.get("low"), difference.get("high")),
        measured=evaluation[1] if evaluation else None,
        kinds=tuple(finding["kind"] for finding in diagnosis["findings"]) if diagnosis else None,
        onset=diagnosis["onset"] if diagnosis else None,
    )


def _left_out(name: str, why: str) -> None:
    print(f"note: {name}: {why}; left out", file=sys.stderr)


Files = dict[str, str | None]  # of a commit, by path


def _evaluation(
    files: Files, stages: dict[str, Any], recorded: dict[str, dict[str, str]], run: dict[str, str]
) -> tuple[dict[str, Any], str] | None:
    """Return metrics.json and a digest of what was evaluated and how; None where they belong to another run.

    An experiment of `train` alone still has the files of the commit that it started from, and `dvc exp save` records
    them as its own.
    """
    text = files[EVALUATION]
    if text is None:
        return None
    if run:
        measured = measured_in(_json(files[MEASURED]))
        if not evaluates(measured, run) or measured["metrics.json"] != _sha256(text):
            return None
        return _json(text), digest([measured["prompts"], measured["params"]])
    if not _up_to_date("evaluate", EVALUATION, text, stages, recorded):
        return None
    heldout = [dep["md5"] for dep in stages["evaluate"].get("deps", []) if dep["path"] == "data/prompts"]
    return _json(text), digest([heldout, stages["evaluate"].get("params", {}).get("params.yaml", {}).get("evaluate")])


def _diagnosis(
    files: Files, stages: dict[str, Any], recorded: dict[str, dict[str, str]], run: dict[str, str]
) -> dict[str, Any] | None:
    """diagnosis.json; None where it is not of this run."""
    text, history = files[DIAGNOSIS], files[HISTORY]
    diagnosis = _json(text)
    if text is None or history is None or not {"findings", "onset"} <= diagnosis.keys():
        return None
    if diagnosis.get("history", None if run else _sha256(history)) != _sha256(history):
        return None
    told = digests_in(diagnosis)  # older commits have none
    if any(run.get(name) != value for name, value in told.items() if name in JUDGED):
        return None
    return diagnosis if run or _up_to_date("diagnose", DIAGNOSIS, text, stages, recorded) else None


def _up_to_date(stage: str, path: str, text: str, stages: dict[str, Any], recorded: dict[str, dict[str, str]]) -> bool:
    """Return whether dvc.lock says that a stage made this file from this run.

    In older commits the files do not say so themselves.
    """
    used = {dep["path"]: dep["md5"] for dep in stages.get(stage, {}).get("deps", [])}
    fits = all(used[path] == md5 for path, md5 in recorded["train"].items() if path in used)
    return fits and recorded.get(stage, {}).get(path) == _md5(text)


def _tables(locked: dict[str, Any]) -> dict[str, Any]:
    """The tables that dvc.lock says `train` ran with, validated; those of another version of the project as they
    are."""
    found = {name: _table(table, f"{locked[name]}", locked) for name, table in SELECTORS.items()}
    return found | {"train": _table("train", "", locked)}


def _table(section: str, name: str, locked: dict[str, Any]) -> Any:
    value = locked[f"{section}.{name}" if name else section]
    shape: Any = Params.model_fields[section].annotation
    try:
        checked = TypeAdapter(shape).validate_python({name: value} if name else value)
    except ValidationError:
        return value
    return checked[name] if name else checked


def _json(text: str | None) -> Any:
    """The content of a JSON file; an empty table where there is none."""
    try:
        return json.loads(text or "{}")
    except ValueError:
        return {}


def _md5(text: str) -> str:
    """The md5 by which DVC names contents."""
    return hashlib.md5(text.encode("utf-8", errors="surrogateescape"), usedforsecurity=False).hexdigest()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", errors="surrogateescape")).hexdigest()


def _show(revision: str, *paths: str) -> Files:
    """Files of a commit as git holds them; None for a file that it lacks. Raises UserError as `git` does."""
    done = git_bytes("cat-file", "--batch", given="".join(f"{revision}:./{path}\n" for path in paths))
    files: Files = {}
    for path in paths:
        line, _, done = done.partition(b"\n")
        if line.endswith(b" missing"):
            files[path] = None
            continue
        size = int(line.split()[-1])
        files[path], done = done[:size].decode("utf-8", errors="surrogateescape"), done[size + 1 :]
    return files
