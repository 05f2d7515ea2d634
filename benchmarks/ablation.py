"""Which choice makes the reward collapse: one choice changed at a time, as queued DVC experiments.

python -m benchmarks.ablation queue     # queues every variant; `dvc queue start --jobs 2` runs them
python -m benchmarks.ablation collect   # finished experiments -> docs/collapse.csv, one row a run
python -m benchmarks.ablation tables    # docs/collapse.csv -> the tables of docs/COLLAPSE.md

The rule behind each verdict is in docs/COLLAPSE.md and in `collapsed` and `verdict` below; it was written before the runs.
"""

import argparse
import io
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from ruamel.yaml import YAML

RUNS = Path("docs/collapse.csv")
SEEDS = (0, 1, 2)
SETTING = ("train.steps=30", "train.prompts_per_step=8", "train.threads=1", "evaluate.prompts=100")
CLEAN = {"alignment": "correct", "special_tokens": "strip"}
WINDOW = 3  # the end of a run: its last steps

# what each start is, and what is changed in it, one variant a line; NAME.key is a key of that recipe
STARTS: dict[str, tuple[str, ...]] = {
    "notebook": ("recipe=notebook",),
    # what the first table finds to be wrong, put right
    "clean": ("recipe=notebook", "recipes.notebook.alignment=correct", "recipes.notebook.special_tokens=strip"),
    "stable": ("recipe=stable",),
}
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
        ("alignment=correct", "special_tokens=strip"),
        ("top_k=0",),
        ("baseline=none",),
        ("baseline=rloo",),
        ("train.prompts_per_step=16",),
        ("precision=bfloat16",),
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
    "clean": (
        ("lr=0.0001",),
        ("kl=reward_k1", "kl_coef=0.05"),
        ("max_grad_norm=1.0",),
        ("top_k=0",),
        ("padding=masked",),
        ("warmup_steps=10",),
        ("baseline=none",),
        ("lr=0.0001", "train.steps=90"),  # as far as lr 0.0003 goes in 30
    ),
}


def overrides(start: str, variant: tuple[str, ...]) -> list[str]:
    """The `-S` values of one variant."""
    table = "stable" if start == "stable" else "notebook"
    changed = [change if change.startswith("train.") else f"recipes.{table}.{change}" for change in variant]
    keys = {change.partition("=")[0] for change in changed}
    setting = [value for value in SETTING if value.partition("=")[0] not in keys]
    return [*STARTS[start], *setting, *changed]


def queue(starts: list[str], seeds: list[int]) -> None:
    """One experiment a variant and seed, up to the stage `evaluate`, which is all that the tables need."""
    for start, variant in ((name, variant) for name in starts for variant in VARIANTS[name]):
        values = [*overrides(start, variant), f"seed={','.join(map(str, seeds))}"]
        options = itertools.chain.from_iterable(("-S", value) for value in values)
        subprocess.run(["dvc", "exp", "run", "--queue", *options, "evaluate"], check=True)


def collapsed(history: pd.DataFrame, difference: dict[str, float]) -> list[str]:
    """How a run has collapsed; empty if it has not.

    entropy   mean of the last WINDOW steps below a tenth of the first step's
    distinct  fewer than a tenth of the completions of a step differ, same window
    empty     more than half of the completions are empty, same window
    reward    the held-out reward is below the untouched checkpoint's, with the 95% interval of the difference
    """
    end = history.iloc[-WINDOW:].mean()
    signs = {
        "entropy": end["entropy"] < 0.1 * history["entropy"].iloc[0],
        "distinct": end["distinct_completions"] < 0.1,
        "empty": end["empty_share"] > 0.5,
        "reward": difference["high"] < 0,
    }
    return [name for name, holds in signs.items() if holds]


def onset(history: pd.DataFrame) -> float:
    """The step from which, to the end, the entropy is below a tenth, completions are alike, or most are empty."""
    bad = (
        (history["entropy"] < 0.1 * history["entropy"].iloc[0])
        | (history["distinct_completions"] < 0.1)
        | (history["empty_share"] > 0.5)
    )
    good = history.index[~bad]
    first = good[-1] + 1 if len(good) else 0
    return float(first) if first < len(history) else float("nan")


def git_file(revision: str, path: str) -> str:
    return subprocess.run(["git", "show", f"{revision}:{path}"], capture_output=True, text=True, check=True).stdout


def changes(params: dict[str, Any], committed: dict[str, Any]) -> tuple[str, str]:
    """Start and variant of an experiment, read off its parameters."""
    table = params["recipe"]
    recipe, base = params["recipes"][table], committed["recipes"][table]
    differing = {key: value for key, value in recipe.items() if value != base[key]}
    usual = {f"train.{key}": str(value) for key, value in committed["train"].items()}
    usual |= dict(value.split("=") for value in SETTING)
    sizes = {f"train.{key}": value for key, value in params["train"].items() if str(value) != usual[f"train.{key}"]}
    start = table
    if table == "notebook" and CLEAN.items() <= differing.items() and len({**differing, **sizes}) > len(CLEAN):
        start = "clean"
        differing = {key: value for key, value in differing.items() if key not in CLEAN}
    return start, named({**differing, **sizes})


def named(changed: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in changed.items())


