"""Stop strings: a completion ends with the token that completes one of them; the text as read ends before it."""

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

# completions as token lists -> whether each one's text holds a stop string
Stopped = Callable[[list[list[int]]], list[bool]]


def stop_check(tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str]) -> Stopped | None:
    """The check that `sample` calls after each token; None without stop strings.

    It decodes the whole completion with special tokens: what a token adds to a text depends on the tokens before it.
    """
    if not stop_strings:
        return None
    return lambda rows: [find_stop(text, stop_strings) is not None for text in tokenizer.batch_decode(rows)]


def find_stop(text: str, stop_strings: Sequence[str]) -> int | None:
    """The character at which the first stop string of a text begins; None if there is none."""
    return min((place for stop in stop_strings if (place := text.find(stop)) >= 0), default=None)


def before_stop(
    tokenizer: PreTrainedTokenizerBase, tokens: list[int], stop_strings: Sequence[str]
) -> tuple[list[int], str] | None:
    """The tokens of a completion before its first stop string, and the text between these tokens and the stop string,
    which comes from a token that reaches into the stop string. None where there is no stop string."""
    text = str(tokenizer.decode(tokens))
    place = find_stop(text, stop_strings)
    if place is None:
        return None
    for count in reversed(range(len(tokens))):
        before = str(tokenizer.decode(tokens[:count]))
        if len(before) <= place and text.startswith(before):
            return tokens[:count], text[len(before) : place]
    return [], text[:place]
