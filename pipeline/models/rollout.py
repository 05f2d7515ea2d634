"""How long completions may be, and the texts of sampled ones."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pipeline.errors import UserError
from pipeline.models.sampling import Rollout
from pipeline.models.stop_strings import before_stop
from pipeline.models.tokenization import PromptContent, shown


class Completion(NamedTuple):
    """A completion without the EOS or stop string that ended it."""

    tokens: list[int]
    rest: str  # text between `tokens` and a stop string, from a token that reaches into the stop string
    ending: Literal["eos", "stop_string", "limit"]


def completion_limits(prompt_tokens: list[int], max_tokens: int, length_limit: str) -> Tensor:
    """[B] the most tokens that a completion of each prompt may have.

    completion: max_tokens for each. total: max_tokens minus the prompt's tokens, as the notebook's `max_length`, but at
    least 1, where transformers' `generate` would refuse.
    """
    if length_limit == "completion":
        return torch.full((len(prompt_tokens),), max_tokens)
    return torch.tensor([max(1, max_tokens - tokens) for tokens in prompt_tokens])


def longest_sequence(prompt_tokens: list[int], max_tokens: int, length_limit: str) -> int:
    """Tokens of the longest prompt and completion together; see `completion_limits`."""
    return int((torch.tensor(prompt_tokens) + completion_limits(prompt_tokens, max_tokens, length_limit)).max())


def context_length(config: PretrainedConfig) -> int | None:
    """The context length in tokens of a model, or of its text part; None if its configuration names none."""
    for part in (config.get_text_config(), config):
        for name in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"):
            if type(size := getattr(part, name, None)) is int and size > 0:
                return size
    return None


def check_context(
    room: int | None, prompts: Sequence[PromptContent], prompt_tokens: list[int], limits: list[int], table: str
) -> None:
    """Raises UserError where a prompt and its completion need more positions than the model has (`room`), naming the
    first such prompt and the key at fault. table: key of the prompts' table."""
    for prompt, tokens, limit in zip(prompts, prompt_tokens, limits, strict=False):
        if room is not None and tokens + limit > room:
            needs = f"the prompt {shown(prompt)} has {tokens} tokens; with {limit} of a completion that is beyond"
            needs += f" the model's {room}"
            shorter = f"a smaller {table}.max_characters leaves it out"
            if tokens >= room:
                raise UserError(f"{table}: {needs}; {shorter}")
            raise UserError(f"train.max_tokens: {needs}; at most {room - tokens} would do, or {shorter}")


def read_completions(
    rollout: Rollout, tokenizer: PreTrainedTokenizerBase, eos: Sequence[int], stop_strings: Sequence[str] = ()
) -> list[Completion]:
    """The N completions without what ends them: a token of `eos`, or the text from the first stop string on."""
    read = []
    for tokens, ended in zip(completion_tokens(rollout, eos), rollout.ended(eos).tolist(), strict=True):
        stopped = before_stop(tokenizer, tokens, stop_strings) if stop_strings else None
        if stopped is not None:
            read.append(Completion(*stopped, "stop_string"))
        else:
            read.append(Completion(tokens, "", "eos" if ended else "limit"))
    return read


def completion_texts(
    rollout: Rollout,
    tokenizer: PreTrainedTokenizerBase,
    special_tokens: str,
    group: int,
    eos: Sequence[int],
    stop_strings: Sequence[str] = (),
) -> list[str]:
    """Texts [N] as the reward reads them: up to a stop string, which is not part of the text.

    strip: without special tokens, and without the token of `eos` that ends them, which need not be a special token.
    keep: with both, and with the EOS that fills up to the group's longest completion, as the notebook decodes them.
    """
    read = read_completions(rollout, tokenizer, eos, stop_strings)
    rows = [completion.tokens for completion in read]
    if special_tokens == "keep":
        lengths = rollout.lengths.view(-1, group).amax(1).repeat_interleave(group)
        filled = [row[:length] for row, length in zip(rollout.completions.tolist(), lengths.tolist(), strict=True)]
        rows = [one.tokens if one.ending == "stop_string" else row for one, row in zip(read, filled, strict=True)]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=special_tokens == "strip")
    return [text + completion.rest for text, completion in zip(texts, read, strict=True)]


def completion_tokens(rollout: Rollout, eos: Sequence[int]) -> list[list[int]]:
    """Token lists [N] without the token that ends them, one of `eos`."""
    rows = zip(rollout.token_lists(), rollout.ended(eos).tolist(), strict=True)
    return [tokens[:-1] if ended else tokens for tokens, ended in rows]
