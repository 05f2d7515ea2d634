"""Prompts as tokens, and the ids that end a text: what a tokenizer appends, prompts without a token, several ends."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline.errors import UserError
from pipeline.models.load import end_of_text_ids, load_tokenizer
from pipeline.models.rollout import check_context, completion_texts, completion_tokens, context_length
from pipeline.models.sampling import Rollout, pad_prompts, sample
from pipeline.models.tokenization import check_certain, check_vocabulary, encode_prompt
from tests.models import tiny_neox, token_lists, uniform
from tests.word_tokenizer import WORDS, tokenizer, write


@pytest.mark.parametrize(("template", "before"), [
    ("", []), ("$A <eos>", []), ("$A <sep> <eos>", []),
    ("<bos> $A", [1]), ("<bos> $A <eos>", [1]), ("<bos> $A <sep>", [1]),
])  # fmt: skip
def test_what_a_tokenizer_appends_is_taken_off(template: str, before: list[int]) -> None:
    assert encode_prompt(tokenizer(template), "say a word", None) == [*before, 4, 5, 6]


@pytest.mark.parametrize("template", ["$A <eos>", "<bos> $A <sep> <eos>"])
def test_a_tokenizer_loads_and_is_saved_without_what_it_appends(template: str, tmp_path: Path) -> None:
    """Who loads data/policy with its tokenizer gives the policy what it was trained on."""
    tokenizer(template).save_pretrained(tmp_path / "one")
    write(tmp_path / "one", config={})
    load_tokenizer(tmp_path / "one").save_pretrained(tmp_path / "two")
    ids = AutoTokenizer.from_pretrained(tmp_path / "two")("say a word")["input_ids"]
    assert ids == [*([1] if "<bos>" in template else []), 4, 5, 6]
    assert AutoTokenizer.from_pretrained(tmp_path / "one")("say a word")["input_ids"][-1] == 0


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [("say <eos>", [4, 0]), ("say <eos> ", [4, 0]), ("<eos> say", [0, 4]), ("<eos>", [0]), ("<eos> <eos>", [0, 0]),
     ("say <sep>", [4, 2]), ("<bos> say", [1, 4]), ("<bos>", [1])],
)  # fmt: skip
@pytest.mark.parametrize("template", ["", "$A <eos>", "<bos> $A", "<bos> $A <sep>", "<eos> $A", "<eos> $A <eos>"])
def test_an_end_that_is_written_out_is_fed_as_it_is_written(template: str, prompt: str, ids: list[int]) -> None:
    """Whichever of a model's ends it is, at whichever place, and whatever the tokenizer adds."""
    before = [WORDS[template.split()[0]]] if template.startswith("<") else []
    assert encode_prompt(tokenizer(template), prompt, None) == [*before, *ids]


@pytest.mark.parametrize("kind", [processors.BertProcessing, processors.RobertaProcessing])
def test_other_processors_append_as_templates_do(kind: Any) -> None:
    words = tokenizer()
    words.backend_tokenizer.post_processor = kind(("<sep>", 2), ("<bos>", 1))
    assert encode_prompt(words, "say a word", None) == [1, 4, 5, 6]
    assert encode_prompt(words, "<sep>", None) == [1, 2]
    assert encode_prompt(words, "say <sep>", None) == [1, 4, 2]


@pytest.mark.parametrize("template", ["", "$A <eos>", "<eos> $A <eos>"])
def test_characters_that_are_unknown_stay_where_the_unknown_token_is_eos(template: str) -> None:
    words = tokenizer(template, unknown="<eos>")
    before = [0] if template.startswith("<") else []
    assert encode_prompt(words, "say \u2603", None) == [*before, 4, 0]
    assert encode_prompt(words, "\u2603 \u2603", None) == [*before, 0, 0]


def test_what_a_normalizer_puts_into_a_text_is_a_part_of_it() -> None:
    assert encode_prompt(tokenizer(normalizer=normalizers.Prepend("a ")), "say", None) == [5, 4]


def subwords(dropout: float | None) -> PreTrainedTokenizerFast:
    """Merges `abababab` to one token, or not, by chance."""
    ids, merges = {"<eos>": 0, "a": 1, "b": 2, "ab": 3, "abab": 4, "abababab": 5}, ["a b", "ab ab", "abab abab"]
    model = models.BPE(ids, [(one, two) for one, two in map(str.split, merges)], dropout=dropout)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="<eos>")


