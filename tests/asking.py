"""Asking a reward about texts, in fewer words than a batch takes."""

from collections.abc import Callable, Sequence
from typing import Any

from pipeline.data.prompts import Prompt
from pipeline.rewards.batch import RewardBatch


def batch_of(prompts: Sequence[str | Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> RewardBatch:
    """Columns as lists with a value a completion; a completion's tokens are its characters' numbers."""
    rows = [
        Prompt(prompt, columns={name: values[i] for name, values in columns.items()})
        if isinstance(prompt, str) else prompt
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip
    return RewardBatch(rows, list(completions), [list(map(ord, text)) for text in completions])


def asking(reward: Callable[[RewardBatch], Any]) -> Callable[..., Any]:
    """The same reward as a function of prompts, completions and columns."""

    def ask(prompts: Sequence[str | Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Any:
        return reward(batch_of(prompts, completions, **columns))

    return ask
