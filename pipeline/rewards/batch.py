"""What a reward is given."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

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


class Scored(NamedTuple):
    """What a reward says of N completions."""

    rewards: list[float]  # [N], finite
    terms: list[list[float]]  # [K][N], what each term of a sum says, without its weight; of other kinds there are none


@dataclass(frozen=True)
class Reward:
    """A reward of params.yaml, to be asked about a batch: reward(batch) is [N], one finite number a completion."""

    score: Callable[[RewardBatch], Scored]
    weights: Mapping[str, float] = field(default_factory=dict)  # of the terms of a sum, by name
    combine: str = "sum"

    def __call__(self, batch: RewardBatch) -> list[float]:
        return self.score(batch).rewards
