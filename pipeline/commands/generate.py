"""`reinforce generate`: continues prompts with the checkpoint and with the trained policy, greedily, as the notebook's does."""

import argparse

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.config.schema import SamplingParams
from pipeline.errors import UserError
from pipeline.models.load import end_of_text_ids, holds_model, load_policy, load_tokenizer
from pipeline.models.rollout import context_length
from pipeline.models.sampling import sample
from pipeline.models.tokenization import check_vocabulary, encode_prompt
from pipeline.paths import CHECKPOINT, POLICY

FOLDERS = {"checkpoint": CHECKPOINT / "policy", "policy": POLICY}


def continuation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int], eos: tuple[int, ...], max_tokens: int
) -> str:
    """Prompt and most likely continuation, `max_tokens` tokens together, whatever the checkpoint says of its decoding.

    Without a cache, which is right for every model.
    """
    prompt, room = torch.tensor([ids]), max_tokens - len(ids)
    noise = torch.zeros(1, room, dtype=torch.float64)  # top_k = 1 leaves nothing to draw
    rollout = sample(
        model, prompt, torch.ones_like(prompt, dtype=torch.bool), torch.tensor([room]), noise, eos,
        SamplingParams(top_k=1), layout="no_cache",
    )  # fmt: skip
    return str(tokenizer.decode(ids + rollout.completions[0, : int(rollout.lengths[0])].tolist()))


def main(options: argparse.Namespace) -> None:
    """Raises UserError for a prompt that is no text or too long, and where there is no model yet."""
    for prompt in options.prompts:
        if not prompt or any("\ud800" <= character <= "\udfff" for character in prompt):  # bytes that were no UTF-8
            raise UserError(f"the prompt {prompt[:40]!r} should be text in UTF-8, and not empty")
    present = {name: folder for name, folder in FOLDERS.items() if holds_model(folder)}
    if not present:
        raise UserError("no model in data/checkpoint/policy or data/policy; run `dvc repro` first")
    for name, folder in present.items():
        model, tokenizer = load_policy(folder, torch.device("cpu")), load_tokenizer(folder)
        eos, room = end_of_text_ids(folder, tokenizer), context_length(model.config) or options.max_tokens
        if options.max_tokens > room:
            raise UserError(f"--max-tokens {options.max_tokens}: the context of {folder} has {room}")
        for prompt in options.prompts:
            ids = encode_prompt(tokenizer, prompt)
            check_vocabulary(prompt, ids, model.config.get_text_config().vocab_size)
            if len(ids) >= options.max_tokens:
                raise UserError(f"--max-tokens {options.max_tokens} leaves no room behind the prompt {prompt[:40]!r}")
            print(f"{name}: {continuation(model, tokenizer, ids, eos, options.max_tokens)}")
