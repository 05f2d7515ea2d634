"""Reads what the stages before `plot` wrote. Anything missing, broken or of another run is one
line that names the file and the stage."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from pydantic import TypeAdapter, ValidationError

from pipeline.errors import UserError
from pipeline.file_io import read_json, read_jsonl
from pipeline.paths import REPORTS, RunFiles
from pipeline.report.schema import Comparison, Completion, Diagnosis, Sample, Sides, Train
from pipeline.runs.consistency import how_to_remake, raise_if_mixed, sources

COLUMNS = (  # of history.csv, as far as the figures use them
    "step", "reward_mean", "reward_se", "reward_std_within", "reward_std_between", "zero_spread_share", "baseline",
    "entropy", "ref_kl_k1", "ref_kl_k3", "ref_logprob", "policy_logprob", "logprob_gap", "grad_norm",
    "completion_tokens", "ended_share", "empty_share", "distinct_completions", "distinct_2", "repeated_3grams",
    "top_token_share", "nonfinite",
)  # fmt: skip
NOT_REWARDS = ("text", "ref_logprob_per_token")  # the other keys of evaluate's metrics


class Inputs(NamedTuple):
    """Everything that the figures and the page show."""

    history: pd.DataFrame
    samples: list[dict[str, Any]]
    run: dict[str, Any]
    rewards: dict[str, Any]  # name -> Comparison
    text: dict[str, Any]  # Sides of text statistics
    ref_logprob: dict[str, Any]  # Sides, nats a token
    completions: list[dict[str, Any]]
    prepare: dict[str, Any]
    diagnosis: dict[str, Any]
    trained: str  # the reward that training used
    sources: str  # digest over the files that all this is from


def load(reports: Path = REPORTS) -> Inputs:
    """Reads the reports folder. Raises UserError (one line) for what is missing or is not what a stage writes, or is of another
    run than the rest."""
    run = _checked(reports / "train/run.json", Train, "train")
    for name in ("model", "reward", "recipe", "seed"):
        if name not in run["params"]:
            raise UserError(f"{reports}/train/run.json: params has no {name}; {how_to_remake('train')}")
    metrics_file = reports / "evaluate/metrics.json"
    metrics = _checked(metrics_file, dict[str, Any], "evaluate")
    rewards = {name: value for name, value in metrics.items() if name not in NOT_REWARDS}
    _check(metrics_file, rewards, dict[str, Comparison], "evaluate")
    for name in NOT_REWARDS:
        _check(metrics_file, metrics.get(name), Sides, "evaluate", name)
    trained = str(run["params"]["reward"])
    if trained not in rewards:
        raise UserError(f"{metrics_file}: has no reward {trained!r}, which run.json names; {how_to_remake('evaluate')}")
    _checked(reports / "train/summary.json", dict[str, Any], "train")
    _checked(reports / "evaluate/measured.json", list[dict[str, Any]], "evaluate")
    found = Inputs(
        history=_history(reports / "train/history.csv"),
        samples=_samples(reports / "train/samples.jsonl"),
        run=run,
        rewards=rewards,
        text=metrics["text"],
        ref_logprob=metrics["ref_logprob_per_token"],
        completions=_checked(reports / "evaluate/completions.jsonl", list[Completion], "evaluate"),
        prepare=_checked(reports / "prepare.json", dict[str, Any], "prepare"),
        diagnosis=_checked(reports / "diagnosis.json", Diagnosis, "diagnose"),
        trained=trained,
        sources=sources(RunFiles(reports)),
    )
    raise_if_mixed("train", "diagnose", "evaluate", files=RunFiles(reports))
    return found


def _history(path: Path) -> pd.DataFrame:
    try:
        history = pd.read_csv(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {how_to_remake('train')}") from None
    except (ValueError, UnicodeDecodeError) as error:  # pandas' parser errors are ValueErrors
        raise UserError(f"{path}: not a CSV table: {error}; {how_to_remake('train')}") from None
    missing = [name for name in COLUMNS if name not in history]
    if missing:
        raise UserError(f"{path}: has no column {missing[0]}; {how_to_remake('train')}")
    if history.empty:
        raise UserError(f"{path}: has no rows; {how_to_remake('train')}")
    for name in COLUMNS:
        numbers = pd.to_numeric(history[name], errors="coerce")
        wrong = history[name][numbers.isna() & history[name].notna()]
        if len(wrong):
            raise UserError(f"{path} row {wrong.index[0] + 1}: {name} = {wrong.iloc[0]!r} is not a number")
        history[name] = numbers
    if history["step"].isna().any() or not history["step"].is_monotonic_increasing:
        raise UserError(f"{path}: steps must be numbers that increase; {how_to_remake('train')}")
    return history


def _samples(path: Path) -> list[dict[str, Any]]:
    rows = _checked(path, list[Sample], "train")
    for number, row in enumerate(rows, start=1):
        if len({len(row[name]) for name in ("tokens", "pieces", "token_logprobs")}) > 1:
            raise UserError(
                f"{path} row {number}: tokens, pieces and token_logprobs differ in length; {how_to_remake('train')}"
            )
    return rows


def _checked(path: Path, shape: Any, stage: str) -> Any:
    """The value of a JSON or JSONL file after a check of its shape."""
    try:
        value = read_jsonl(path) if path.suffix == ".jsonl" else read_json(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {how_to_remake(stage)}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON: {error}; {how_to_remake(stage)}") from None
    _check(path, value, shape, stage)
    return value


def _check(path: Path, value: Any, shape: Any, stage: str, *inside: str) -> None:
    try:
        TypeAdapter(shape).validate_python(value)
    except ValidationError as failure:
        first = failure.errors()[0]
        where = ".".join(map(str, (*inside, *first["loc"]))) or "the file"
        raise UserError(f"{path}: {where}: {first['msg'].lower()}; {how_to_remake(stage)}") from None
