"""What a reward is given."""

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.data.prompts import Prompt


@dataclass(frozen=True)
class RewardBatch:
    """N completions, each with the prompt that it answers."""

    prompts: list[Prompt]
    completions: list[str]
    completion_ids: list[list[int]]  # tokens, up to and including the first EOS
    step: int = 0  # of training; 0 where models are compared


# NaN: the reward says nothing of that completion
TermReward = Callable[[RewardBatch], list[float]]
Reward = Callable[[RewardBatch], list[float]]  # finite
