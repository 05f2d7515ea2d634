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
from pipeline.rewards.custom import custom_reward
from pipeline.rewards.embedding import embedding_reward
from pipeline.rewards.surface import length_reward, words_reward

# Gradients are float32, and Adam and their norm need the squares, which end at 3e38. A gradient is a reward times how much
# the log-probability of a completion changes with a weight: this leaves seven digits for that.
LARGEST = 1e12
NO_LISTS = (str, bytes, bytearray, Mapping, Set)  # iterable, but not over rewards in the order of the completions
Reward = Callable[[list[str], list[str]], list[float]]  # (prompts [N], completions [N]) -> rewards [N]


def build_reward(name: str, table: Any, encoder: Path, device: torch.device) -> Reward:
    """The reward that a table describes; what it returns is checked on every call.

    Raises UserError, at once or on a call, for a custom reward that is missing or does not keep to its convention, and
    for values beyond LARGEST.
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
        return [sum(weight * values[i] for weight, values in scored) for i in range(len(completions))]

    return reward


def _number(value: Any) -> float:
    """A number or a boolean, also numpy's or torch's; NaN for anything else."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    try:
        return float(value) if isinstance(value, Real | np.bool_) else math.nan
    except OverflowError:  # an integer beyond float's range
        return math.inf


def _shown(value: Any) -> str:
    try:
        return reprlib.repr(value)
    except Exception:  # an integer of thousands of digits has no text
        return f"an unprintable {type(value).__name__}"


def _checked(name: str, reward: Reward, largest: float = math.inf) -> Reward:
    def checked(prompts: list[str], completions: list[str]) -> list[float]:
        values = reward(list(prompts), list(completions))  # copies: a user's function may edit what it is given
        kind = type(values).__name__
        if isinstance(values, NO_LISTS):
            raise UserError(f"reward {name} returned {kind}, not a list of numbers")
        try:
            values = list(values)
        except Exception as error:  # what the iteration of a user's own class may raise, too
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
