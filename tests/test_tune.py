"""`reinforce tune`: its options, what it runs, what it prints, and one small search on DVC's queue."""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.__main__ import build_parser
from pipeline.commands import tune
from pipeline.config.load import load_params
from pipeline.config.schema import Recipe
from pipeline.errors import UserError
from pipeline.file_io import write_json
from pipeline.runs import dvc_queue
from pipeline.runs.halving import Outcome
from tests.clones import end, tiny
from tests.project import ROOT

IDENTITY = {f"GIT_{who}_{what}": "a@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
QUICK = ("-S", "train.steps=4", "-S", "recipes.stable.warmup_steps=0", "-S", "recipes.stable.lr=2e-4")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "custom", tmp_path / "custom", ignore=shutil.ignore_patterns("__pycache__"))
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "start"]):
        git(*command)
    return tmp_path


def git(*arguments: str) -> str:
    environment = {**os.environ, **IDENTITY}
    return subprocess.run(["git", *arguments], check=True, env=environment, capture_output=True, text=True).stdout


def options(*arguments: str) -> argparse.Namespace:
    return build_parser().parse_args(["tune", *arguments])


def planned(*arguments: str) -> tune.Search:
    return tune.plan(options(*arguments))[0]


def outcome(mean: float | None, verdict: str = "healthy", onset: int | None = None) -> Outcome:
    ends = (None, None) if mean is None else (mean - 0.25, mean + 0.25)
    return Outcome(verdict, onset, {"mean": mean, "low": ends[0], "high": ends[1]})


def pretend(monkeypatch: pytest.MonkeyPatch, result: Callable[[str], Outcome]) -> list[dict[str, list[str]]]:
    """Experiments come to what `result` says of their names; the batches that are run."""
    batches: list[dict[str, list[str]]] = []
    monkeypatch.setattr(dvc_queue, "run", lambda wanted, commit, jobs: batches.append(wanted))
    monkeypatch.setattr(tune, "read_outcome", lambda name, commit, reward: result(name))
    return batches


# --- what is refused, before anything runs


