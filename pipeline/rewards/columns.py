"""What a reward needs: columns of the prompts' rows, a library."""

from pipeline.config.schema import (
    GIVEN_TO_REWARDS,
    CustomReward,
    FormatReward,
    MatchReward,
    PromptSet,
    Reward,
    plain_rewards,
)
from pipeline.errors import UserError, nearest
from pipeline.rewards.custom import arguments_of
from pipeline.rewards.custom_files import custom_rewards


def needed_columns(table: Reward) -> set[str]:
    """The columns without which the reward cannot be computed."""
    needed: set[str] = set()
    for plain in plain_rewards(table):
        if isinstance(plain, MatchReward):
            needed.add(plain.column)
        elif isinstance(plain, CustomReward) and (found := arguments_of(plain.function)):
            needed |= set(found.required) - {*GIVEN_TO_REWARDS, *plain.params}
    return needed


def check_columns(name: str, table: Reward, prompt_set: PromptSet, key: str) -> None:
    """Raises UserError where the reward needs a column that the prompt set does not keep. key: of the prompt set."""
    if missing := sorted(needed_columns(table) - set(prompt_set.columns)):
        kept = ", ".join(prompt_set.columns) or "none"
        near = nearest(missing[0], prompt_set.columns)
        advice = f"is {near!r} the same, misspelt? Else " if near else ""
        advice += f"add it to {key}.columns, choose other prompts, or give a function's argument as params.{missing[0]}"
        raise UserError(
            f"reward {name} needs {missing[0]!r} of each prompt's row, which {key} does not keep (columns: {kept}); "
            f"{advice}"
        )


def check_params(table: Reward, prompt_set: PromptSet, key: str) -> None:
    """Raises UserError where a parameter of a custom reward has the name of a column that is kept."""
    for custom in custom_rewards([table]):
        for given in custom.params:
            if given in (*prompt_set.columns, *GIVEN_TO_REWARDS):
                what = f"a column of {key}" if given in prompt_set.columns else "what every reward is given"
                raise UserError(f"reward {custom.function}: params.{given} has the name of {what}; call it otherwise")


def searches_patterns(table: Reward) -> bool:
    """Whether the reward's values depend on the library `regex`."""
    return any(isinstance(plain, MatchReward | FormatReward) for plain in plain_rewards(table))
