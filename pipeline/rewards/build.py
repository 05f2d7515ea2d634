"""params.yaml's reward tables -> functions that score a whole batch."""

import math
import reprlib
from collections.abc import Callable, Iterable, Mapping, Set
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config.schema import (
    ClassifierReward,
    CustomReward,
    EmbeddingReward,
    FormatReward,
    LengthReward,
    MatchReward,
    SumReward,
    WordsReward,
    plain_rewards,
    term_names,
)
from pipeline.data.prompts import Prompt
from pipeline.errors import UserError
from pipeline.file_io import total
from pipeline.rewards.batch import Reward, RewardBatch, Scored, TermReward
from pipeline.rewards.classifier import Cuts, classifier_reward, folder_of
from pipeline.rewards.custom import custom_reward
from pipeline.rewards.embedding import embedding_reward
from pipeline.rewards.surface import length_reward, words_reward
from pipeline.rewards.verifiable import format_reward, match_reward, row_answers

# Adam and the gradient norm square float32 gradients, and float32 ends at 3e38. A gradient is a reward times the
# gradient of a log-probability: this leaves seven digits for the latter.
LARGEST = 1e12
NO_LISTS = (str, bytes, bytearray, Mapping, Set)  # iterable, but not a list of rewards in the order of the completions


def build_reward(
    name: str,
    table: Any,
    encoder: Path,
    device: torch.device,
    classifiers: Mapping[str, Path] | None = None,
    cuts: Cuts | None = None,
) -> Reward:
    """Build the reward that a table of params.yaml describes. `name` is used in messages.

    encoder, classifiers: the folder of the encoder, and those of the classifiers by name. cuts: counts what
    classifiers cut.

    R(y) = sum_k weight_k R_k(y) over the terms that say something of y, 0 where none does; of a plain reward the only
    term has weight 1. Raises UserError for a custom reward that is missing or cannot be imported. The reward itself
    raises UserError unless each term returns one finite number or None a completion, and their sum is at most LARGEST.
    """
    is_sum = isinstance(table, SumReward)
    terms = [(term.weight, term.reward) for term in table.terms] if is_sum else [(1.0, table)]
    # what a sum scales down may be larger
    largest = math.inf if is_sum else LARGEST
    stored, counted = classifiers or {}, cuts or Cuts()
    built = [
        (weight, _checked(_label(name, plain), _plain(name, plain, encoder, device, stored, counted), largest))
        for weight, plain in terms
    ]

    def score(batch: RewardBatch) -> Scored:
        scored = [(weight, term(batch)) for weight, term in built]
        sums = [
            total(weight * values[i] for weight, values in scored if not math.isnan(values[i]))
            for i in range(len(batch.completions))
        ]
        for value, completion in zip(sums, batch.completions, strict=True):
            _check_size(name, value, value, completion, LARGEST)
        return Scored(sums, [values for _, values in scored] if is_sum else [])

    if not is_sum:
        return Reward(score)
    return Reward(score, dict(zip(term_names(table), [weight for weight, _ in terms], strict=True)), table.combine)


def _plain(
    name: str, table: Any, encoder: Path, device: torch.device, classifiers: Mapping[str, Path], cuts: Cuts
) -> TermReward:
    match table:
        case EmbeddingReward():
            return embedding_reward(table.target, encoder, device, getattr(torch, table.precision))
        case ClassifierReward():
            return classifier_reward(name, table, folder_of(name, table, classifiers), device, cuts)
        case LengthReward():
            return length_reward(table.target)
        case WordsReward():
            return words_reward(table.words)
        case MatchReward():
            return match_reward(name, table)
        case FormatReward():
            return format_reward(name, table)
        case CustomReward():
            return custom_reward(table.function, table.params)
    raise TypeError(f"no reward is made from {type(table).__name__}")


def _label(name: str, table: Any) -> str:
    """What messages call a reward: of a function, which the table's name does not tell, where it is too."""
    return f"{name} ({table.function})" if isinstance(table, CustomReward) else name


def check_rows(name: str, table: Any, prompts: Iterable[Prompt]) -> None:
    """Raises UserError for the first prompt whose row holds no answer that the reward could compare with."""
    for plain in plain_rewards(table):
        if isinstance(plain, MatchReward):
            for prompt in prompts:
                row_answers(name, plain, prompt)


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


def _checked(name: str, reward: Callable[[RewardBatch], Any], largest: float) -> TermReward:
    """The same with its values checked, None as NaN."""

    def checked(batch: RewardBatch) -> list[float]:
        values = reward(batch)
        kind = type(values).__name__
        if isinstance(values, NO_LISTS):
            raise UserError(f"reward {name} returned {kind}, not a list of numbers")
        try:
            values = list(values)
        except Exception as error:  # iterating over a user's class may raise anything
            raise UserError(f"reward {name} returned {kind}, not a list of numbers: {error}") from error
        if len(values) != len(batch.completions):
            raise UserError(f"reward {name} returned {len(values)} values for {len(batch.completions)} completions")
        numbers = [math.nan if value is None else _number(value) for value in values]
        for number, value, completion in zip(numbers, values, batch.completions, strict=True):
            if value is not None:
                _check_size(name, number, value, completion, largest)
        return numbers

    return checked


def _check_size(name: str, number: float, value: Any, completion: str, largest: float) -> None:
    if not math.isfinite(number):
        raise UserError(f"reward {name} returned {_shown(value)} for {completion[:60]!r}, not a finite number")
    if abs(number) > largest:
        raise UserError(
            f"reward {name} returned {_shown(value)} for {completion[:60]!r}: the largest size that works is "
            f"{largest:g}; scale it down"
        )