def test_nothing_is_queued_of_other_code_than_its_name_says(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rungs are queued hours apart, and DVC queues what is there then."""
    name, values = planned("--trials", "2").experiment(1, 50)
    queued: list[str] = []
    monkeypatch.setattr(dvc_queue, "status", lambda: ({}, 0))
    monkeypatch.setattr(dvc_queue, "dvc", lambda *arguments: queued.append(arguments[4]))
    commit = git("rev-parse", "HEAD").strip()
    text = (repository / "params.yaml").read_text()
    (repository / "params.yaml").write_text(text.replace("seed: 0", "seed: 1"))
    with pytest.raises(UserError, match="files or the commit changed since this command began"):
        dvc_queue.queue({name: values}, commit)
    (repository / "params.yaml").write_text(text)
    dvc_queue.queue({name: values}, commit)
    git("commit", "-q", "--allow-empty", "-m", "another")
    with pytest.raises(UserError, match="files or the commit changed"):
        dvc_queue.queue({name: values}, commit)
    assert queued == [name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trials", "1"], r"^--trials 1: should be 2 to 64"),
        (["--trials", "65"], r"^--trials 65: should be 2 to 64"),
        (["--eta", "1"], r"^--eta 1: should be 2 to 64"),
        (["--jobs", "0"], r"^--jobs 0: should be 1 or more"),
        (["--seed", "-1"], r"^--seed -1: should be 0 to 4294967295"),
        (["-S", "seed=1,2"], r"^-S seed: tune takes one value of each key; `reinforce sweep` runs several"),
        (["-S", "seed"], r"^-S: .*should be KEY=VALUE"),
        (["-S", "reward=lenght"], r"^-S reward=lenght: params.yaml: reward: .* did you mean 'length'"),
        (["-S", "train.steps=0"], r"^-S train.steps=0: params.yaml: train.steps"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, repository: Path) -> None:
    with pytest.raises(UserError, match=message):
        planned(*arguments)


def test_a_reward_that_git_does_not_track_is_refused(repository: Path) -> None:
    git("rm", "-q", "--cached", "custom/example.py")
    with pytest.raises(UserError, match=r"^custom/example.py is not tracked by git"):
        planned()


def test_without_optuna_it_says_how_to_install_it(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"^optuna is not installed: pip install -e '.\[pipeline\]'$"):
        planned()


# --- what runs


def test_an_experiment_is_of_the_overrides_the_trial_and_the_rung(repository: Path) -> None:
    search = planned("-S", "reward=length", "-S", "++recipes.stable.lr=3e-5", "-S", "train.steps=40")
    assert search.steps == [10, 20, 40]
    assert search.trials[0] == {"lr": 3e-5, "kl_coef": 0.2}, "-S says where the search begins"
    name, values = search.experiment(0, 10)
    assert values == ["reward=length", "recipes.stable.lr=3e-05", "recipes.stable.kl_coef=0.2", "train.steps=10"]
    assert re.fullmatch("tune-10-3e-05-0-2-[0-9a-f]{16}", name)
    assert len({search.experiment(trial, steps)[0] for trial in range(8) for steps in search.steps}) == 24
    ran = dvc_queue.params_with(search.experiment(5, 20)[1])
    assert (ran.train.steps, ran.reward) == (20, "length")
    assert (ran.selected_recipe.lr, ran.selected_recipe.kl_coef) == tuple(search.trials[5].values())


def test_names_are_of_the_code_too_and_the_seed_only_searches(repository: Path) -> None:
    first = planned().experiment(0, 50)
    assert planned("--seed", "7", "--trials", "16").experiment(0, 50) == first, "what has run is not run again"
    assert planned("--seed", "7").trials != planned().trials
    assert planned("-S", "seed=1").experiment(0, 50)[0] != first[0]
    (repository / "custom/example.py").write_text("# other\n")
    assert planned().experiment(0, 50)[0] != first[0]


def test_the_least_rung_outlasts_the_warm_up(repository: Path) -> None:
    assert planned("-S", "train.steps=20").steps == [10, 20]  # stable warms up for 5
    assert planned("-S", "train.steps=20", "-S", "recipes.stable.warmup_steps=4").steps == [5, 10, 20]


def test_the_same_command_asks_for_the_same_runs(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By names: what is finished of them, the queue leaves out."""
    asked = []
    for _ in range(2):
        batches = pretend(monkeypatch, lambda name: outcome(float(int(name[-4:], 16))))
        outcomes = tune.run_all(planned(), jobs=1)
        asked.append((batches, outcomes))
    assert asked[0] == asked[1]
    assert [len(batch) for batch in asked[0][0]] == [8, 4, 2]


# --- what is printed


def search_of_four(repository: Path, *arguments: str) -> tuple[tune.Search, tune.Outcomes]:
    search = planned("--trials", "4", *arguments)
    short, full = search.steps
    outcomes = {
        (0, short): outcome(1.0), (1, short): outcome(9.0, "gibberish", 3), (2, short): outcome(2.0),
        (3, short): outcome(0.5), (2, full): outcome(4.0), (0, full): outcome(3.0),
    }  # fmt: skip
    return search, outcomes


def test_the_table_says_what_was_tried_the_best_first(repository: Path) -> None:
    search, outcomes = search_of_four(repository)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in tune.table(search, outcomes).splitlines()]
    assert rows[0] == ["trial", "lr", "kl_coef", "25 steps", "50 steps", "what became of it"]
    assert [row[0] for row in rows[2:]] == ["2", "0: as it stands", "3", "1"]
    assert rows[2][1:] == [*(f"{value:g}" for value in search.trials[2].values()),
        "+2 (+1.8 to +2.2)", "+4 (+3.8 to +4.2)", "best"]  # fmt: skip
    assert [row[-1] for row in rows[3:]] == ["healthy; others were better at 50", "healthy; others were better at 25",
        "gibberish from step 3: pruned at 25"]  # fmt: skip
    assert rows[5][-2] == ""


def test_the_best_recipe_is_ready_for_params_yaml(repository: Path) -> None:
    search, outcomes = search_of_four(repository, "-S", "recipes.stable.kl_coef=0.4")
    printed = tune.answer(search, outcomes, best=2)
    block = printed.partition("params.yaml:\n\n")[2].partition("Train with it")[0]
    text = (repository / "params.yaml").read_text()
    (repository / "params.yaml").write_text(text.replace("recipes:\n", f"recipes:\n{block}"))
    tuned = load_params().recipes["tuned"]
    assert tuned == search.params.recipes["stable"].model_copy(update=search.trials[2])
    assert tuned == dvc_queue.params_with(search.experiment(2, 50)[1]).recipes["stable"], "what ran"


