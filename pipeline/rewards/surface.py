"""Rewards computed from the text alone: its length, the words in it."""

from pipeline.rewards.batch import RewardBatch, TermReward


def length_reward(target: int) -> TermReward:
    """R(y) = -|characters of y - target|, in characters. The notebook's `has_length`."""

    def reward(batch: RewardBatch) -> list[float]:
        return [float(-abs(len(completion) - target)) for completion in batch.completions]

    return reward


def words_reward(words: tuple[str, ...]) -> TermReward:
    """R(y) = the number of different `words` in y, in lower case and split at white space only.

    The notebook's `sentence_contains_one_of`: a word with punctuation at its end is not found.
    """
    required = set(words)

    def reward(batch: RewardBatch) -> list[float]:
        return [float(len(required & set(completion.lower().split()))) for completion in batch.completions]

    return reward
