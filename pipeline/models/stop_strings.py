"""Stop strings: texts that end a completion, with the token that completes one; what is read of it ends before."""

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

# completions as token lists -> whether each one's text holds a stop string
Stopped = Callable[[list[list[int]]], list[bool]]


def stop_check(tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str]) -> Stopped | None:
    """For `sample`, which asks it after each token; None without stop strings.

    All of a completion is decoded, special tokens included: what a token adds to a text depends on those before it.
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
    """The tokens of a completion that lie before its first stop string, and the text between them and it: of a token
    that reaches into the stop string. None where there is no stop string."""
    text = str(tokenizer.decode(tokens))
    place = find_stop(text, stop_strings)
    if place is None:
        return None
    for count in reversed(range(len(tokens))):
        before = str(tokenizer.decode(tokens[:count]))
        if len(before) <= place and text.startswith(before):
            return tokens[:count], text[len(before) : place]
    return [], text[:place]
