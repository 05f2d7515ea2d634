"""Stage `check`: the whole of params.yaml is valid, and the custom rewards that it names are there. The other stages read
only what they depend on, so that a key that none of them knows (`-S +rewrad=length`) would change nothing and go
unnoticed. It also comes first in the folder of an experiment that DVC would run and then lose."""

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
    """Those among them, terms of sums included."""
    for reward in rewards:
        if isinstance(reward, SumReward):
            yield from custom_rewards(term.reward for term in reward.terms)
        elif isinstance(reward, CustomReward):
            yield reward


if __name__ == "__main__":
    run_stage(main)
