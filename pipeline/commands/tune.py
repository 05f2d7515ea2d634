"""`reinforce tune -S model=mine -S reward=length`: a learning rate and a KL strength for a model, prompts and a reward.

Successive halving on DVC's queue: many short runs, then longer runs of the better ones. A collapsed run is pruned by
its verdict, the others are judged by their held-out gain. Each run is an experiment named after its parameters and the
code, so the same command continues after an interruption.
"""

import argparse
import io
import re
import shlex
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from ruamel.yaml import YAML

from pipeline.config.load import load_params
from pipeline.config.overrides import override
from pipeline.config.schema import Params, Recipe
from pipeline.diagnosis.verdict import TITLES
from pipeline.errors import UserError
from pipeline.paths import RUN_FILES, RunFiles
from pipeline.report.table import markdown_table
from pipeline.runs import dvc_queue
from pipeline.runs.dvc_git import check_beside_workspace, git_bytes, head_commit
from pipeline.runs.halving import (
    Outcome,
    Range,
    best_first,
    next_runs,
    places,
    ranking,
    rungs,
    search_space,
    trial_values,
    winner,
)
from pipeline.runs.results import Interval, gain_text, read_result

MOST_TRIALS = 64  # more trials of two values would differ by little
CAUSES = ("misaligned", "starved")  # verdicts that no learning rate and no KL strength mends

Outcomes = dict[tuple[int, int], Outcome]


class Search(NamedTuple):
    """The trials, and how a trial becomes an experiment."""

    params: Params  # with the -S values
    space: dict[str, Range]  # by key of the recipe
    overrides: list[str]  # the -S values, as given
    trials: list[dict[str, float]]  # values by the same keys; the first trial is the recipe as it stands
    steps: list[int]  # of each rung
    eta: int
    state: list[Any]  # the code that the experiments start from

    def experiment(self, trial: int, steps: int) -> tuple[str, list[str]]:
        """Name and -S values of a trial's run."""
        searched = {f"recipes.{self.params.recipe}.{key}": value for key, value in self.trials[trial].items()}
        searched["train.steps"] = steps
        values = [each for each in self.overrides if key_of(each) not in searched]
        values += [override(key, value) for key, value in searched.items()]
        words = [str(steps), *map(str, self.trials[trial].values())]
        return dvc_queue.experiment_name("tune", words, values, self.state), values


def main(options: argparse.Namespace) -> None:
    """Raises UserError for options that are not valid, where an experiment fails, and where every trial collapsed."""
    search, note = plan(options)
    print(announcement(search))
    if note:
        print(f"note: {note}")
    outcomes = run_all(search, options.jobs)
    print(f"\n{table(search, outcomes)}\n{legend(search.params)}\n")
    best = winner(search.steps, outcomes)
    if best is None:
        raise UserError(nothing_healthy(search, outcomes))
    print(answer(search, outcomes, best))


def plan(options: argparse.Namespace) -> tuple[Search, str]:
    """The search, and a note on it. Raises UserError for options that are not valid, before anything runs."""
    for name, value, least, most in (
        ("trials", options.trials, 2, MOST_TRIALS), ("eta", options.eta, 2, MOST_TRIALS),
        ("jobs", options.jobs, 1, None), ("seed", options.seed, 0, 2**32 - 1),
    ):  # fmt: skip
        if value < least or (most is not None and value > most):
            raise UserError(f"--{name} {value}: should be {least} " + (f"to {most}" if most else "or more"))
    values, *others = dvc_queue.combinations(options.overrides)
    if others:
        several = next(each for each, other in zip(values, others[-1], strict=True) if each != other)
        raise UserError(f"-S {key_of(several)}: tune takes one value of each key; `reinforce sweep` runs several")
    params = dvc_queue.params_with(values)
    check_beside_workspace(params.rewards.values())
    space, note = search_space(params.selected_recipe)
    trials = trial_values(space, options.trials, options.seed)
    least = params.selected_recipe.warmup_steps + 1  # a run that ends in its warm-up tells nothing of the learning rate
    steps = rungs(params.train.steps, options.eta, least, len(trials))
    state = dvc_queue.code_state(head_commit())
    return Search(params, space, values, trials, steps, options.eta, state), note


def key_of(value: str) -> str:
    """The key of a -S value, without Hydra's + or ++."""
    return value.partition("=")[0].lstrip("+")