def test_a_recipe_of_any_values_is_read_back(repository: Path) -> None:
    recipe = load_params().recipes["stable"].model_copy(
        update={"stop_strings": ("\n\n", "no", "# x: y", "'\"", "é" * 200, "é\u2028x", "a\x85"), "lr": 1e-05,
                "adam_eps": 1e-12}
    )  # fmt: skip
    block = tune.recipe_table("tuned", recipe)
    assert all(line.startswith("  ") for line in block.splitlines())
    tree = YAML(typ="safe", pure=True).load(f"recipes:\n{block}")
    assert type(recipe).model_validate(tree["recipes"]["tuned"]) == recipe
    older = YAML(typ="safe", pure=True)
    older.version = "1.1"
    assert older.load(f"recipes:\n{block}")["recipes"]["tuned"]["lr"] == 1e-05


def commands_of(printed: str) -> dict[str, list[str]]:
    found = re.findall(r"^([A-Z][\w ]+): +((?:dvc|reinforce) .*)$", printed, re.MULTILINE)
    return {title: shlex.split(command) for title, command in found}


def test_the_printed_commands_keep_the_overrides(repository: Path) -> None:
    given = ("reward=length", "recipe=stable", "recipes.stable.kl_coef=0.4", "seed=5", "rewards.embedding.target='a b'")
    search, outcomes = search_of_four(repository, *(part for each in given for part in ("-S", each)))
    commands = commands_of(tune.answer(search, outcomes, best=2))
    kept = ["-S", "reward=length", "-S", "rewards.embedding.target='a b'"]
    assert commands["Train with it"] == [
        "dvc",
        "exp",
        "run",
        "-S",
        "recipe=tuned",
        *kept[:2],
        "-S",
        "seed=5",
        *kept[2:],
    ]
    assert commands["Or take its run here"] == ["dvc", "exp", "apply", search.experiment(2, 50)[0]]
    confirm = commands["Confirm it"]
    assert confirm[:6] == ["reinforce", "sweep", "-S", "recipe=stable,tuned", "-S", "seed=range(6,9)"]
    assert confirm[6:] == [*kept[:2], "-S", "recipes.stable.kl_coef=0.4", *kept[2:]]
    build_parser().parse_args(confirm[1:])


def test_the_gain_is_set_beside_that_of_the_recipe_as_it_stands(repository: Path) -> None:
    search, outcomes = search_of_four(repository)
    printed = tune.answer(search, outcomes, best=2)
    assert "held-out gain +4 (95% interval +3.75 to +4.25) after 50 steps" in printed
    assert "the recipe as it stands: +3 (95% interval +2.75 to +3.25), healthy" in printed
    assert "note:" not in printed
    outcomes[0, 50] = outcome(3.8)
    assert "note: within that interval is also the gain of trial 0: it may be as good" in tune.answer(
        search, outcomes, 2
    )
    outcomes[2, 50] = outcome(0.1)
    assert "note: this gain may be chance" in tune.answer(search, outcomes, best=2)


def test_where_the_recipe_as_it_stands_is_the_best_nothing_is_to_change(repository: Path) -> None:
    search, outcomes = search_of_four(repository)
    printed = tune.answer(search, outcomes, best=0)
    assert printed.splitlines()[-1] == "Nothing to change: recipe stable of params.yaml is the best of what was tried."
    search, outcomes = search_of_four(repository, "-S", "recipes.stable.lr=3e-5")
    assert "    lr: 3.0e-05\n" in tune.answer(search, outcomes, best=0), "but it does where -S moved it"


