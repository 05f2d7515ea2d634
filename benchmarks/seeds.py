"""Prints a Markdown table of all experiments of the current commit, mean ± standard deviation over seeds.

python benchmarks/seeds.py      # reads `dvc exp show --csv`
"""

import io
import subprocess

import pandas as pd

COLUMNS = {
    "held-out reward": "{reward}.policy.mean",
    "over the untouched checkpoint": "{reward}.difference.mean",
    "its log-likelihood of the completions, nats a token": "ref_logprob_per_token.policy",
    "entropy, nats a token": "last.entropy",
    "different completions, %": "last.distinct_completions",
    "sampled − scored logprob, nats": "first.logprob_gap",
}
PERCENT = ("different completions, %",)


def main() -> None:
    listing = subprocess.run(["dvc", "exp", "show", "--csv"], capture_output=True, text=True, check=True).stdout
    table = pd.read_csv(io.StringIO(listing))
    table = table[table["typ"].str.startswith("branch")]  # experiments, not the workspace or a commit
    if "State" in table:  # of queued ones: empty for those that were run at once
        table = table[~table["State"].isin(["Queued", "Running", "Failed"])]
    print("| reward | recipe | seeds | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 3) + "|")
    for (reward, recipe), rows in table.groupby(["reward", "recipe"]):
        cells = []
        for name, column in COLUMNS.items():
            values = rows[column.format(reward=reward)].astype(float) * (100 if name in PERCENT else 1)
            cells.append(f"{values.mean():.3g} ± {values.std():.2g}")
        print(f"| {reward} | {recipe} | {rows['seed'].nunique()} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
