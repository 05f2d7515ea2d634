"""Packed rows and slices of the vocabulary: what a sequence by itself gives, less work."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.models.logprobs import ROWS, log_probabilities
from pipeline.models.memory import bf16_copy
from pipeline.models.packing import ROW_TOKENS, pack
from pipeline.models.sampling import pad_prompts, sample
from tests.models import EOS, tiny_neox, token_lists, uniform

pytestmark = pytest.mark.numeric

CPU = torch.device("cpu")


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=8),
    st.lists(st.integers(0, 70), min_size=32, max_size=32),
)  # fmt: skip
def test_a_position_sees_its_own_sequence_and_nothing_else(shapes: list[tuple[int, int]], lengths: list[int]) -> None:
    """By walking every row: what is seen from a completion's last token, in order, is its prompt and itself."""
    drawn = token_lists([p for p, _ in shapes], 7)
    prompts = [prompt for prompt, (_, group) in zip(drawn, shapes, strict=True) for _ in range(group)]
    completions = token_lists(lengths[: len(prompts)], 7, seed=1)
    packed = pack(prompts, completions)
    ids, positions, mask = packed.ids.flatten(), packed.positions.flatten(), packed.mask[:, 0]
    width = packed.ids.shape[1]
    assert width <= max(ROW_TOKENS, *(len(p) + len(c) for p, c in zip(prompts, completions, strict=True)))
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        last = int(packed.first[i]) + len(completion) - 1 if completion else int(packed.last_prompt[i])
        row, column = divmod(last, width)
        seen = mask[row, column].nonzero().squeeze(1) + row * width
        assert ids[seen].tolist() == prompt + completion
        assert positions[seen].tolist() == list(range(len(prompt + completion)))
        for t in range(len(completion) + 1):  # the source of token t is the end of what precedes it
            source = int(packed.sources(torch.tensor([i]), torch.tensor([t]), "correct"))
            before = mask[row, source - row * width].nonzero().squeeze(1) + row * width
            assert ids[before].tolist() == prompt + completion[:t]


def test_a_prompt_stands_once_before_the_completions_that_fit_behind_it() -> None:
    prompts, completions = [[1, 2, 3]] * 4 + [[4]], token_lists([5, 5, 5, 5, 2], 7)
    packed = pack(prompts, completions)
    assert packed.ids.shape == (1, 3 + 4 * 5 + 1 + 2)
    assert packed.last_prompt.tolist() == [2, 2, 2, 2, 23]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradients_of_log_probabilities_and_entropy_are_autograd_s(temperature: float) -> None:
    """Over more rows than a slice has, with positions that several tokens ask and some that none does."""
    rows, vocabulary = ROWS + 5, 11
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocabulary, generator=draw, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([0, 0, 0, 3, 3, rows - 1, ROWS, ROWS - 1])
    tokens = torch.tensor([4, 4, 1, 0, 10, 2, 7, 7])
    weights, others = (torch.randn(n, generator=draw, dtype=torch.float64) for n in (len(tokens), rows))
    logprobs, entropy = log_probabilities(logits.clone(), positions, tokens, temperature)
    measured = torch.autograd.grad((weights * logprobs).sum() + (others * entropy).sum(), logits)[0]
    table = (logits / temperature).log_softmax(-1)
    truth_entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(logprobs, table[positions, tokens])
    torch.testing.assert_close(entropy, truth_entropy)
    truth = torch.autograd.grad((weights * table[positions, tokens]).sum() + (others * truth_entropy).sum(), logits)[0]
    torch.testing.assert_close(measured, truth)


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits = (3 * torch.randn(40, 5000, generator=torch.Generator().manual_seed(0))).bfloat16()
    positions, tokens = torch.arange(40), torch.arange(40)
    logprobs, _ = log_probabilities(logits.clone(), positions, tokens, 1.0)
    truth = logits.double().log_softmax(-1)[positions, tokens]
    torch.testing.assert_close(logprobs.double(), truth, rtol=0, atol=1e-5)


def test_the_half_copy_is_the_model_in_bfloat16() -> None:
    model = tiny_neox(300, dtype=torch.float32)
    prompts = token_lists([3, 5, 1], 300)
    ids, mask = pad_prompts(prompts, EOS, CPU)
    arguments = (ids, mask, torch.full((3,), 6), uniform(12, 6), [EOS])
    half = sample(bf16_copy(model), *arguments)
    whole = sample(copy.deepcopy(model).to(torch.bfloat16), *arguments)
    assert torch.equal(half.completions, whole.completions)
    assert torch.equal(half.logprobs, whole.logprobs)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_sampling_in_parts_gives_the_tokens_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many at once as there are, three, or one prompt's; and with what has ended kept or taken out at once."""
    model = tiny_neox(eos_logit=-0.5)
    prompts = token_lists([3, 5, 1, 2, 5], 7)
    ids, mask = pad_prompts(prompts, EOS, CPU)
    arguments = (ids, mask, torch.tensor([4, 9, 7, 9, 3]), uniform(15, 9), [EOS])
    whole = sample(model, *arguments)
    assert len(set(whole.lengths.tolist())) > 3
    for at_once, below in ((1, 7 / 8), (6, 1.0), (1000, 0.0), (1000, 1.0)):
        monkeypatch.setattr("pipeline.models.sampling.SAMPLED_AT_ONCE", at_once)
        monkeypatch.setattr("pipeline.models.sampling.COMPACT_BELOW", below)
        parts = sample(model, *arguments)
        assert torch.equal(parts.completions, whole.completions)
        assert torch.equal(parts.lengths, whole.lengths)
        torch.testing.assert_close(parts.logprobs, whole.logprobs, rtol=0, atol=1e-12)
        torch.testing.assert_close(parts.sampler_logprobs, whole.sampler_logprobs, rtol=0, atol=1e-12)
