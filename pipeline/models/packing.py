"""Several sequences in one row: a prompt once, then its completions, with little padding.

The attention mask lets a token see its prompt and its own completion so far; its position id counts within its own
sequence. n completions, R rows of at most L tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

ROW_TOKENS = 64  # at most, in a row of several completions: longer rows share more prompts and cost more attention


@dataclass(frozen=True)
class Rows:
    """Rows for one pass of a model, and the places of the completions in them."""

    ids: Tensor  # [R, L] int64
    last_prompt: Tensor  # [n] flat index, in R * L, of the last token of the completion's prompt
    first: Tensor  # [n] flat index of the completion's first token; the others follow it
    # positions, segments and parents of the tokens [R, L], see `_Row`; empty = the model gets ids only
    places: Sequence[Tensor] = ()

    @property
    def positions(self) -> Tensor | None:
        """[R, L] int64, position of each token in its own sequence; None = the model counts them itself."""
        return self.places[0] if self.places else None

    @property
    def mask(self) -> Tensor | None:
        """[R, 1, L, L] bool, True = the query (second to last) sees the key (last); None = the model's own."""
        if not self.places:
            return None
        _, segments, parents = self.places
        seen = (segments[:, :, None] == segments[:, None]) | (parents[:, :, None] == segments[:, None])
        return (seen & torch.ones_like(seen[0]).tril())[:, None]

    def with_others_on(self, device: torch.device, *others: Tensor) -> tuple["Rows", list[Tensor]]:
        """The rows and the other tensors on the device. Only what a model needs is moved: call `sources` before."""
        ids, *moved = move([self.ids, *self.places, *others], device)
        count = len(self.places)
        return replace(self, ids=ids, places=moved[:count]), moved[count:]

    def sources(self, completions: Tensor, tokens: Tensor, alignment: str) -> Tensor:
        """Flat indices [K] of the positions that predict these tokens: entry `tokens` [K] of `completions` [K].

        correct: the position before the token. shifted: the token itself, as in the notebook.
        """
        at = self.first[completions] + tokens
        if alignment == "shifted":
            return at
        return torch.where(tokens == 0, self.last_prompt[completions], at - 1)


def move(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Moves int64 tensors to a device in one transfer, since the host waits for a GPU at each transfer."""
    if all(tensor.device == device for tensor in tensors):
        return list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors]).to(device)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def pack(prompts: list[list[int]], completions: list[list[int]]) -> Rows:
    """Packs n sequences prompt + completion, in order, on the CPU. A prompt that equals the one before it is shared.

    Rows hold ROW_TOKENS tokens, or the longest sequence where that is more.
    """
    room = max(ROW_TOKENS, *(len(p) + len(c) for p, c in zip(prompts, completions, strict=True)))
    rows: list[_Row] = [_Row()]
    places = []  # of each completion: row, column of the prompt's last token, column of its own first
    for prompt, completion in zip(prompts, completions, strict=True):
        if not rows[-1].fits(prompt, completion, room):
            rows.append(_Row())
        places.append((len(rows) - 1, *rows[-1].add(prompt, completion)))
    width = max(len(row.ids) for row in rows)
    ids, positions, segments, parents = (
        torch.tensor([values + [filler] * (width - len(values)) for values in columns])
        for columns, filler in (
            ([row.ids for row in rows], 0), ([row.positions for row in rows], 0),
            ([row.segments for row in rows], -1), ([row.parents for row in rows], -1),
        )
    )  # fmt: skip
    last_prompt = torch.tensor([row * width + last for row, last, _ in places])
    first = torch.tensor([row * width + start for row, _, start in places])
    return Rows(ids, last_prompt, first, (positions, segments, parents))


def pad_right(prompts: list[list[int]], completions: list[list[int]]) -> Rows:
    """Puts each sequence prompt + completion into a row, padded on the right, on the CPU. A causal model needs neither
    mask nor positions for it: the padding comes after all tokens, so the result is that of the sequence alone."""
    sequences = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    width = max(map(len, sequences))
    ids = torch.tensor([sequence + sequence[:1] * (width - len(sequence)) for sequence in sequences])
    first = torch.tensor([row * width + len(prompt) for row, prompt in enumerate(prompts)])
    return Rows(ids, first - 1, first)


class _Row:
    """A row while it is filled. `segments` numbers prompts and completions; `parents` has the segment of the prompt."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.segments: list[int] = []
        self.parents: list[int] = []
        self.prompt: list[int] | None = None  # the last one
        self.prompt_end = 0  # the column after it
        self.prompt_segment = 0

    def fits(self, prompt: list[int], completion: list[int], room: int) -> bool:
        added = len(completion) + (0 if prompt == self.prompt else len(prompt))
        return len(self.ids) + added <= room

    def add(self, prompt: list[int], completion: list[int]) -> tuple[int, int]:
        """Adds a sequence. Returns the columns of the prompt's last token and of the completion's first token."""
        segment = self.segments[-1] + 1 if self.segments else 0
        if prompt != self.prompt:
            self._append(prompt, 0, segment, segment)
            self.prompt, self.prompt_end, self.prompt_segment = prompt, len(self.ids), segment
            segment += 1
        start = len(self.ids)
        self._append(completion, len(prompt), segment, self.prompt_segment)
        return self.prompt_end - 1, start

    def _append(self, tokens: list[int], position: int, segment: int, parent: int) -> None:
        self.ids += tokens
        self.positions += range(position, position + len(tokens))
        self.segments += [segment] * len(tokens)
        self.parents += [parent] * len(tokens)