def run_all(search: Search, jobs: int) -> Outcomes:
    """Run the search to its end. Returns the outcome of every run."""
    commit = search.state[0]
    outcomes: Outcomes = {}
    while batch := next_runs(len(search.trials), search.steps, search.eta, outcomes):
        named = {run: search.experiment(*run) for run in batch}
        print(f"\n{batch[0][1]} steps: trials {', '.join(str(trial) for trial, _ in batch)}", flush=True)
        dvc_queue.run(dict(named.values()), commit, jobs)
        for run, (name, _) in named.items():
            outcomes[run] = read_outcome(name, commit, search.params.reward)
            tried = ", ".join(f"{key} {value:g}" for key, value in search.trials[run[0]].items())
            print(f"trial {run[0]} ({tried}): {gain_text(outcomes[run].gain)}, {verdict(outcomes[run])}", flush=True)
    return outcomes


def read_outcome(name: str, commit: str, reward: str) -> Outcome:
    """Verdict and held-out gain of a finished experiment, read from git."""
    ref = f"refs/exps/{commit[:2]}/{commit[2:]}/{name}"
    with TemporaryDirectory() as folder:
        files = RunFiles(Path(folder))
        try:
            for target, source in ((files.diagnosis, RUN_FILES.diagnosis), (files.metrics, RUN_FILES.metrics)):
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(git_bytes("cat-file", "blob", f"{ref}:./{source.as_posix()}"))
            diagnosis, metrics = read_result(files.diagnosis), read_result(files.metrics)
            return Outcome(diagnosis["verdict"], diagnosis["onset"], metrics[reward]["difference"])
        except (UserError, KeyError) as error:
            said = str(error).replace(folder, "reports").partition("; run `dvc repro")[0]
            raise UserError(f"experiment {name}: {said}; `dvc exp remove {name}`, then the same command") from None


# --- what is printed


def announcement(search: Search) -> str:
    """The text that says what is searched and how many steps that takes."""
    sizes = places(len(search.trials), len(search.steps), search.eta)
    work = sum(room * steps for room, steps in zip(sizes, search.steps, strict=True)) / search.steps[-1]
    ranges = " and ".join(f"{key} ({each.low:g} to {each.high:g})" for key, each in search.space.items())
    runs = ", then ".join(f"{room} of {steps} steps" for room, steps in zip(sizes, search.steps, strict=True))
    return (
        f"{len(search.trials)} trials of {ranges}, the first one recipe {search.params.recipe} as it stands\n"
        f"{runs}: as many steps as {work:.3g} full runs, and {sum(sizes)} evaluations; more if the best collapse late"
    )


def verdict(outcome: Outcome) -> str:
    titles: dict[str, str] = {str(kind): title for kind, title in TITLES.items()}
    title = titles.get(outcome.verdict, outcome.verdict).lower()
    return title if outcome.onset is None else f"{title} from step {outcome.onset}"


def table(search: Search, outcomes: Outcomes) -> str:
    """A row for each trial, the best first."""
    best = winner(search.steps, outcomes)
    rows = [["trial", *search.trials[0], *(f"{steps} steps" for steps in search.steps), "what became of it"]]
    for trial in ranking(search.steps, outcomes):
        ran = {steps: outcomes[trial, steps] for steps in search.steps if (trial, steps) in outcomes}
        last, outcome = list(ran.items())[-1]
        fate = "best" if trial == best else f"healthy; others were better at {last}"
        if outcome.verdict != "healthy":
            fate = f"{verdict(outcome)}: pruned at {last}"
        elif outcome.gain["mean"] is None:
            fate = f"its gain is undefined: pruned at {last}"
        rows.append(
            [f"{trial}: as it stands" if trial == 0 else str(trial)]
            + [f"{value:g}" for value in search.trials[trial].values()]
            + [short_gain(ran[steps]) if steps in ran else "" for steps in search.steps]
            + [fate]
        )
    return markdown_table(rows)


def short_gain(outcome: Outcome) -> str:
    """+0.48 (+0.20 to +0.80)."""
    return gain_text(outcome.gain, ".2g").replace("95% interval ", "")


def legend(params: Params) -> str:
    return (
        f"below the steps: held-out gain of reward {params.reward}, trained policy minus reference model, with its 95% "
        "interval over held-out prompts; as it stands: the recipe's own values"
    )


