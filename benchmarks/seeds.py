"""Prints a Markdown table of all experiments of the current commit, mean ± standard deviation over seeds.

python -m benchmarks.seeds      # after `dvc exp run`s, queued or not

A run counts as collapsed by the rule of docs/COLLAPSE.md.
"""

import subprocess
import sys

import pandas as pd
from ruamel.yaml import YAML

from benchmarks.ablation import git, others, read_run, row_of_run, spread

COLUMNS = (
    "reward", "recipe", "seeds", "held-out reward", "over the reference", "seeds whose 95% interval is above 0",
    "reference's log-likelihood of what it says, change, nats a token", "entropy at the end, nats a token",
    "different completions, %", "sampled − scored logprob at the start, nats", "collapsed",
)  # fmt: skip


def experiments() -> pd.DataFrame:
    """A row an experiment of the current commit."""
    yaml = YAML(typ="safe", pure=True)
    listing = subprocess.run(["dvc", "exp", "list", "--sha-only"], capture_output=True, text=True, check=True).stdout
    rows = []
    for revision in listing.split():
        params = yaml.load(git("show", f"{revision}:params.yaml"))
        names = {name: params[name] for name in ("reward", "recipe", "seed")}
        rows.append(names | {"others": others(params)} | row_of_run(*read_run(revision), params))
    return pd.DataFrame(rows)


def table_row(rows: pd.DataFrame) -> str:
    first = rows.iloc[0]
    cells = [
        first["reward"], first["recipe"], str(rows["seed"].nunique()), spread(rows["held_out"]),
        spread(rows["gain"], "+"),
        str((rows["gain_low"] > 0).sum()), spread(rows["ref_logprob_change"], "+"), spread(rows["entropy"]),
        spread(100 * rows["distinct"], places=0), f"{rows['logprob_gap_start'].mean():.2g}",
        f"{(rows['collapsed'] != '').sum()} of {len(rows)}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    table = experiments()
    if table.empty:
        print("the current commit has no experiments yet: `dvc exp run`", file=sys.stderr)
        return
    for _, rows in table.groupby(["reward", "recipe", "others"]):
        print(table_row(rows))


if __name__ == "__main__":
    main()
