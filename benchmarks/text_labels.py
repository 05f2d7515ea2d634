"""Whether held-out completions have fallen apart, by words alone: the rule of docs/REAL_MODELS.md.

It reads no log-probabilities and no tokens. Neighbouring words that stand beside each other nowhere in a large corpus
are a sign of word salad, whatever the tokens are.
"""

import itertools
import random
import re
import statistics
from collections.abc import Iterable, Sequence

from pipeline.diagnosis.text import empty_share

WORD = re.compile(r"[a-z']+|[^\sa-z']")  # a word, or one other character
WAY = 0.75  # from the reference's own texts to the same with their words in random order


def words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def word_pairs(texts: Iterable[str]) -> set[tuple[str, str]]:
    """Neighbouring words of a corpus."""
    pairs: set[tuple[str, str]] = set()
    for text in texts:
        pairs.update(neighbours(words(text)))
    return pairs


def neighbours(of: Sequence[str]) -> list[tuple[str, str]]:
    return list(itertools.pairwise(of))


def known_share(texts: Sequence[str], known: set[tuple[str, str]]) -> float:
    """Share of neighbouring words that the corpus has beside each other; NaN without any two words."""
    pairs = [pair for text in texts for pair in neighbours(words(text))]
    return sum(pair in known for pair in pairs) / len(pairs) if pairs else float("nan")


def shuffled(texts: Sequence[str]) -> list[str]:
    """Each text's words in random order, always the same one."""
    draw = random.Random(0)
    return [" ".join(draw.sample(own, len(own))) for own in map(words, texts)]


def repeated_share(texts: Sequence[str]) -> float:
    """Mean share of a text's word 3-grams that it has said before; texts of fewer than three words count 0."""
    shares = []
    for text in texts:
        own = words(text)
        grams = list(zip(own, own[1:], own[2:], strict=False))
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return statistics.fmean(shares)


def labels(policy: Sequence[str], reference: Sequence[str], known: set[tuple[str, str]]) -> list[str]:
    """The ways in which the policy's completions have fallen apart beside the reference's on the same prompts."""
    own, broken = known_share(reference, known), known_share(shuffled(reference), known)
    empty = empty_share(policy)
    found = {
        "empty": empty > 0.5,
        "repetition": repeated_share(policy) > 0.5,
        "mode": empty <= 0.5 and len(set(policy)) < 0.5 * len(set(reference)),
        "salad": known_share(policy, known) < own - WAY * (own - broken),
    }
    return [name for name, holds in found.items() if holds]