def test_dropped_merges_end_when_a_tokenizer_is_loaded_and_are_not_saved(tmp_path: Path) -> None:
    subwords(0.5).save_pretrained(tmp_path / "one")
    write(tmp_path / "one", config={})
    loaded = load_tokenizer(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    check_certain(loaded, ["abababab"] * 50, "models.mine")
    for words in (loaded, AutoTokenizer.from_pretrained(tmp_path / "two")):
        assert all(words("abababab")["input_ids"] == [5] for _ in range(50))


def test_a_tokenizer_that_samples_is_named_and_no_prompt_of_it() -> None:
    with pytest.raises(UserError, match=r"^models\.mine: the tokenizer gives a text other tokens each time"):
        check_certain(subwords(0.5), ["abababab"] * 50, "models.mine")


def test_a_prompt_beyond_the_vocabulary_is_refused_with_its_text() -> None:
    check_vocabulary("say a", [4, 5], 6)
    with pytest.raises(UserError, match=r"^prompt 'say a word': .* the id 6, the model has a vocabulary of 6$"):
        check_vocabulary("say a word", [4, 5, 6], 6)


@pytest.mark.parametrize("prompt", ["\u3000", "\u00a0", "  ", "\t", ""])
def test_a_prompt_without_a_token_is_refused_with_its_text(prompt: str) -> None:
    for template in ("", "$A <eos>", "<bos> $A"):
        with pytest.raises(UserError, match=r"prompt '.*': the tokenizer gives it no token"):
            encode_prompt(tokenizer(template), prompt, None)


def test_every_end_that_a_model_s_files_name_ends_a_text(tmp_path: Path) -> None:
    ids = tokenizer()
    assert end_of_text_ids(write(tmp_path, config={}), ids) == (0,)
    write(tmp_path, config={"eos_token_id": 5, "text_config": {"eos_token_id": [6, 5]}})
    write(tmp_path, generation_config={"eos_token_id": [0, 4, None, -1]})
    assert end_of_text_ids(tmp_path, ids) == (0, 4, 5, 6)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write(adapter, adapter_config={"base_model_name_or_path": str(tmp_path)})
    assert end_of_text_ids(adapter, ids) == (0, 4, 5, 6)


def test_a_completion_ends_at_any_of_its_ends() -> None:
    prompts = token_lists([2, 4], 7)
    ids, mask = pad_prompts(prompts, 0, torch.device("cpu"))
    rollout = sample(tiny_neox(), ids, mask, torch.full((2,), 30), uniform(200, 30), [0, 3, 5])
    rows = zip(rollout.completions.tolist(), rollout.lengths.tolist(), rollout.ended([0, 3, 5]).tolist(), strict=True)
    seen = set()
    for (row, length, ended), plain in zip(rows, completion_tokens(rollout, [0, 3, 5]), strict=True):
        ends = [t for t, token in enumerate(row) if token in (0, 3, 5)]
        assert length == (ends[0] + 1 if ends else len(row))
        assert ended == bool(ends)
        assert plain == row[: length - ended]
        assert set(row[length:]) <= {0}
        seen.add(row[length - 1])
    assert seen >= {0, 3, 5}


def test_no_end_is_a_part_of_the_text_that_a_reward_reads() -> None:
    """`say` is an ordinary word to the tokenizer, and an end by another file of the model."""
    rows, lengths = [[5, 6, 4], [5, 6, 0], [4, 0, 0], [2, 5, 6]], torch.tensor([3, 3, 1, 3])
    rollout = Rollout(*[torch.tensor(rows)] * 3, lengths, *[torch.zeros(4, 3)] * 2)
    assert completion_texts(rollout, tokenizer(), "strip", 1, [0, 4]) == ["a word", "a word", "", "<sep> a word"]
    kept = ["a word say", "a word <eos>", "say", "<sep> a word"]
    assert completion_texts(rollout, tokenizer(), "keep", 1, [0, 4]) == kept


class Nested:
    """A multi-modal configuration, as far as its context goes."""

    def __init__(self, text: Any, **own: Any) -> None:
        self.text = text
        self.__dict__.update(own)

    def get_text_config(self) -> Any:
        return self.text or self


@pytest.mark.parametrize(("text", "own", "room"), [
    ({}, {"max_position_embeddings": 64}, 64), ({}, {"n_positions": 16}, 16), ({}, {"max_seq_len": 4}, 4),
    ({"max_position_embeddings": 32}, {}, 32), ({"max_position_embeddings": 8}, {"max_position_embeddings": 99}, 8),
    ({}, {}, None),
])  # fmt: skip
def test_the_context_is_that_of_the_text_part(text: dict[str, int], own: dict[str, int], room: int | None) -> None:
    config: Any = Nested(Nested(None, **text) if text else None, **own)
    assert context_length(config) == room


def test_a_prompt_that_does_not_fit_is_named_with_the_key_at_fault() -> None:
    check_context(None, ["hi"], [10_000], [20], "prompt_sets.mine")
    check_context(30, ["hi"], [10], [20], "prompt_sets.mine")
    for length, message in (
        (11, r"^train\.max_tokens: the prompt 'so long' has 11 tokens; .* the model's 30; at most 19"),
        (30, r"^prompt_sets\.mine: the prompt 'so long' has 30 tokens; .* prompt_sets\.mine\.max_char"),
    ):
        with pytest.raises(UserError, match=message):
            check_context(30, ["hi", "so long"], [10, length], [20, 20], "prompt_sets.mine")
