"""Prints docs/CHECKPOINTS.md's table: what REINFORCE did to each checkpoint, mean ± standard deviation over seeds.

python -m benchmarks.pretraining      # after a sweep over `models.<name>.source` or `models.<name>.revision`

Of DVC's experiments of every commit; what was run twice, all parameters equal, counts once.
"""

import json
import subprocess
import sys
from typing import Any

import pandas as pd
from ruamel.yaml import YAML

from benchmarks.ablation import WINDOW, git, others, read_run, spread

COLUMNS = (
    "checkpoint", "recipe", "seeds", "its held-out reward", "held-out gain",
    "entropy, first and last steps, nats a token",
    "KL to the reference at the end, nats a completion", "spread of rewards within a prompt, first steps",
    "gradient's signal over noise, mean of the run",
    "verdicts",
)  # fmt: skip


def experiments() -> pd.DataFrame:
    """A row an experiment."""
    yaml = YAML(typ="safe", pure=True)
    command = ["dvc", "exp", "list", "--all-commits", "--sha-only"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = []
    for revision in listing.split():
        params = yaml.load(git("show", f"{revision}:params.yaml"))
        verdict = json.loads(git("show", f"{revision}:reports/diagnosis.json"))["verdict"]
        rows.append(row(params, *read_run(revision)) | {"verdict": verdict})
    table = pd.DataFrame(rows)
    return table if table.empty else table.drop_duplicates(["checkpoint", "recipe", "seed", "others"])


def row(params: dict[str, Any], history: pd.DataFrame, metrics: dict[str, Any]) -> dict[str, Any]:
    model, reward = params["models"][params["model"]], metrics[params["reward"]]
    start, end = history.iloc[:WINDOW].mean(), history.iloc[-WINDOW:].mean()
    return {
        "checkpoint": model.get("revision") or model["source"], "recipe": params["recipe"], "seed": params["seed"],
        "others": others(params, "model"),
        "before": reward["checkpoint"]["mean"], "gain": reward["difference"]["mean"],
        "entropy_start": start["entropy"], "entropy": end["entropy"], "kl": end["ref_kl_sequence"],
        "within": start["reward_std_within"], "snr": history["grad_snr"].mean(),
    }  # fmt: skip


def table_row(rows: pd.DataFrame) -> str:
    first = rows.iloc[0]
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in rows["verdict"].value_counts().items())
    cells = [
        first["checkpoint"], first["recipe"], str(len(rows)), spread(rows["before"]), spread(rows["gain"], "+"),
        f"{spread(rows['entropy_start'])}, {spread(rows['entropy'])}", spread(rows["kl"]),
        spread(rows["within"]), spread(rows["snr"]), verdicts,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    table = experiments()
    if table.empty:
        sys.exit("error: no finished experiments; `dvc queue status` says what became of them")
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    groups = [rows for _, rows in table.groupby(["recipe", "checkpoint", "others"])]
    for rows in sorted(groups, key=lambda rows: rows["entropy_start"].mean(), reverse=True):  # the least trained first
        print(table_row(rows))


if __name__ == "__main__":
    main()
