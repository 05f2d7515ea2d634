"""Stage `check`: all of params.yaml is valid, and the custom rewards that it names exist.

The other stages depend on parts of the file only: a misspelt new key (`-S +rewrad=length`) would change nothing and go
unnoticed. For an experiment, this stage also checks before anything runs that DVC can save the result.
"""

from typing import Any

from pipeline.config.load import load_params
from pipeline.config.schema import SELECTORS, Params, classifier_rewards
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
    # `train` depends on the first file; `evaluate` measures every reward and depends on the second; neither on all of
    # custom/
    write_json(RUN_FILES.custom / "selected.json", [custom_digests([params.selected_reward])])
    write_json(RUN_FILES.custom / "all.json", [custom_digests(params.rewards.values())])
    # `cache` depends on this file, not on the rewards: it runs again only if the use of classifiers changes
    write_json(RUN_FILES.classifiers, [asked_classifiers(params)])
    print(", ".join(f"{name} {getattr(params, name)}" for name in SELECTORS), f"seed {params.seed}", sep=", ")


def asked_classifiers(params: Params) -> dict[str, Any]:
    """The classifiers of the selected and of the independent reward, and the tables of the rewards that use them."""
    used = {"reward": params.selected_classifiers, "independent": params.independent_classifiers}
    asked = [each.model_dump() for name in params.asked_rewards for each in classifier_rewards(params.rewards[name])]
    found = {use: {name: table.model_dump() for name, table in tables.items()} for use, tables in used.items()}
    return {**found, "asked": asked}


if __name__ == "__main__":
    run_stage(main)
