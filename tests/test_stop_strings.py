"""Stop strings end completions where transformers' generate ends them; what is read of a completion ends before."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.config.schema import SamplingParams
from pipeline.file_io import read_jsonl
from pipeline.models.load import load_tokenizer
from pipeline.models.rollout import completion_texts, read_completions
from pipeline.models.sampling import Rollout, SamplingLayout, pad_prompts, sample
from pipeline.models.stop_strings import before_stop, find_stop, stop_check
from pipeline.stages import evaluate, train
from tests.models import tiny_neox, uniform
from tests.project import ROOT, Project
from tests.training import history
from tests.word_tokenizer import chat_tokenizer

pytestmark = pytest.mark.numeric

POCKET = ROOT / "data/pocket/checkpoint"
PROMPTS = ["What is the best way to", "Hi", "Can you tell me", "How do I make a"]
EOS, END, LIMIT = 0, 259, 24  # END: of a turn, as the chat model's tokenizer has it
FILLER = 4095  # a token that the policy does not say here
CPU = torch.device("cpu")
WORDS = load_tokenizer(POCKET)
BYTES = chat_tokenizer()


def draw(
    model: PreTrainedModel,
    prompts: list[list[int]],
    uniforms: Tensor,
    stop_strings: list[str],
    words: Any = WORDS,
    layout: SamplingLayout = "left_padding",
    **how: Any,
) -> Rollout:
    ids, mask = pad_prompts(prompts, EOS, CPU)
    limits, stopped = torch.full((len(prompts),), uniforms.shape[1]), stop_check(words, stop_strings)
    return sample(model, ids, mask, limits, uniforms, [EOS], SamplingParams(**how), layout, stopped)


def rows(rollout: Rollout) -> list[list[int]]:
    return [row[:length] for row, length in zip(rollout.completions.tolist(), rollout.lengths.tolist(), strict=True)]


def rollout_of(completions: list[list[int]], filler: int) -> Rollout:
    longest = max(map(len, completions))
    ids = torch.tensor([row + [filler] * (longest - len(row)) for row in completions])
    unknown = torch.zeros(ids.shape)
    return Rollout(ids, ids >= 0, ids, torch.tensor(list(map(len, completions))), unknown, unknown)


# --- where a completion ends


@pytest.fixture(scope="module")
def pocket() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float64)


def test_completions_end_where_generate_ends_them(pocket: PreTrainedModel) -> None:
    """At several places of each text, with stop strings that begin or end inside a token, or span several. `generate`
    also ends at one that began in the prompt, which the policy has not said."""
    prompts = [WORDS(prompt)["input_ids"] for prompt in PROMPTS]
    zeros = torch.zeros(len(prompts), LIMIT, dtype=torch.float64)
    free = [str(WORDS.decode(row)) for row in rows(draw(pocket, prompts, zeros, [], top_k=1))]
    stops = [[text[i : i + n]] for text in free for i, n in ((2, 3), (7, 1), (11, 6), (20, 2)) if text[i : i + n]]
    stops += [["never said"], ["e", "the"], ["."], [free[0][5:9], free[1][3:5]]]
    straddled = compared = 0
    ids, mask = pad_prompts(prompts, EOS, CPU)
    generate, asked = pocket.generate, [str(WORDS.decode(prompt)) for prompt in prompts]
    for stop_strings in stops:
        found = rows(draw(pocket, prompts, zeros, stop_strings, top_k=1))
        truth = generate(  # type: ignore[operator]
            ids, attention_mask=mask.long(), do_sample=False, max_new_tokens=LIMIT, pad_token_id=FILLER,
            stop_strings=stop_strings, tokenizer=WORDS,
        )[:, ids.shape[1] :].tolist()  # fmt: skip
        for before, prompt, tokens, row in zip(asked, prompts, found, truth, strict=True):
            whole = str(WORDS.decode(prompt + tokens))
            if any(0 <= whole.find(stop, max(0, len(before) - len(stop) + 1)) < len(before) for stop in stop_strings):
                continue
            assert FILLER not in tokens
            assert tokens == [token for token in row if token != FILLER], stop_strings
            compared += 1
            straddled += len(tokens) < LIMIT and not str(WORDS.decode(tokens)).endswith(tuple(stop_strings))
    assert compared > 3 * len(stops)
    assert straddled > 5  # the stop string ended inside the token


@settings(deadline=None, max_examples=9)
@given(st.integers(0, 1000), st.sampled_from(["left_padding", "equal_lengths", "no_cache"]), st.integers(1, 3))
def test_the_same_tokens_are_drawn_up_to_the_stop(seed: int, layout: SamplingLayout, group: int) -> None:
    """Each row ends by itself, with the first token after which its text holds a stop string, in any layout."""
    model, prompts = tiny_neox(260, hidden=32), [[70, 71], [72, 73, 74, 75], [76]]
    noise, stops = uniform(3 * group, 24, seed), ["a", "\u00fc", "<|im_end|>", "Q7", "\u0014"]
    how: dict[str, Any] = {"words": BYTES, "layout": layout, "top_k": 100}
    free, stopped = draw(model, prompts, noise, [], **how), draw(model, prompts, noise, stops, **how)
    for i, tokens in enumerate(rows(free)):
        ends = [t for t in range(1, len(tokens)) if any(s in BYTES.decode(tokens[:t]) for s in stops)]
        length = ends[0] if ends else len(tokens)
        assert stopped.lengths[i] == length
        assert stopped.completions[i, :length].tolist() == tokens[:length]
        assert set(stopped.completions[i, length:].tolist()) <= {EOS}
        assert int(stopped.completion_mask[i].sum()) == length  # the token that completes the string is in the loss
        for name in ("logprobs", "sampler_logprobs"):
            one, other = getattr(stopped, name)[i, :length], getattr(free, name)[i, :length]
            torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_no_stop_strings_ask_nothing() -> None:
    assert stop_check(WORDS, ()) is None


# --- what is read of it


@pytest.mark.parametrize(("text", "stop_strings", "place"), [
    ("one two", ["two"], 4), ("one two", ["x"], None), ("one two", ["two", "o"], 0), ("", ["a"], None),
    ("a\n\nb", ["\n", "\n\n"], 1),
])  # fmt: skip
def test_the_first_stop_string_counts(text: str, stop_strings: list[str], place: int | None) -> None:
    assert find_stop(text, stop_strings) == place


@settings(deadline=None)
@given(st.data())
def test_what_is_read_is_the_text_before_the_stop_string(data: st.DataObject) -> None:
    """As many whole tokens as lie before it, and the rest, of a token that reaches into it."""
    text = data.draw(st.sampled_from(["Tell me a joke about the weather", "\u00fcber \u2603 snow", "1 + 1 = 2\nYes\n"]))
    tokens = WORDS(text)["input_ids"]
    start = data.draw(st.integers(0, len(text) - 1))
    stop = text[start : data.draw(st.integers(start + 1, len(text)))]
    found = before_stop(WORDS, tokens, [stop])
    assert found is not None
    kept, rest = found
    assert str(WORDS.decode(kept)) + rest == text.partition(stop)[0]
    assert tokens[: len(kept)] == kept
    longer = str(WORDS.decode(tokens[: len(kept) + 1]))
    assert len(longer) > text.index(stop) or "\ufffd" in longer  # the next token reaches into it, or into a character


def encode(text: str) -> list[int]:
    return list(BYTES(text, add_special_tokens=False)["input_ids"])


def test_the_reward_reads_up_to_the_stop_string_and_each_ending_is_told() -> None:
    said = ["one.", "<|im_start|>two.", "three", "four<|im_end|>", ".", "<|im_end|>"]
    rollout = rollout_of([encode(text) for text in said], END)
    read = read_completions(rollout, BYTES, [END], ["."])
    assert [one.ending for one in read] == ["stop_string", "stop_string", "limit", "eos", "stop_string", "eos"]
    assert [BYTES.decode(one.tokens) for one in read] == ["one", "<|im_start|>two", "three", "four", "", ""]
    stripped = completion_texts(rollout, BYTES, "strip", 1, [END], ["."])
    assert stripped == ["one", "two", "three", "four", "", ""]
    kept = completion_texts(rollout, BYTES, "keep", 2, [END], ["."])
    assert kept == ["one", "<|im_start|>two", "three", "four<|im_end|>", "", "<|im_end|>"]


def test_an_end_of_turn_that_no_file_names_can_be_a_stop_string() -> None:
    rollout = rollout_of([encode("Hi<|im_end|>"), encode("Hi there")], EOS)
    assert completion_texts(rollout, BYTES, "strip", 1, [EOS], ["<|im_end|>"]) == ["Hi", "Hi there"]
    assert completion_texts(rollout, BYTES, "keep", 1, [EOS], ["<|im_end|>"])[0] == "Hi"


# --- a run


def test_a_run_with_stop_strings(here: Project) -> None:
    stops = list("etaoinsu")  # the policy says random bytes: with one letter alone it would seldom stop
    here.edit(recipes__stable__stop_strings=stops, train__steps=3, train__max_tokens=30)
    train.main()
    words, endings = load_tokenizer(here.root / "data/policy"), set()
    for row in read_jsonl(here.root / "reports/train/samples.jsonl"):
        assert not set(stops) & set(words.decode(row["tokens"][:-1]))
        text = str(words.decode(row["tokens"], skip_special_tokens=True))
        stopped = text[-1:] in stops
        assert row["completion"] == (text[:-1] if stopped else text)
        assert row["ended"] == (stopped or row["tokens"][-1] == EOS)
        endings.add(stopped)
    assert endings == {True, False}
    for step in history(here):
        assert step["ended_share"] + step["stopped_share"] + step["limit_share"] == pytest.approx(1)
        assert 0 < step["stopped_share"] < 1
    evaluate.main()
    for side in json.loads((here.root / "reports/evaluate/metrics.json").read_text())["text"].values():
        assert side["ended_share"] + side["stopped_share"] + side["limit_share"] == pytest.approx(1)
        assert 0 < side["stopped_share"] < 1
