"""Rewards computed from the text alone: its length, the words in it."""

from collections.abc import Callable


def length_reward(target: int) -> Callable[[list[str], list[str]], list[float]]:
    """R(y) = -|characters of y - target|, in characters. The notebook's `has_length`."""

    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        return [float(-abs(len(completion) - target)) for completion in completions]

    return reward


def words_reward(words: tuple[str, ...]) -> Callable[[list[str], list[str]], list[float]]:
    """R(y) = the number of different `words` in y, in lower case and split at white space only.

    The notebook's `sentence_contains_one_of`: a word with punctuation at its end is not found.
    """
    required = set(words)

    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        return [float(len(required & set(completion.lower().split()))) for completion in completions]

    return reward
