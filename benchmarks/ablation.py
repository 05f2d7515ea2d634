"""Which choice makes the reward collapse: one choice changed at a time, as queued DVC experiments.

python -m benchmarks.ablation queue     # queues every variant on 3 seeds; `dvc queue start --jobs 2` runs them
python -m benchmarks.ablation collect   # finished experiments of the commit -> docs/collapse.csv, one row a run
python -m benchmarks.ablation tables    # docs/collapse.csv -> the tables of docs/COLLAPSE.md

The rule behind each verdict stands in docs/COLLAPSE.md; `collapsed` and `verdict` below are that rule.
"""

import argparse
import io
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from ruamel.yaml import YAML

from pipeline.config.schema import SELECTORS
from pipeline.runs.provenance import digest

RUNS = Path("docs/collapse.csv")
WINDOW = 3  # the end of a run: its last steps
UNCERTAIN = 2  # standard errors
FEWEST, MOST = 3, 5  # seeds: for a verdict; where three do not decide

SETTINGS: dict[str, tuple[str, ...]] = {
    "pocket": ("train.steps=30", "train.prompts_per_step=8", "train.threads=1", "evaluate.prompts=100"),
    "smollm2": (
        "model=smollm2", "train.steps=12", "train.prompts_per_step=4", "train.threads=1", "evaluate.prompts=40",
        "recipes.notebook.precision=bfloat16", "recipes.stable.precision=bfloat16",
    ),
}  # fmt: skip
CLEAN = ("alignment=correct", "special_tokens=strip")  # what the first table finds to be wrong, put right
# a start: its recipe, and what is changed in it for all of its variants
STARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "notebook": ("notebook", ()), "clean": ("notebook", CLEAN),
    # the recipe's when the runs were made; docs/COLLAPSE.md
    "stable": ("stable", ("scale_rewards=none", "kl_coef=0.05", "kl_target=0.0")),
}  # fmt: skip
# a variant a line; keys without a dot are keys of the start's recipe
VARIANTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "notebook": (
        (),
        ("alignment=correct",),
        ("lr=0.0001",),
        ("lr=0.00001",),
        ("adam_eps=0.00001",),
        ("adam_eps=0.001",),
        ("optimizer=sgd", "lr=0.08"),  # a first update as long as Adam's: 0.0003 sqrt(5.26 million) / a gradient of 9
        ("warmup_steps=10",),
        ("max_grad_norm=1.0",),
        ("kl=reward_k1", "kl_coef=0.05"),
        ("padding=masked",),
        ("special_tokens=strip",),
        ("top_k=0",),
        ("baseline=none",),
        ("baseline=rloo",),
        ("train.prompts_per_step=16",),
        ("precision=bfloat16",),
    ),
    "clean": (
        (),
        ("lr=0.0001",),
        ("kl=reward_k1", "kl_coef=0.05"),
        ("max_grad_norm=1.0",),
        ("top_k=0",),
        ("padding=masked",),
        ("warmup_steps=10",),
        ("baseline=none",),
    ),
    "stable": (
        (),
        ("alignment=shifted",),
        ("lr=0.0003",),
        ("warmup_steps=0",),
        ("max_grad_norm=0.0",),
        ("kl=none",),
        ("padding=counted",),
        ("top_k=50",),
        ("baseline=group",),
        ("baseline=none",),
        ("length_limit=total",),
        ("special_tokens=keep",),
        ("train.prompts_per_step=2",),
    ),
}
# these also change what the held-out texts are, so that gains with and without them cannot be compared
MEASURING = ("special_tokens", "top_k", "length_limit")


class Experiment(NamedTuple):
    setting: str
    start: str
    variant: tuple[str, ...]

    def overrides(self) -> dict[str, str]:
        """The `-S` values, by key."""
        recipe, common = STARTS[self.start]
        changes = [
            change if "." in change.partition("=")[0] else f"recipes.{recipe}.{change}"
            for change in (*common, *self.variant)
        ]
        pairs = [value.partition("=") for value in (f"recipe={recipe}", *SETTINGS[self.setting], *changes)]
        return {key: value for key, _, value in pairs}


