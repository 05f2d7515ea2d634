"""A sequence-classification model and its tokenizer: texts, or pairs of them, -> logits."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from pipeline.data.prompts import Prompt
from pipeline.errors import UserError
from pipeline.models.rollout import context_length
from pipeline.models.tokenization import end_dropout, shown
from pipeline.rewards.text_models import loading_options, texts_at_once

TOKENS_AT_ONCE = 2**15  # padding included: long texts of a large model would not fit
NO_LIMIT = 10**9  # tokenizers say so where they know none

Input = str | tuple[str, str]  # a text, or a pair that the tokenizer joins


class Row(NamedTuple):
    """An input as tokens."""

    ids: tuple[int, ...]
    types: tuple[int, ...] = ()  # token_type_ids, of which text each is; empty where the model takes none


class SequenceClassifier:
    """A model of transformers' AutoModelForSequenceClassification in a folder, in eval mode.

    reads_prompts: whether an input is a prompt with its completion, or a completion alone. max_tokens: the most tokens
    of an input; None takes what the model can read. Raises UserError, whose messages name the model by `key`, where
    max_tokens is no length that it can read, and where an empty text would have no token.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        reads_prompts: bool = False,
        max_tokens: int | None = None,
    ) -> None:
        logging.disable_progress_bar()
        self.key, self.device, self.reads_prompts = key, device, reads_prompts
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        end_dropout(self.tokenizer)
        self.model = AutoModelForSequenceClassification.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, **loading_options(device, dtype)
        )
        self.model.to(device).eval()
        self.config = self.model.config
        self.config.use_cache = False
        self.takes_types = "token_type_ids" in inspect.signature(self.model.forward).parameters
        self.in_template = reads_prompts and bool(self.tokenizer.chat_template)
        if self.in_template:  # the answer, and what ends it, are what is to be judged
            self.tokenizer.truncation_side = "left"
        self.room = self._room(max_tokens)
        # in place of a text without a token, which no model can read
        ends = (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id, self.tokenizer.pad_token_id)
        self.nothing = next((token for token in ends if token is not None), 0)
        if ends == (None, None, None) and not self.tokenizer("")["input_ids"]:
            raise UserError(f"{key}: an empty text has no token: the tokenizer names no eos_token, which it would be")

    def _room(self, max_tokens: int | None) -> int | None:
        """The most tokens of an input, special ones included; None for any number."""
        room = context_length(self.config)
        for name, part in self.model.named_modules():
            # RoBERTa's kind numbers positions from behind the padding's id on
            padding = getattr(part, "padding_idx", None) if name.endswith("position_embeddings") else None
            if room is not None and padding is not None:
                room -= padding + 1
        told = self.tokenizer.model_max_length
        if told < NO_LIMIT:
            room = told if room is None else min(room, told)
        if max_tokens is None:
            return room
        if room is not None and max_tokens > room:
            raise UserError(f"max_tokens = {max_tokens}: {self.key} reads at most {room} tokens")
        special = 0 if self.in_template else self.tokenizer.num_special_tokens_to_add(pair=self.reads_prompts)
        if max_tokens <= special:
            raise UserError(f"max_tokens = {max_tokens}: {self.key} puts {special} special tokens around a text alone")
        return max_tokens

    def input_of(self, prompt: Prompt, completion: str) -> Input:
        """What the model reads. Raises UserError where its chat template refuses the conversation."""
        if not self.reads_prompts:
            return completion
        return self.conversation(prompt, completion) if self.in_template else (prompt.text, completion)

    def conversation(self, prompt: Prompt, completion: str, **options: Any) -> str:
        """The prompt, one message of the user or the messages of a conversation, and its completion as the assistant's
        answer, in the chat template."""
        asked: Iterable[Mapping[str, str]] = prompt.messages or [{"role": "user", "content": prompt.text}]
        messages = [*map(dict, asked), {"role": "assistant", "content": completion}]
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except Exception as error:  # a template is a program, and may raise anything
            raise UserError(
                f"{self.key}: prompt {shown(prompt.content)}: the chat template refuses it: {error}"
            ) from None

    def rows(self, inputs: Sequence[Input]) -> tuple[list[Row], list[bool]]:
        """What the tokenizer makes of each, and whether it was cut to `room` tokens: as the tokenizer cuts, the longer
        text of a pair first; of a conversation the beginning."""
        found = self._tokenized(inputs)
        if self.room is None:
            return found, [False] * len(inputs)
        long = [len(row.ids) > self.room for row in found]
        cut = iter(self._tokenized([one for one, is_long in zip(inputs, long, strict=True) if is_long], cut=True))
        return [next(cut) if is_long else row for row, is_long in zip(found, long, strict=True)], long

    def _tokenized(self, inputs: Sequence[Input], cut: bool = False) -> list[Row]:
        if not inputs:
            return []
        firsts = [one if isinstance(one, str) else one[0] for one in inputs]
        seconds = [one[1] for one in inputs if not isinstance(one, str)] or None
        limit = {"truncation": True, "max_length": self.room} if cut else {}
        encoded = self.tokenizer(firsts, seconds, add_special_tokens=not self.in_template, verbose=False, **limit)
        ids = encoded["input_ids"]
        types = encoded.get("token_type_ids") if self.takes_types else None
        rows = [Row(tuple(ids[i]), tuple(types[i]) if types else ()) for i in range(len(inputs))]
        return [row if row.ids else Row((self.nothing,), (0,) * self.takes_types) for row in rows]

    @torch.inference_mode()
    def logits(self, rows: Sequence[Row]) -> Tensor:
        """[N, labels] in float32, on the CPU. Each different row is read once, rows of similar length together."""
        different = sorted(dict.fromkeys(rows), key=lambda row: len(row.ids), reverse=True)
        read: dict[Row, Tensor] = {}
        while waiting := different[len(read) :]:
            size = max(1, min(texts_at_once(self.device), TOKENS_AT_ONCE // len(waiting[0].ids)))
            read |= zip(waiting[:size], self._batch(waiting[:size]), strict=True)
        return torch.stack([read[row] for row in rows])

    def _batch(self, rows: Sequence[Row]) -> Tensor:
        """[n, labels]. Models that read one position take the last one that is not config.pad_token_id. Where that is
        None they take no padding; then an id that none of these texts holds is the padding's."""
        config = self.config.get_text_config()
        if (pad := config.pad_token_id) is not None:
            return self._padded(rows, pad)
        held = {token for row in rows for token in row.ids}
        free = next((token for token in range(config.vocab_size) if token not in held), None)
        if free is None and len(rows) > 1:  # together they hold the whole vocabulary
            return torch.cat([self._batch([row]) for row in rows])
        try:
            config.pad_token_id = free
            return self._padded(rows, free or 0)
        finally:
            config.pad_token_id = None

    def _padded(self, rows: Sequence[Row], pad: int) -> Tensor:
        """[n, labels]. Padding stands on the right, where no position moves for it."""

        def table(columns: Sequence[Sequence[int]], filler: int) -> Tensor:
            longest = max(map(len, columns))
            return torch.tensor([[*x, *[filler] * (longest - len(x))] for x in columns], device=self.device)

        inputs = {"input_ids": table([row.ids for row in rows], pad)}
        inputs["attention_mask"] = table([[1] * len(row.ids) for row in rows], 0)
        if rows[0].types:
            inputs["token_type_ids"] = table([row.types for row in rows], self.tokenizer.pad_token_type_id)
        return self.model(**inputs).logits.float().cpu()
