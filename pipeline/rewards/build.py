"""params.yaml's reward tables -> functions that score a whole batch."""

import math
import reprlib
from collections.abc import Callable, Mapping, Set
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config.schema import CustomReward, EmbeddingReward, LengthReward, SumReward, WordsReward
from pipeline.errors import UserError
from pipeline.file_io import total
from pipeline.rewards.custom import custom_reward
from pipeline.rewards.embedding import embedding_reward
from pipeline.rewards.surface import length_reward, words_reward

# Adam and the gradient norm square float32 gradients, and float32 ends at 3e38. A gradient is a reward times the
# gradient of a log-probability: this leaves seven digits for the latter.
LARGEST = 1e12
NO_LISTS = (str, bytes, bytearray, Mapping, Set)  # iterable, but not a list of rewards in the order of the completions
Reward = Callable[[list[str], list[str]], list[float]]  # (prompts [N], completions [N]) -> rewards [N]


def build_reward(name: str, table: Any, encoder: Path, device: torch.device) -> Reward:
    """Build the reward that a table of params.yaml describes. `name` is used in messages.

    Raises UserError for a custom reward that is missing or cannot be imported. The reward itself raises UserError
    unless it returns one finite number per completion, of at most LARGEST in size.
    """
    if isinstance(table, SumReward):
        return _checked(name, _weighted_sum(name, table, encoder, device), LARGEST)
    return _checked(name, _plain(table, encoder, device), LARGEST)


def _plain(table: Any, encoder: Path, device: torch.device) -> Reward:
    match table:
        case EmbeddingReward():
            return embedding_reward(table.target, encoder, device, getattr(torch, table.precision))
        case LengthReward():
            return length_reward(table.target)
        case WordsReward():
            return words_reward(table.words)
        case CustomReward():
            return custom_reward(table.function, table.params)
    raise TypeError(f"no reward is made from {type(table).__name__}")


def _weighted_sum(name: str, table: SumReward, encoder: Path, device: torch.device) -> Reward:
    """R(y) = sum_k weight_k R_k(y)."""
    terms = [(term.weight, _checked(name, _plain(term.reward, encoder, device))) for term in table.terms]

    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        scored = [(weight, function(prompts, completions)) for weight, function in terms]
        return [total(weight * values[i] for weight, values in scored) for i in range(len(completions))]

    return reward


def _number(value: Any) -> float:
    """The float of a number or boolean (Python's, numpy's or torch's); NaN for anything else."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    try:
        return float(value) if isinstance(value, Real | np.bool_) else math.nan
    except OverflowError:  # an integer beyond the range of floats
        return math.inf


def _shown(value: Any) -> str:
    try:
        return reprlib.repr(value)
    except Exception:  # Python does not print integers of thousands of digits
        return f"an unprintable {type(value).__name__}"


def _checked(name: str, reward: Reward, largest: float = math.inf) -> Reward:
    def checked(prompts: list[str], completions: list[str]) -> list[float]:
        values = reward(list(prompts), list(completions))  # copies: a custom reward may edit its arguments
        kind = type(values).__name__
        if isinstance(values, NO_LISTS):
            raise UserError(f"reward {name} returned {kind}, not a list of numbers")
        try:
            values = list(values)
        except Exception as error:  # iterating over a user's class may raise anything
            raise UserError(f"reward {name} returned {kind}, not a list of numbers: {error}") from error
        if len(values) != len(completions):
            raise UserError(f"reward {name} returned {len(values)} values for {len(completions)} completions")
        numbers = [_number(value) for value in values]
        for number, value, completion in zip(numbers, values, completions, strict=True):
            if math.isfinite(number) and abs(number) <= largest:
                continue
            wrong = f": the largest size that works is {largest:g}; scale it down"
            if not math.isfinite(number):
                wrong = ", not a finite number"
            raise UserError(f"reward {name} returned {_shown(value)} for {completion[:60]!r}{wrong}")
        return numbers

    return checked
