"""`generate`: greedy whatever the checkpoint says of its decoding, up to every end, from any tokenizer."""

import json
from pathlib import Path

import pytest
import torch
from transformers import GPTNeoXForCausalLM

from pipeline.commands.generate import continuation
from pipeline.models.load import end_of_text_ids, load_policy, load_tokenizer
from pipeline.models.tokenization import encode_prompt
from tests.project import ROOT

POCKET = ROOT / "data/pocket/checkpoint"
PROMPT, MAX_TOKENS = "What is the best way to", 24


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for file in POCKET.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink()
    return tmp_path


def greedy(ends: list[int]) -> str:
    """Token by token from the forward pass."""
    model, tokenizer = GPTNeoXForCausalLM.from_pretrained(POCKET, dtype=torch.float32), load_tokenizer(POCKET)
    ids = tokenizer(PROMPT)["input_ids"]
    with torch.no_grad():
        while len(ids) < MAX_TOKENS and ids[-1] not in ends:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids)


def said(folder: Path) -> str:
    tokenizer, policy = load_tokenizer(folder), load_policy(folder, torch.device("cpu"))
    ends = end_of_text_ids(folder, tokenizer)
    return continuation(policy, tokenizer, encode_prompt(tokenizer, PROMPT, None), ends, MAX_TOKENS)


@pytest.mark.parametrize("settings", [
    {"do_sample": True, "temperature": 5.0, "top_k": 3},
    {"num_beams": 4, "early_stopping": True, "no_repeat_ngram_size": 2},
    {"repetition_penalty": 1.8, "suppress_tokens": [12, 14, 200], "forced_eos_token_id": 0},
    {"max_length": 3, "min_new_tokens": 2, "bad_words_ids": [[5]], "prompt_lookup_num_tokens": 2},
    {"do_sample": False, "temperature": 0.3, "top_p": 0.2},
])  # fmt: skip
def test_greedy_is_greedy_whatever_the_checkpoint_says(folder: Path, settings: dict[str, object]) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, **settings}))
    assert said(folder) == greedy([0])


def test_it_ends_at_every_end_that_the_files_name(folder: Path) -> None:
    full = greedy([0])
    tokenizer = load_tokenizer(POCKET)
    end = tokenizer(full)["input_ids"][-3]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, end]}))
    found = said(folder)
    assert found == greedy([0, end])
    assert len(found) < len(full)