def nothing_healthy(search: Search, outcomes: Outcomes) -> str:
    """The message if every trial collapsed: how, and what to do."""
    last = {trial: outcome for (trial, _), outcome in sorted(outcomes.items())}
    kinds = Counter(outcome.verdict if outcome.verdict != "healthy" else "undefined gain" for outcome in last.values())
    said = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    recipe, values = search.params.recipe, search.trials[0]
    if set(kinds) <= set(CAUSES):
        advice = "neither a learning rate nor a KL strength mends that: docs/COLLAPSE.md"
    else:
        lower = override(f"recipes.{recipe}.lr", float(f"{values['lr'] / 10:.1e}"))
        advice = f"search around smaller steps, as -S {lower}, or see docs/COLLAPSE.md for these verdicts"
    return f"no trial of {len(last)} stayed healthy: {said}; {advice}"


def answer(search: Search, outcomes: Outcomes, best: int) -> str:
    """The best recipe, ready for params.yaml, and the commands that use, keep and confirm it."""
    params, steps, values = search.params, search.steps[-1], search.trials[best]
    name, (experiment, _) = free_name(params), search.experiment(best, steps)
    gain = outcomes[best, steps].gain
    said = ", ".join(f"{key} {value:g}" for key, value in values.items())
    lines = [f"best: trial {best}, {said}, held-out gain {gain_text(gain)} after {steps} steps"]
    if best and (0, steps) in outcomes:
        lines.append(f"the recipe as it stands: {gain_text(outcomes[0, steps].gain)}, {verdict(outcomes[0, steps])}")
    if gain["low"] is None or gain["low"] <= 0:
        lines.append("note: this gain may be chance: its interval is not above 0; longer runs may tell more")
    if near := [str(trial) for trial in best_first(steps, outcomes)[1:] if within(outcomes[trial, steps].gain, gain)]:
        lines.append(f"note: within that interval is also the gain of trial {', '.join(near)}: it may be as good")
    tuned = params.selected_recipe.model_copy(update=values)
    if tuned == load_params().recipes.get(params.recipe):
        return "\n".join(
            [*lines, f"Nothing to change: recipe {params.recipe} of params.yaml is the best of what was tried."]
        )
    kept = [each for each in search.overrides if key_of(each) != "recipe"]
    own = f"recipes.{params.recipe}."
    with_it = options_of([f"recipe={name}", *(each for each in kept if not key_of(each).startswith(own))])
    seeds = f"seed=range({params.seed + 1},{params.seed + 4})"
    both = options_of([f"recipe={params.recipe},{name}", seeds, *(each for each in kept if key_of(each) != "seed")])
    return "\n".join(
        [
            *lines,
            "",
            "Put this below `recipes:` in params.yaml:",
            "",
            recipe_table(name, tuned),
            f"Train with it:        dvc exp run {with_it}",
            f"Or take its run here: dvc exp apply {experiment}",
            f"Confirm it:           reinforce sweep {both}",
            "",
            f"The gain above is the best of {len(search.trials)} on the same held-out prompts and one seed: chosen, so "
            "rather too high. The last command",
            "trains both recipes on three other seeds and compares them: six full runs.",
        ]
    )


def within(gain: Interval, other: Interval) -> bool:
    """Whether the gain is no lower than the other's interval."""
    return gain["mean"] is not None and other["low"] is not None and gain["mean"] >= other["low"]


def options_of(values: list[str]) -> str:
    return shlex.join([part for value in values for part in ("-S", value)])


def free_name(params: Params) -> str:
    """`tuned`, or tuned-2, tuned-3, ... if a recipe has that name."""
    names = ["tuned", *(f"tuned-{number}" for number in range(2, len(params.recipes) + 3))]
    return next(name for name in names if name not in params.recipes)


def recipe_table(name: str, recipe: Recipe) -> str:
    """All keys of a recipe, as they stand below `recipes:`."""
    yaml, text = YAML(), io.StringIO()
    yaml.width = 10_000  # a long text stays on its line
    yaml.allow_unicode = False  # written as it is, U+2028 would be read back as a blank
    yaml.dump({name: recipe.model_dump(mode="json")}, text)
    dotted = re.sub(r"(?m)(: \d+)(e[+-]\d+)$", r"\1.0\2", text.getvalue())  # YAML 1.1 reads 3e-05 as a text
    return "".join(f"  {line}\n" for line in dotted.splitlines())
