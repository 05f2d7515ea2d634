"""Between texts and rollouts: how long completions may be, and their texts."""

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import UserError
from pipeline.policy.sampling import Rollout


def completion_limits(prompt_tokens: list[int], max_tokens: int, length_limit: str) -> Tensor:
    """[B] tokens that a completion may have.

    completion: max_tokens for each. total: max_tokens less the prompt's, as the notebook's `max_length`; at least one,
    where `generate` would refuse.
    """
    if length_limit == "completion":
        return torch.full((len(prompt_tokens),), max_tokens)
    return torch.tensor([max(1, max_tokens - tokens) for tokens in prompt_tokens])


def check_context(model: PreTrainedModel, prompt_tokens: list[int], limits: Tensor) -> None:
    """Raises UserError where a prompt and its completion need more positions than the model has."""
    room = getattr(model.config, "max_position_embeddings", None)
    need = max(tokens + limit for tokens, limit in zip(prompt_tokens, limits.tolist(), strict=True))
    if room is not None and need > room:
        raise UserError(
            f"train.max_tokens: prompt and completion together need {need} tokens, the model's context has {room}"
        )


def completion_texts(
    rollout: Rollout, tokenizer: PreTrainedTokenizerBase, special_tokens: str, group: int
) -> list[str]:
    """Texts [N] as the reward reads them.

    strip: without special tokens. keep: with them, and with the EOS that fills up to the group's longest completion,
    which is what the notebook decodes.
    """
    lengths = rollout.lengths
    if special_tokens == "keep":
        lengths = lengths.view(-1, group).amax(1).repeat_interleave(group)
    ids = [row[:length] for row, length in zip(rollout.completions.tolist(), lengths.tolist(), strict=True)]
    return tokenizer.batch_decode(ids, skip_special_tokens=special_tokens == "strip")


def completion_tokens(rollout: Rollout, eos: int) -> list[list[int]]:
    """Token lists [N] without the closing EOS."""
    rows = zip(rollout.completions.tolist(), rollout.lengths.tolist(), rollout.ended(eos).tolist(), strict=True)
    return [row[: length - ended] for row, length, ended in rows]