EXPERIMENTS = [
    experiment
    for experiment in (
        Experiment(*names) for start in STARTS for names in itertools.product(SETTINGS, [start], VARIANTS[start])
    )
    # a setting may itself have made the change
    if not experiment.variant or experiment.overrides() != experiment._replace(variant=()).overrides()
]


def queue(setting: str, starts: list[str], changes: list[str] | None, seeds: list[int], extra: list[str]) -> None:
    """One experiment a variant and seed, up to the stage `evaluate`, which is all that the tables need."""
    for experiment in EXPERIMENTS:
        wanted = changes is None or ",".join(experiment.variant) in changes
        if experiment.setting == setting and experiment.start in starts and wanted:
            values = [f"{key}={value}" for key, value in experiment.overrides().items()]
            values += [f"seed={','.join(map(str, seeds))}", *extra]
            options = itertools.chain.from_iterable(("-S", value) for value in values)
            subprocess.run(["dvc", "exp", "run", "--queue", *options, "evaluate"], check=True)


def identify(params: dict[str, Any], committed: dict[str, Any]) -> Experiment | None:
    """Which of EXPERIMENTS has these parameters, given those of the commit; None for any other experiment."""
    yaml = YAML(typ="safe", pure=True)
    for experiment in EXPERIMENTS:
        expected = {"model": committed["model"], "recipe": None, "reward": committed["reward"]}
        tables = {"train": dict(committed["train"]), "evaluate": dict(committed["evaluate"])}
        recipe = STARTS[experiment.start][0]
        tables["recipe"] = dict(committed["recipes"][recipe])
        for key, text in experiment.overrides().items():
            *table, name = key.removeprefix(f"recipes.{recipe}.").rpartition(".")[::2]
            value = yaml.load(text)
            if key.startswith("recipes."):
                tables["recipe"][name] = value
            elif table[0]:
                tables[table[0]][name] = value
            else:
                expected[name] = value
        found = {name: params[name] for name in expected}
        own = {"train": params["train"], "evaluate": params["evaluate"], "recipe": params["recipes"][params["recipe"]]}
        if found == expected and own == tables:
            return experiment
    return None


def collapsed(history: pd.DataFrame, steps: int, difference: dict[str, float | None]) -> list[str]:
    """How a run has collapsed; empty if it has not.

    entropy   mean of the last WINDOW steps below a tenth of the first step's, or no number
    distinct  fewer than a tenth of the completions of a step differ, same window
    empty     more than half of the completions are empty, same window
    reward    the held-out reward is below the reference's, with the 95% interval of the difference
    stopped   before its last step, at a number that is not finite
    """
    end = history.iloc[-WINDOW:].mean()
    signs = {
        "entropy": not end["entropy"] >= 0.1 * history["entropy"].iloc[0],
        "distinct": end["distinct_completions"] < 0.1,
        "empty": end["empty_share"] > 0.5,
        "reward": (difference["high"] or 0.0) < 0,  # none: one held-out prompt
        "stopped": len(history) < steps,
    }
    return [name for name, holds in signs.items() if holds]


def onset(history: pd.DataFrame) -> float:
    """The step from which, to the end, the entropy is below a tenth, completions are alike, or most are empty."""
    bad = (
        ~(history["entropy"] >= 0.1 * history["entropy"].iloc[0])
        | (history["distinct_completions"] < 0.1)
        | (history["empty_share"] > 0.5)
    )
    good = history.index[~bad]
    first = good[-1] + 1 if len(good) else 0
    return float(first) if first < len(history) else float("nan")


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout


def others(params: dict[str, Any], *aside: str) -> str:
    """Digest of what a run is made with besides its seed and the selectors `aside`: equal for seeds of one
    experiment."""
    chosen = [(params[name], params[table][params[name]]) for name, table in SELECTORS.items() if name not in aside]
    return digest([chosen, params["train"], params["evaluate"]])


def collect() -> None:
    """Adds the finished experiments of the current commit to docs/collapse.csv; others than EXPERIMENTS are left
    out."""
    yaml = YAML(typ="safe", pure=True)
    committed, commit = yaml.load(git("show", "HEAD:params.yaml")), git("rev-parse", "--short=10", "HEAD").strip()
    listing = subprocess.run(["dvc", "exp", "list", "--sha-only"], capture_output=True, text=True, check=True).stdout
    rows = []
    for revision in listing.split():
        params = yaml.load(git("show", f"{revision}:params.yaml"))
        if (found := identify(params, committed)) is None:
            print(f"{revision[:10]}: not one of this file's experiments", file=sys.stderr)
            continue
        rows.append({
            "setting": found.setting, "start": found.start, "variant": ", ".join(found.variant), "seed": params["seed"],
            "commit": commit, **row_of_run(*read_run(revision), params),
        })  # fmt: skip
    if not rows:
        sys.exit("error: the current commit has no finished experiments; `queue` them, then `dvc queue start --jobs 2`")
    table = pd.DataFrame(rows)
    if RUNS.exists():
        table = pd.concat([read_runs(), table])
    keys = ["setting", "start", "variant", "seed"]
    table = table.drop_duplicates(keys, keep="last").sort_values(keys)
    table.to_csv(RUNS, index=False, float_format="%.6g", lineterminator="\n")
    print(f"{RUNS}: {len(table)} runs", file=sys.stderr)


def read_run(revision: str) -> tuple[pd.DataFrame, dict[str, Any]]:
    """history.csv and evaluate's metrics of an experiment."""
    history = pd.read_csv(io.StringIO(git("show", f"{revision}:reports/train/history.csv")))
    return history, json.loads(git("show", f"{revision}:reports/evaluate/metrics.json"))