def test_a_name_that_is_taken_is_not_given_again(repository: Path) -> None:
    params = load_params()
    assert tune.free_name(params) == "tuned"
    stable = params.recipes["stable"]
    taken = params.model_copy(update={"recipes": params.recipes | {"tuned": stable, "tuned-2": stable}})
    assert tune.free_name(taken) == "tuned-3"


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["gibberish", "mode", "gibberish", "gibberish"], r"no trial of 4 stayed healthy: 3 gibberish, 1 mode; search "
         r"around smaller steps, as -S recipes.stable.lr=1e-05, or see docs/COLLAPSE.md for these verdicts$"),
        (["starved"] * 4, r"no trial of 4 stayed healthy: 4 starved; neither a learning rate nor a KL strength mends "
         r"that: docs/COLLAPSE.md$"),
    ],
)  # fmt: skip
def test_where_all_collapse_it_fails_and_says_what_to_do(
    verdicts: list[str],
    expected: str,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = iter(verdicts)
    pretend(monkeypatch, lambda name: outcome(1.0, next(found), 3))
    with pytest.raises(UserError, match=expected):
        tune.main(options("--trials", "4"))
    assert capsys.readouterr().out.count(": pruned at 25") == 4, "and what was tried"


# --- what is read


def experiment(repository: Path, files: dict[str, Any]) -> str:
    """A finished experiment of HEAD with these reports; the commit of HEAD."""
    head = git("rev-parse", "HEAD").strip()
    for name, content in files.items():
        write_json(repository / "reports" / name, content)
    git("add", "-A")
    git("commit", "-qm", "experiment")
    git("update-ref", f"refs/exps/{head[:2]}/{head[2:]}/one", "HEAD")
    git("reset", "-q", "--hard", head)
    return head


DIAGNOSIS = {
    "verdict": "mode", "onset": 4, "headline": "", "steps": 9, "findings": [], "notes": [], "cure": None,
    "healthy_step": 3, "independent": "none", "over_optimisation": "", "best": None,
}  # fmt: skip
SIDE = {"mean": 1.0, "low": 0.5, "high": 2.0}
METRICS = {
    "length": {"checkpoint": SIDE, "policy": SIDE, "difference": {**SIDE, "mean": 0.75}, "win_rate": 0.5},
    "text": {"checkpoint": {}, "policy": {}}, "ref_logprob_per_token": {"checkpoint": 0.0, "policy": 0.0},
}  # fmt: skip


def test_verdict_and_gain_are_read_from_git(repository: Path) -> None:
    commit = experiment(repository, {"diagnosis.json": DIAGNOSIS, "evaluate/metrics.json": METRICS})
    assert not (repository / "reports").exists()
    assert tune.read_outcome("one", commit, "length") == Outcome("mode", 4, {"mean": 0.75, "low": 0.5, "high": 2.0})


@pytest.mark.parametrize("files", [{"diagnosis.json": DIAGNOSIS}, {"diagnosis.json": {}, "evaluate/metrics.json": {}}])
def test_an_experiment_without_its_reports_is_named(repository: Path, files: dict[str, Any]) -> None:
    commit = experiment(repository, files)
    with pytest.raises(UserError, match=r"^experiment one: .*; `dvc exp remove one`, then the same command$"):
        tune.read_outcome("one", commit, "length")


# --- a real one


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Iterator[Any]:
    """Without page and record, which take half of such a small run."""
    base = tmp_path_factory.mktemp("tuned")
    made = tiny(base, prepared)
    yaml = YAML()
    tree = yaml.load(made.root / "dvc.yaml")
    del tree["stages"]["plot"], tree["stages"]["track"]
    yaml.dump(tree, made.root / "dvc.yaml")
    made.commit()
    yield made
    end(made)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trials", "takes"),
    [
        (2, "2 of 4 steps: as many steps as 2 full runs, and 2 evaluations"),
        pytest.param(
            4,
            "4 of 2 steps, then 2 of 4 steps: as many steps as 4 full runs, and 6 evaluations",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_a_real_search_ends_with_a_recipe_and_runs_nothing_twice(trials: int, takes: str, clone: Any) -> None:
    command = ("python", "-m", "pipeline", "tune", "--trials", str(trials), "--jobs", "2", *QUICK)
    printed = clone(*command)
    assert f"{trials} trials of lr (2e-05 to 0.002) and kl_coef (0.025 to 1.6), the first one recipe stable" in printed
    assert f"\n{takes}; more if" in printed
    finished = clone("git", "for-each-ref", "--format=%(refname:lstrip=4)", "refs/exps")
    assert (finished.count("tune-2-"), finished.count("tune-4-") >= 2) == (4 if trials == 4 else 0, True)
    assert clone("git", "status", "--porcelain") == ""
    again = clone(*command)
    assert "queued" not in again
    start = "\n| trial"
    assert again[again.index(start) :] == printed[printed.index(start) :]
    clone(*commands_of(printed)["Or take its run here"])
    applied = YAML(typ="safe", pure=True).load(clone.read("params.yaml"))
    block = printed.partition("params.yaml:\n\n")[2].partition("Train with it")[0]
    tuned = YAML(typ="safe", pure=True).load(block)["tuned"]
    assert Recipe.model_validate(applied["recipes"]["stable"]) == Recipe.model_validate(tuned)
    clone("git", "reset", "-q", "--hard")
    clone("git", "clean", "-q", "-f", "-d")
