"""Completions sampled at once are bounded by the bytes of their cache, which changes none of them."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from pipeline.models import cache_size
from pipeline.models.cache_size import cache_bytes, completions_at_once, own_keys, sequence_bytes
from pipeline.models.growing_cache import grow_in_steps
from pipeline.models.load import load_policy
from pipeline.models.memory import bf16_copy
from pipeline.models.sampling import SAMPLED_AT_ONCE, SamplingLayout, pad_prompts, sample
from tests.families import tiny
from tests.models import PARAMS, token_lists, uniform
from tests.project import ROOT

pytestmark = pytest.mark.numeric

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 7, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 8, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
NEVER = (-1,)  # no token ends a completion


def grouped() -> PreTrainedModel:
    """Two heads of keys and values for four of queries."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def sliding() -> PreTrainedModel:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)).eval()


def test_bytes_of_a_cache_by_hand() -> None:
    """layers x (key, value) x heads of keys x head size x tokens x bytes of a number."""
    prompt = torch.tensor([1, 2, 3])
    assert sequence_bytes(grouped(), prompt, 20, placed=True) == 3 * 2 * 2 * 8 * 20 * 4
    assert sequence_bytes(bf16_copy(grouped()), prompt, 20, placed=True) == 3 * 2 * 2 * 8 * 20 * 2
    assert completions_at_once(grouped(), prompt, 20, placed=True) == 2**30 // (3 * 2 * 2 * 8 * 20 * 4)
    assert completions_at_once(grouped(), prompt, 10**9, placed=True) == 1, "one is beyond the bound, and sampled"


def test_a_recurrent_state_does_not_grow() -> None:
    """LFM2: a layer of attention, whose keys and values do, and a convolution, whose last inputs are kept."""
    model = tiny("lfm2")
    short, long = (sequence_bytes(model, torch.tensor([5, 6, 7, 8]), tokens, placed=False) for tokens in (10, 100))
    assert long - short == 90 * 2 * 2 * 8 * 4
    assert 0 < short - 10 * 2 * 2 * 8 * 4 < 1000


@pytest.mark.parametrize(
    ("make", "layout", "least"),  # of the bound that is used
    [(grouped, "left_padding", 0.7), (grouped, "equal_lengths", 0.4), (sliding, "left_padding", 0.1)],
)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_the_cache_keeps_within_the_bound(
    make: Callable[[], PreTrainedModel], layout: SamplingLayout, least: float, rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A group is sampled in parts where it is larger, and the tokens are those of all at once."""
    model, prompts = make(), token_lists([5, 2, 5, 4], 7)
    arguments = (*pad_prompts(prompts, 0, CPU), torch.tensor([20, 20, 9, 20]), uniform(16, 20), NEVER)
    whole = sample(model, *arguments, layout=layout)
    bound = rows * sequence_bytes(model, torch.tensor(prompts[1]), 25, placed=True)
    monkeypatch.setitem(cache_size.CACHE_BYTES, "cpu", bound)
    most = 0

    def watched(**inputs: Any) -> Any:
        nonlocal most
        output = model(**inputs)
        most = max(most, cache_bytes(output.past_key_values))
        return output

    parts = sample(watched, *arguments, layout=layout)
    assert least * bound < most <= bound
    assert torch.equal(parts.completions, whole.completions)
    assert torch.equal(parts.lengths, whole.lengths)
    torch.testing.assert_close(parts.logprobs, whole.logprobs, rtol=0, atol=1e-4)


def test_the_default_run_is_sampled_as_before() -> None:
    longest = 100  # tokens: its prompts have at most 31 characters
    policy = load_policy(ROOT / "data/pocket/checkpoint", CPU)
    assert completions_at_once(policy, torch.tensor([5]), longest, placed=True) > SAMPLED_AT_ONCE
    assert PARAMS.train.max_tokens + 31 <= longest


def test_a_growing_cache_holds_what_a_concatenated_one_does() -> None:
    """In few buffers, of no more than the tokens to come, also when its rows are repeated or leave it; then it frees
    the buffer at once."""
    generator, most = torch.Generator().manual_seed(0), 2 + 200
    plain, growing = DynamicCache(), DynamicCache()

    def append(rows: int, tokens: int) -> None:
        for layer in range(2):
            keys, values = (torch.randn(rows, 2, tokens, size, generator=generator) for size in (3, 5))
            ours, theirs = (cache.update(keys, values, layer) for cache in (growing, plain))
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])

    append(2, 2)
    grow_in_steps(growing, most)
    buffers: list[weakref.ref[torch.Tensor]] = []
    for t in range(200):
        if t == 100:
            for cache in (plain, growing):
                cache.batch_repeat_interleave(2)
        if t == 150:
            for cache in (plain, growing):
                cache.batch_select_indices(torch.tensor([2, 0]))
            assert buffers[-1]() is None
        append(4 if 100 <= t < 150 else 2, 1)
        if not buffers or growing.layers[1].values._base is not buffers[-1]():
            buffers.append(weakref.ref(growing.layers[1].values._base))
            assert growing.layers[1].values._base.shape[-2] <= most
    assert growing.get_seq_length() == plain.get_seq_length() == most
    assert len(buffers) == 4, "of 67 and 132 tokens, one of the repeated rows, one of those that stay"


def noting_buffers(model: PreTrainedModel, buffers: list[torch.Tensor]) -> Callable[..., Any]:
    """The model; after each call the tensor is noted in which the values of the second layer have their room."""

    def watched(**inputs: Any) -> Any:
        output = model(**inputs)
        buffers.append(own_keys(output.past_key_values).layers[1].values._base)
        return output

    return watched


def test_a_decoder_made_for_an_encoder_samples_from_one_prefill() -> None:
    """RoCBert, RemBERT and Megatron-BERT keep their own keys beside those of an encoder that they do not have."""
    model, (ids, mask) = tiny("roc_bert"), pad_prompts([[5, 6], [7]], 0, CPU)
    buffers: list[torch.Tensor] = []
    arguments = torch.tensor([3, 3]), uniform(4, 3), NEVER
    found, plain = (sample(each, ids, mask, *arguments, layout=layout) for each, layout in
                    ((noting_buffers(model, buffers), "left_padding"), (model, "no_cache")))  # fmt: skip
    assert buffers[-1] is buffers[-2] is not None
    assert torch.equal(found.completions, plain.completions)
    torch.testing.assert_close(found.logprobs, plain.logprobs, rtol=0, atol=1e-4)
    assert sequence_bytes(model, torch.tensor([5, 6]), 20, placed=True) == 2 * 2 * 4 * 8 * 20 * 4


def test_sampling_does_not_copy_the_cache_for_each_token() -> None:
    buffers: list[torch.Tensor] = []
    model = noting_buffers(grouped(), buffers)
    sample(model, *pad_prompts([[1, 2]], 0, CPU), torch.tensor([50]), uniform(3, 50), NEVER)
    tokens = buffers[-49:]  # before: the prompt, and the two calls that measure the cache
    assert all(buffer is tokens[0] for buffer in tokens)
    assert tokens[0].shape[-2] == 2 + 50