def row_of_run(history: pd.DataFrame, metrics: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    held_out, end = metrics[params["reward"]], history.iloc[-WINDOW:].mean()
    likelihood, text = metrics["ref_logprob_per_token"], metrics["text"]["policy"]
    return {
        "steps": len(history), "held_out": held_out["policy"]["mean"], "gain": held_out["difference"]["mean"],
        "gain_low": held_out["difference"]["low"], "gain_high": held_out["difference"]["high"],
        "ref_logprob_change": likelihood["policy"] - likelihood["checkpoint"],
        "distinct": text["distinct_completions"], "empty": text["empty_share"],
        "entropy": end["entropy"], "entropy_start": history["entropy"].iloc[0],
        "logprob_gap_start": history["logprob_gap"].iloc[0], "onset": onset(history),
        "collapsed": " ".join(collapsed(history, params["train"]["steps"], held_out["difference"])),
    }  # fmt: skip


def read_runs() -> pd.DataFrame:
    texts = ("commit", "variant", "collapsed")
    table = pd.read_csv(RUNS, dtype=dict.fromkeys(texts, str))
    return table.fillna(dict.fromkeys(texts, ""))


def verdict(start: str, base: pd.DataFrame, variant: pd.DataFrame) -> str:
    """Of the choice that `variant` changes in `base`, by the rule of docs/COLLAPSE.md."""
    if min(len(base), len(variant)) < FEWEST:
        return "too few seeds"
    here, there = variant["collapsed"] != "", base["collapsed"] != ""
    if there.mean() > 0.5 if start == "stable" else there.mean() <= 0.5:
        return "open: the start itself does not behave as it should"
    gap = variant["gain"].mean() - base["gain"].mean()
    error = (variant["gain"].var() / len(variant) + base["gain"].var() / len(base)) ** 0.5
    names = [change.partition("=")[0] for change in variant["variant"].iloc[0].split(", ")]
    # what the start loses, or gains; a quarter of it counts
    reach = base["gain"].mean() if start == "stable" else -base["gain"].mean()
    effect, quarter = (-gap if start == "stable" else gap), reach / 4
    comparable = reach > 0 and not set(names) & set(MEASURING)
    moved = comparable and effect >= quarter and effect > UNCERTAIN * error
    if start == "stable":
        part = here.any() or moved or variant["ref_logprob_change"].mean() < -1
        found = "causes" if here.all() else "contributes" if part else "harmless"
    else:
        late = onsets(variant) >= 2 * onsets(base)
        found = "causes" if not here.any() else "contributes" if not here.all() or moved or late else "harmless"
    undecided = here.any() != here.all() or (comparable and abs(effect - quarter) < UNCERTAIN * error)
    return found + (" (undecided: more seeds)" if undecided and len(variant) < MOST else "")


def onsets(rows: pd.DataFrame) -> float:
    """Mean step of the onset over collapsed runs; one that shows in the held-out reward alone counts as at its end."""
    bad = rows[rows["collapsed"] != ""]
    return bad["onset"].fillna(bad["steps"]).mean()


COLUMNS = (
    "changed", "seeds", "held-out reward", "over the reference", "entropy, nats", "different completions, %",
    "empty, %",
    "reference's log-likelihood, change", "collapsed: how", "from step", "the start's choice",
)  # fmt: skip


def tables() -> None:
    """Markdown: mean ± standard deviation over seeds, one table a setting and start."""
    runs = read_runs()
    for setting, start in itertools.product(SETTINGS, STARTS):
        own = runs[(runs["setting"] == setting) & (runs["start"] == start)]
        if own.empty:
            continue
        base = own[own["variant"] == ""]
        print(f"\n**{setting}, from `{start}`**\n\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
        print(table_row(f"nothing: `{start}` itself", base, ""))
        for changes in VARIANTS[start]:
            rows = own[own["variant"] == ", ".join(changes)]
            if changes and len(rows):
                print(table_row(f"`{', '.join(changes)}`", rows, verdict(start, base, rows)))


def table_row(name: str, rows: pd.DataFrame, found: str) -> str:
    bad = rows.loc[rows["collapsed"] != "", "collapsed"]
    signs = sorted({sign for signs in bad for sign in signs.split()})
    cells = [
        name, str(len(rows)), spread(rows["held_out"]), spread(rows["gain"], "+"), spread(rows["entropy"]),
        spread(100 * rows["distinct"], places=0), spread(100 * rows["empty"], places=0),
        spread(rows["ref_logprob_change"], "+"),
        f"{len(bad)} of {len(rows)}{': ' if signs else ''}{', '.join(signs)}", spread(rows["onset"], places=0), found,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def spread(values: pd.Series, sign: str = "", places: int = 2) -> str:
    values = values.dropna()
    if values.empty:
        return ""
    deviation = "" if len(values) == 1 else f" ± {values.std():.{places}f}"
    return f"{values.mean():{sign}.{places}f}{deviation}".replace("-", "−")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["queue", "collect", "tables"])
    parser.add_argument("--setting", choices=list(SETTINGS), default="pocket")
    parser.add_argument("--starts", nargs="+", choices=list(STARTS), default=list(STARTS))
    parser.add_argument("--changes", nargs="+", help="only these variants; '' is the start itself")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(FEWEST)))
    parser.add_argument("-S", dest="extra", action="append", default=[], help="passed on to `dvc exp run`")
    arguments = parser.parse_args()
    if arguments.command == "queue":
        queue(arguments.setting, arguments.starts, arguments.changes, arguments.seeds, arguments.extra)
    else:
        {"collect": collect, "tables": tables}[arguments.command]()


if __name__ == "__main__":
    main()
