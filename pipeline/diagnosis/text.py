"""Statistics of completions as texts and as tokens: how varied they are, how repetitive."""

import math
from collections import Counter
from collections.abc import Sequence

from pipeline.file_io import total


def distinct_ngrams(completions: Sequence[Sequence[int]], n: int) -> float:
    """distinct-n: different n-grams over all n-grams of the batch, in (0, 1] (Li et al., arXiv 1510.03055).

    NaN where no completion has n tokens.
    """
    grams = [gram for tokens in completions for gram in _ngrams(tokens, n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def repeated_ngrams(completions: Sequence[Sequence[int]], n: int) -> float:
    """seq-rep-n: mean over completions of 1 - distinct / total n-grams, in [0, 1) (Welleck et al., arXiv 1908.04319).

    Completions shorter than n are left out; NaN where that leaves none.
    """
    shares = [1 - len(set(grams)) / len(grams) for tokens in completions if (grams := _ngrams(tokens, n))]
    return total(shares) / len(shares) if shares else math.nan


def top_token_share(completions: Sequence[Sequence[int]]) -> float:
    """Share of the most frequent token among all tokens of the batch, in (0, 1]. NaN where there are no tokens."""
    counts = Counter(token for tokens in completions for token in tokens)
    return max(counts.values()) / counts.total() if counts else math.nan


def distinct_share(texts: Sequence[str]) -> float:
    """Different texts over all texts, in (0, 1]."""
    return len(set(texts)) / len(texts)


def empty_share(texts: Sequence[str]) -> float:
    """Share of texts that are empty or white space."""
    return sum(not text.strip() for text in texts) / len(texts)


def ending_shares(endings: Sequence[str]) -> dict[str, float]:
    """Shares of the completions that end with EOS, with a stop string, at the limit; they sum to 1."""
    names = {"ended_share": "eos", "stopped_share": "stop_string", "limit_share": "limit"}
    return {name: endings.count(ending) / len(endings) for name, ending in names.items()}


def text_statistics(texts: Sequence[str], tokens: Sequence[Sequence[int]], group: int) -> dict[str, float]:
    """The statistics of one batch: N = B * G completions, prompt-major, `group` = G of each prompt.

    texts: without special tokens. tokens: without EOS, or what holds a stop string.
    """
    groups = [texts[i : i + group] for i in range(0, len(texts), group)]
    return {
        "empty_share": empty_share(texts),
        "distinct_completions": distinct_share(texts),
        "distinct_within": total(map(distinct_share, groups)) / len(groups),
        "distinct_1": distinct_ngrams(tokens, 1),
        "distinct_2": distinct_ngrams(tokens, 2),
        "repeated_3grams": repeated_ngrams(tokens, 3),
        "top_token_share": top_token_share(tokens),
    }


def _ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
