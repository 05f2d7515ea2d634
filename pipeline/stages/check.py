"""Stage `check`: the whole of params.yaml is valid, and the custom rewards that it names are there. The other stages read
only what they depend on, so that a key that none of them knows (`-S +rewrad=length`) would change nothing and go
unnoticed. It also comes first in the folder of an experiment that DVC would run and then lose."""

import os
from pathlib import Path

from pipeline.config.load import load_params
from pipeline.config.schema import SELECTORS
from pipeline.errors import run_stage
from pipeline.file_io import write_json
from pipeline.rewards.custom import check_custom
from pipeline.rewards.custom_files import custom_digests, custom_rewards
from pipeline.runs import workspace
from pipeline.runs.dvc_git import check_folder

CUSTOM = Path("data/custom")


def main() -> None:
    if "DVC_EXP_NAME" in os.environ and Path.cwd() != workspace.root():  # --temp or --queue
        check_folder()
    params = load_params()
    for reward in custom_rewards(params.rewards.values()):
        check_custom(reward.function, reward.params)
    # `train` depends on the first file, `evaluate`, which measures every reward, on the second: not on all of custom/
    write_json(CUSTOM / "selected.json", custom_digests([params.selected_reward]))
    write_json(CUSTOM / "all.json", custom_digests(params.rewards.values()))
    print(", ".join(f"{name} {getattr(params, name)}" for name in SELECTORS), f"seed {params.seed}", sep=", ")


if __name__ == "__main__":
    run_stage(main)
