"""Stage `check`: all of params.yaml is valid, and the custom rewards that it names exist.

The other stages depend on parts of the file only: a misspelt new key (`-S +rewrad=length`) would change nothing and go
unnoticed. For an experiment it also checks, before anything runs, that DVC can save the result.
"""

from pipeline.config.load import load_params
from pipeline.config.schema import SELECTORS
from pipeline.errors import run_stage
from pipeline.file_io import write_json
from pipeline.paths import RUN_FILES
from pipeline.rewards.columns import check_columns, check_params
from pipeline.rewards.custom import check_custom
from pipeline.rewards.custom_files import custom_digests, custom_rewards
from pipeline.runs.dvc_git import check_experiment_folder


def main() -> None:
    check_experiment_folder()
    params = load_params()
    for reward in custom_rewards(params.rewards.values()):
        check_custom(reward.function, reward.params)
    prompt_set, key = params.selected_prompt_set, f"prompt_sets.{params.prompts}"
    for name in (params.reward, params.evaluate.independent):
        if name in params.rewards:
            check_columns(name, params.rewards[name], prompt_set, key)
    check_params(params.selected_reward, prompt_set, key)
    # `train` depends on the first file, `evaluate`, which measures every reward, on the second: not on all of custom/
    write_json(RUN_FILES.custom / "selected.json", [custom_digests([params.selected_reward])])
    write_json(RUN_FILES.custom / "all.json", [custom_digests(params.rewards.values())])
    print(", ".join(f"{name} {getattr(params, name)}" for name in SELECTORS), f"seed {params.seed}", sep=", ")


if __name__ == "__main__":
    run_stage(main)
