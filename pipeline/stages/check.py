"""Stage `check`: all of params.yaml is valid, and the custom rewards that it names exist.

The other stages depend on parts of the file only: a misspelt new key (`-S +rewrad=length`) would change nothing and go
unnoticed. For an experiment it also checks, before anything runs, that DVC can save the result.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.config.load import load_params
from pipeline.config.schema import SELECTORS, CustomReward, Reward, SumReward
from pipeline.errors import run_stage
from pipeline.rewards.custom import check_custom
from pipeline.runs import workspace
from pipeline.runs.dvc_git import check_folder


def main() -> None:
    if "DVC_EXP_NAME" in os.environ and Path.cwd() != workspace.root():  # --temp or --queue
        check_folder()
    params = load_params()
    for reward in custom_rewards(params.rewards.values()):
        check_custom(reward.function, reward.params)
    print(", ".join(f"{name} {getattr(params, name)}" for name in SELECTORS), f"seed {params.seed}", sep=", ")


def custom_rewards(rewards: Iterable[Reward]) -> Iterator[CustomReward]:
    """Yield the custom rewards among them, terms of sums included."""
    for reward in rewards:
        if isinstance(reward, SumReward):
            yield from custom_rewards(term.reward for term in reward.terms)
        elif isinstance(reward, CustomReward):
            yield reward


if __name__ == "__main__":
    run_stage(main)