def collect() -> None:
    """Adds the finished experiments of the current commit to docs/collapse.csv."""
    committed = YAML(typ="safe", pure=True).load(git_file("HEAD", "params.yaml"))
    listing = subprocess.run(["dvc", "exp", "list", "--sha-only"], capture_output=True, text=True, check=True).stdout
    rows = []
    for revision in listing.split():
        params = YAML(typ="safe", pure=True).load(git_file(revision, "params.yaml"))
        start, variant = changes(params, committed)
        history = pd.read_csv(io.StringIO(git_file(revision, "reports/train/history.csv")))
        metrics = json.loads(git_file(revision, "reports/evaluate/metrics.json"))
        summary = json.loads(git_file(revision, "reports/train/summary.json"))
        held_out, end = metrics[params["reward"]], history.iloc[-WINDOW:].mean()
        likelihood = metrics["ref_logprob_per_token"]
        rows.append({
            "model": params["model"], "reward": params["reward"], "start": start, "variant": variant,
            "seed": params["seed"], "steps": len(history), "stopped": summary["stopped"],
            "held_out": held_out["policy"]["mean"], "gain": held_out["difference"]["mean"],
            "gain_low": held_out["difference"]["low"], "gain_high": held_out["difference"]["high"],
            "ref_logprob": likelihood["policy"],
            "ref_logprob_change": likelihood["policy"] - likelihood["checkpoint"],
            "distinct": metrics["text"]["policy"]["distinct_completions"],
            "empty": metrics["text"]["policy"]["empty_share"],
            "entropy": end["entropy"], "entropy_start": history["entropy"].iloc[0],
            "logprob_gap_start": history["logprob_gap"].iloc[0],
            "peak_step": int(history["reward_mean"].rolling(WINDOW, min_periods=1).mean().idxmax()),
            "onset": onset(history), "collapsed": " ".join(collapsed(history, held_out["difference"])),
        })  # fmt: skip
    keys = ["model", "reward", "start", "variant", "steps", "seed"]
    if not rows:
        sys.exit("error: the current commit has no finished experiments; `queue` them, then `dvc queue start --jobs 2`")
    table = pd.DataFrame(rows)
    if RUNS.exists():
        table = pd.concat([read_runs(), table]).drop_duplicates(keys, keep="last")
    table.sort_values(keys).to_csv(RUNS, index=False, float_format="%.6g", lineterminator="\n")
    print(f"{RUNS}: {len(table)} runs", file=sys.stderr)


def read_runs() -> pd.DataFrame:
    return pd.read_csv(
        RUNS, keep_default_na=False, na_values={"onset": [""], "ref_logprob": [""], "ref_logprob_change": [""]}
    )


def verdict(start: str, base: pd.DataFrame, variant: pd.DataFrame) -> str:
    """Of the choice that `variant` changes in `base`, by the rule of docs/COLLAPSE.md."""
    here, there = variant["collapsed"] != "", base["collapsed"] != ""
    gap = variant["gain"].mean() - base["gain"].mean()
    error = (variant["gain"].var() / len(variant) + base["gain"].var() / len(base)) ** 0.5
    size = abs(base["gain"].mean()) / 4
    if start == "stable":
        if here.all():
            found = "causes"
        elif here.any() or (gap <= -size and gap < -2 * error) or variant["ref_logprob_change"].mean() < -1:
            found = "contributes"
        else:
            found = "harmless"
    elif there.mean() <= 0.5:
        return "not decided: the start does not collapse on most seeds"
    elif not here.any():
        found = "causes"
    elif not here.all() or (gap >= size and gap > 2 * error) or variant["onset"].mean() >= 2 * base["onset"].mean():
        found = "contributes"
    else:
        found = "harmless"
    undecided = here.any() != here.all() or abs(abs(gap) - size) < 2 * error
    return found + (" (undecided: more seeds)" if undecided and len(variant) < 5 else "")


COLUMNS = (
    "changed", "seeds", "held-out reward", "over the checkpoint", "entropy, nats", "different completions, %", "empty, %",
    "checkpoint's log-likelihood, change", "collapsed: how", "from step", "the start's choice",
)  # fmt: skip


def tables() -> None:
    """Markdown: mean ± standard deviation over seeds, one table a model, reward and start."""
    runs = read_runs()
    for (model, reward, start), part in runs.groupby(["model", "reward", "start"], sort=False):
        base = part[part["variant"] == ""]
        if start == "clean":
            same = (runs["model"] == model) & (runs["reward"] == reward) & (runs["start"] == "notebook")
            base = runs[same & (runs["variant"] == named(CLEAN))]
        print(f"\n**{model}, {reward}, from `{start}`**\n\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
        print(table_row(f"nothing: `{start}` itself", base, ""))
        for variant, rows in part[part["variant"] != ""].groupby("variant", sort=False):
            print(table_row(f"`{variant}`", rows, verdict(start, base, rows)))


def table_row(name: str, rows: pd.DataFrame, found: str) -> str:
    bad = rows.loc[rows["collapsed"] != "", "collapsed"]
    signs = sorted({sign for signs in bad for sign in signs.split()})
    cells = [
        name, str(len(rows)), spread(rows["held_out"]), spread(rows["gain"], "+"), spread(rows["entropy"]),
        spread(100 * rows["distinct"]), spread(100 * rows["empty"]), spread(rows["ref_logprob_change"], "+"),
        f"{len(bad)} of {len(rows)}{': ' if signs else ''}{', '.join(signs)}", spread(rows["onset"]), found,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def spread(values: pd.Series, sign: str = "") -> str:
    values = values.dropna()
    return "" if values.empty else f"{values.mean():{sign}.2f} ± {values.std(ddof=1):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["queue", "collect", "tables"])
    parser.add_argument("--starts", nargs="+", choices=list(STARTS), default=list(STARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    arguments = parser.parse_args()
    if arguments.command == "queue":
        queue(arguments.starts, arguments.seeds)
    else:
        {"collect": collect, "tables": tables}[arguments.command]()


if __name__ == "__main__":
    main()
