"""What the figures and the page show of a run, read from the files of the stages before `plot`."""

from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from pipeline.errors import UserError
from pipeline.file_io import flatten
from pipeline.paths import REPORTS, RunFiles
from pipeline.rl.metrics import HISTORY_COLUMNS
from pipeline.runs.consistency import all_samples, raise_if_mixed, sources
from pipeline.runs.results import Evaluation, how_to_remake, read_result


class Inputs(NamedTuple):
    """Everything that the figures and the page show."""

    history: pd.DataFrame
    samples: list[dict[str, Any]]  # the first completions of each step
    kept: dict[str, Any]  # how many completions there were, and which were kept
    all_samples: Path | None  # a file with all of them
    terms: list[dict[str, Any]]  # one row per step and term; empty if the trained reward is no sum
    run: dict[str, Any]
    evaluate: dict[str, Any]  # how it was evaluated, by dotted keys
    rewards: dict[str, Any]  # name -> Comparison
    text: dict[str, Any]  # Sides of text statistics
    ref_logprob: dict[str, Any]  # Sides, nats a token
    completions: list[dict[str, Any]]
    curve: list[dict[str, Any]]  # empty where nothing was measured during training
    prepare: dict[str, Any]
    diagnosis: dict[str, Any]
    trained: str  # the reward that training used
    sources: str  # digest over the files that all this was read from

    @property
    def params(self) -> dict[str, Any]:
        """The parameters of the run and of its evaluation."""
        curve = self.run.get("curve", {"every": 0})
        names = {"every": "evaluate.every", "prompts": "evaluate.curve_prompts"}
        told = {names[key]: value for key, value in curve.items()}
        told |= {"evaluate.independent": self.diagnosis["independent"]}
        return self.run["params"] | self.evaluate | told


def load(reports: Path = REPORTS) -> Inputs:
    """Read a folder of reports.

    Raises UserError for a file that is missing, that its stage did not write, or that belongs to another run.
    """
    files = RunFiles(reports)
    run, metrics, history = read_result(files.run), read_result(files.metrics), read_result(files.history)
    (measured,), _, _ = read_result(files.measured), read_result(files.summary), read_result(files.heldout)
    trained, rewards = run["params"]["reward"], metrics.keys() - Evaluation.__annotations__
    if trained not in rewards:
        raise UserError(
            f"{files.metrics}: has no reward {trained!r}, which run.json names; {how_to_remake('evaluate')}"
        )
    if missing := [name for name in HISTORY_COLUMNS if name not in history[0]]:
        raise UserError(f"{files.history}: has no column {missing[0]}; {how_to_remake('train')}")
    found = Inputs(
        history=pd.DataFrame(history),
        samples=read_result(files.samples),
        kept=read_result(files.kept),
        all_samples=all_samples(files),
        terms=read_result(files.terms),
        run=run,
        evaluate=flatten({"evaluate": measured["params"]}),
        rewards={name: metrics[name] for name in metrics if name in rewards},
        text=metrics["text"],
        ref_logprob=metrics["ref_logprob_per_token"],
        completions=read_result(files.completions),
        curve=read_result(files.curve),
        prepare=read_result(files.prepare),
        diagnosis=read_result(files.diagnosis),
        trained=trained,
        sources=sources(files),
    )
    raise_if_mixed("train", "evaluate", "diagnose", files=files)
    return found
