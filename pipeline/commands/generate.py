"""`reinforce generate`: continue prompts with the reference model and with the trained policy, greedily, as the
notebook does. With the chat template that params.yaml names, the models answer the prompts instead."""

import argparse
import sys
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.config.load import load_params
from pipeline.config.schema import SamplingParams
from pipeline.distributed.device import configure_torch
from pipeline.errors import UserError
from pipeline.file_io import read_json
from pipeline.models.load import end_of_text_ids, holds_model, load_policy, load_tokenizer
from pipeline.models.rollout import context_length
from pipeline.models.sampling import sample
from pipeline.models.stop_strings import stop_check
from pipeline.models.tokenization import check_vocabulary, encode_prompt, encode_text
from pipeline.paths import CHECKPOINT, POLICY, RUN_FILES
from pipeline.runs.consistency import holds_policy_of, run_digests
from pipeline.runs.provenance import chosen_params

FOLDERS = {"reference": CHECKPOINT / "policy", "policy": POLICY}


def continuation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    eos: tuple[int, ...],
    max_tokens: int,
    stop_strings: Sequence[str] = (),
) -> str:
    """The prompt and its most likely continuation, `max_tokens` tokens together. Decoding settings in the model's files
    are ignored.

    No cache is used, which is right for every model.
    """
    prompt, room = torch.tensor([ids]), max_tokens - len(ids)
    noise = torch.zeros(1, room, dtype=torch.float64)  # top_k = 1 leaves nothing to draw
    rollout = sample(
        model,
        prompt,
        torch.ones_like(prompt, dtype=torch.bool),
        torch.tensor([room]),
        noise,
        eos,
        SamplingParams(top_k=1),
        layout="no_cache",
        stopped=stop_check(tokenizer, stop_strings),
    )
    return str(tokenizer.decode(ids + rollout.completions[0, : int(rollout.lengths[0])].tolist()))


def print_origin() -> None:
    """Say which run trained data/policy. Warn on stderr if that is unknown or params.yaml selects another run."""
    try:
        trained, digests = read_json(RUN_FILES.run), run_digests(RUN_FILES.summary)
        known = holds_policy_of(digests) and digests["train_key"] == trained["train_key"]
    except (FileNotFoundError, UserError):
        known = False
    if not known:
        print(
            f"warning: {POLICY} is not of the run in {RUN_FILES.run.parent}; `dvc checkout` brings back both",
            file=sys.stderr,
        )
        return
    params, selected = trained["params"], chosen_params(load_params())
    chosen = ", ".join(f"{name} {params[name]}" for name in ("model", "prompts", "reward", "recipe", "seed"))
    print(f"policy of the run {trained['train_key'][:12]}: {chosen}; each token is the most likely one")
    names = [name for name in selected if selected[name] != params.get(name)]
    selectors = [name for name in names if "." not in name]  # another table has other values anyway
    if names:
        others = ", ".join(f"{name}={selected[name]}, not {params.get(name)}" for name in selectors or names)
        print(f"warning: params.yaml selects another run: {others}; `dvc repro` trains it", file=sys.stderr)


def main(options: argparse.Namespace) -> None:
    """Raises UserError for a prompt that is no text or too long, and where there is no model yet."""
    for prompt in options.prompts:
        if not prompt or any("\ud800" <= character <= "\udfff" for character in prompt):  # bytes that were no UTF-8
            raise UserError(f"the prompt {prompt[:40]!r} should be text in UTF-8, and not empty")
    present = {name: folder for name, folder in FOLDERS.items() if holds_model(folder)}
    if not present:
        raise UserError("no model in data/checkpoint/policy or data/policy; run `dvc repro` first")
    params = load_params()
    chat, stop_strings = params.selected_model.chat, params.selected_recipe.stop_strings
    device = configure_torch("cpu", params.train.threads, params.train.arithmetic)
    if "policy" in present:
        print_origin()
    for name, folder in present.items():
        model, tokenizer = load_policy(folder, device), load_tokenizer(folder)
        eos, room = end_of_text_ids(folder, tokenizer), context_length(model.config) or options.max_tokens
        if options.max_tokens > room:
            raise UserError(f"--max-tokens {options.max_tokens}: the context of {folder} has {room}")
        for prompt in options.prompts:
            plain, ids = encode_text(tokenizer, prompt), encode_prompt(tokenizer, prompt, chat)
            check_vocabulary(prompt, ids, model.config.get_text_config().vocab_size)
            if len(plain) >= options.max_tokens:
                raise UserError(f"--max-tokens {options.max_tokens} leaves no room behind the prompt {prompt[:40]!r}")
            whole = options.max_tokens + max(0, len(ids) - len(plain))  # the chat template's own tokens do not count
            if whole > room:
                needs = f"{whole} with the chat template's own"
                raise UserError(f"--max-tokens {options.max_tokens}: {needs}; the context of {folder} has {room}")
            print(f"{name}: {continuation(model, tokenizer, ids, eos, whole, stop_strings)}")
