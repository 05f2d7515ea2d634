"""A run's files for a notebook: tables as DataFrames, the rest as dicts, and the figures inline."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.errors import UserError
from pipeline.paths import RunFiles
from pipeline.runs.consistency import all_samples
from pipeline.runs.results import how_to_remake, read_result


@dataclass(frozen=True)
class Picture:
    """A PNG that Jupyter shows where it is the last value of a cell."""

    file: Path
    png: bytes

    def __repr__(self) -> str:
        return f"Picture({str(self.file)!r})"

    def _repr_png_(self) -> bytes:
        return self.png


@dataclass(frozen=True)
class LoadedRun:
    """The files of the run in a project's folder. Each file is read when it is first asked for, so that a fresh
    checkout has what is committed. UserError names the stage that makes a missing file."""

    folder: Path

    @cached_property
    def files(self) -> RunFiles:
        return RunFiles(self.folder / "reports")

    @cached_property
    def history(self) -> pd.DataFrame:
        """A row per step."""
        return pd.DataFrame(read_result(self.files.history)).astype({"step": int}).set_index("step", drop=False)

    @cached_property
    def calibration(self) -> pd.DataFrame:
        """A row per batch of the reference."""
        return pd.DataFrame(read_result(self.files.calibration))

    @cached_property
    def samples(self) -> pd.DataFrame:
        """The first completions of each training step, with their rewards and advantages."""
        return pd.DataFrame(read_result(self.files.samples))

    @cached_property
    def all_samples(self) -> pd.DataFrame:
        """Every completion sampled in training; UserError where `train.keep_samples` is some."""
        if (path := all_samples(self.files)) is None:
            raise UserError(
                f"{self.files.kept}: some completions were kept, in {self.files.samples.name}; all are "
                "with train.keep_samples: all"
            )
        return pd.read_parquet(path)

    @cached_property
    def terms(self) -> pd.DataFrame:
        """A row per step and term of the trained sum; empty for other rewards."""
        return pd.DataFrame(read_result(self.files.terms))

    @cached_property
    def completions(self) -> pd.DataFrame:
        """Completions of held-out prompts, by the reference (`checkpoint`) and by the trained policy."""
        return pd.DataFrame(read_result(self.files.completions))

    @cached_property
    def curve(self) -> pd.DataFrame:
        """A row per measured step and reward of the held-out curve; empty without `evaluate.every`."""
        return pd.DataFrame(read_result(self.files.curve))

    @cached_property
    def summary(self) -> dict[str, Any]:
        return dict(read_result(self.files.summary))

    @cached_property
    def diagnosis(self) -> dict[str, Any]:
        return dict(read_result(self.files.diagnosis))

    @cached_property
    def metrics(self) -> dict[str, Any]:
        return dict(read_result(self.files.metrics))

    @cached_property
    def params(self) -> dict[str, Any]:
        return dict(read_result(self.files.run)["params"])

    @property
    def verdict(self) -> str:
        return str(self.diagnosis["verdict"])

    def plot(self, name: str = "overview") -> Picture:
        """A figure of the stage `plot`, by the name of its file: overview, reward, variance, collapse, evaluate, and
        curve where there is one."""
        figures = {file.stem: file for file in sorted(self.files.figures.glob("*.png"))}
        if not figures:
            raise UserError(f"{self.files.figures}: no figures; {how_to_remake('plot')}")
        if name not in figures:
            raise UserError(f"no figure {name!r}; there are {', '.join(figures)}")
        return Picture(figures[name], figures[name].read_bytes())


def load_run(path: str | Path = ".") -> LoadedRun:
    """The run whose `reports` lie in a folder. Raises UserError where there are none."""
    folder = Path(path).expanduser()
    if not (folder / "reports").is_dir():
        raise UserError(f"{folder / 'reports'}: no such folder; give the folder of a project, or run `dvc repro`")
    return LoadedRun(folder)
