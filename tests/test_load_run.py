"""`pipeline.load_run`, and the example notebook that shows it."""

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import pipeline
from pipeline.errors import UserError
from tests.project import ROOT


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed results: those in the folder may be of a user's own run."""
    folder = tmp_path_factory.mktemp("checkout")
    files = ["reports", "docs/example.ipynb", "params.yaml"]
    archive = subprocess.run(["git", "archive", "HEAD", *files], cwd=ROOT, capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def test_a_checkout_has_what_is_committed(checkout: Path) -> None:
    run = pipeline.load_run(checkout)
    assert isinstance(run.history, pd.DataFrame)
    assert len(run.history) == run.summary["steps"] == run.diagnosis["steps"]
    assert list(run.history.index) == list(run.history["step"])
    assert run.verdict == "healthy"
    assert "length" in run.metrics
    assert run.plot()._repr_png_().startswith(b"\x89PNG")
    assert "reward.png" in repr(run.plot("reward"))


def test_what_is_missing_is_said_in_one_line(checkout: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reports: no such folder; give the folder of a project"):
        pipeline.load_run(tmp_path)
    (tmp_path / "reports").mkdir()
    run = pipeline.load_run(str(tmp_path))
    for name, stage in (("history", "train"), ("calibration", "train"), ("samples", "train"), ("params", "train"),
                        ("completions", "evaluate"), ("metrics", "evaluate"), ("verdict", "diagnose")):  # fmt: skip
        with pytest.raises(UserError, match=f"no such file; run `dvc repro {stage}`"):
            getattr(run, name)
    with pytest.raises(UserError, match="no figures; run `dvc repro plot`"):
        run.plot()
    with pytest.raises(UserError, match="no figure 'x'; there are collapse, evaluate"):
        pipeline.load_run(checkout).plot("x")


def test_importing_the_package_stays_light() -> None:
    heavy = {"pandas", "torch", "matplotlib", "pydantic"}
    code = f"import sys, pipeline; pipeline.load_run; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_example_notebook_shows_what_its_cells_give(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs every cell as Jupyter does, from the notebook's folder, and compares what it holds."""
    notebook = checkout / "docs/example.ipynb"
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    monkeypatch.chdir(notebook.parent)
    namespace: dict[str, Any] = {}
    compared = 0
    for cell in cells:
        tree = ast.parse("".join(cell["source"]))
        if isinstance(tree.body[-1], ast.Expr):
            shown = ast.Assign([ast.Name("shown", ast.Store())], tree.body[-1].value)
            tree.body[-1] = ast.copy_location(shown, tree.body[-1])
        namespace["shown"] = None
        exec(compile(ast.fix_missing_locations(tree), str(notebook), "exec"), namespace)
        printed, given = capsys.readouterr().out, namespace["shown"]
        [output] = cell["outputs"]
        if "run.files." in "".join(cell["source"]):  # of files that a checkout has only after `dvc repro`
            continue
        held = output["text"] if output["output_type"] == "stream" else output["data"]["text/plain"]
        assert "".join(held) in (printed, repr(given))
        compared += 1
    assert compared >= 6
    assert notebook.stat().st_size < 250_000
