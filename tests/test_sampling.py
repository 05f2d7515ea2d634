"""Sampling: tokens follow the softmax, completions end at their first EOS, and the logprobs are the model's."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor
from transformers import PreTrainedModel, TopKLogitsWarper, TopPLogitsWarper

from pipeline.config.schema import SamplingParams
from pipeline.models.rollout import completion_limits, completion_tokens
from pipeline.models.sampling import CDF_BLOCK, Rollout, doubling_sums, inverse_cdf, pad_prompts, sample, truncate
from tests.models import EOS, all_completions, plain_logits, plain_logprobs, tiny_gpt2, tiny_neox, token_lists, uniform

pytestmark = pytest.mark.numeric

CPU = torch.device("cpu")
LAST = 1 - 2**-53  # the largest number below one
PROMPTS = token_lists([1, 4, 2, 7], 7)


@functools.cache
def ending_model() -> PreTrainedModel:
    return tiny_neox(eos_logit=1.5)


def draw(model: PreTrainedModel, prompts: list[list[int]], limits: list[int], uniforms: Tensor, **how: Any) -> Rollout:
    ids, mask = pad_prompts(prompts, EOS, CPU)
    return sample(model, ids, mask, torch.tensor(limits), uniforms, [EOS], SamplingParams(**how))


def greedy(model: PreTrainedModel, prompt: list[int], **limit: int) -> list[int]:
    """The completion that transformers decodes."""
    ids = torch.tensor([prompt])
    generate: Any = model.generate
    tokens = generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=EOS, **limit)
    return tokens[0, len(prompt) :].tolist()


def random_logits(vocabulary: int, seed: int = 0, rows: int = 1) -> Tensor:
    return 2 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- inverse_cdf


@settings(deadline=None)
@given(st.integers(1, 3 * CDF_BLOCK + 1), st.integers(0, 10_000))
def test_looks_up_the_cumulative_softmax(vocabulary: int, seed: int) -> None:
    logits, u = random_logits(vocabulary, seed, rows=20), uniform(20, 1, seed)[:, 0]
    weights = np.exp(logits.numpy() - logits.numpy().max(1, keepdims=True))
    cumulative = weights.cumsum(1)
    truth = [np.searchsorted(c, x * c[-1], side="right") for c, x in zip(cumulative, u.numpy(), strict=True)]
    tokens, log_sum = inverse_cdf(logits, u)
    assert tokens.tolist() == truth
    torch.testing.assert_close(log_sum, logits.logsumexp(-1), rtol=0, atol=1e-12)


@settings(deadline=None)
@given(st.data())
def test_a_token_without_mass_is_never_chosen(data: st.DataObject) -> None:
    vocabulary = data.draw(st.integers(1, 2 * CDF_BLOCK + 1))
    some = data.draw(st.sets(st.integers(0, vocabulary - 1), min_size=1, max_size=5))
    logits = torch.full((3, vocabulary), -torch.inf)
    logits[:, sorted(some)] = random_logits(len(some), data.draw(st.integers(0, 1000))).float()
    inside = data.draw(st.floats(0, LAST))
    first, any_token, last = inverse_cdf(logits, torch.tensor([0, inside, LAST], dtype=torch.float64))[0].tolist()
    assert (first, last) == (min(some), max(some))
    assert any_token in some


def test_a_block_that_begins_without_mass_on_the_very_boundary() -> None:
    """A uniform number that hits the boundary of two blocks leaves a rest of zero, and rounding may make it less."""
    for seed in range(300):
        logits = 3 * random_logits(4 * CDF_BLOCK, seed).float()  # wide enough for sums in float64 to be rounded
        logits[0, ::CDF_BLOCK] = -torch.inf
        mass = (logits - logits.amax()).exp().unflatten(-1, (-1, CDF_BLOCK)).sum(-1, dtype=torch.float64)[0]
        boundaries = (mass.cumsum(0) / mass.sum())[:-1]
        ends = [torch.full_like(boundaries, end) for end in (0, 1)]
        near = torch.cat([boundaries, *(torch.nextafter(boundaries, end) for end in ends)])
        assert (inverse_cdf(logits.expand(len(near), -1), near)[0] % CDF_BLOCK > 0).all()


def test_logits_that_are_not_numbers_still_give_tokens_of_the_vocabulary() -> None:
    """A policy that diverged is stopped by its loss, which is NaN then; the sampler must live to see it."""
    for vocabulary in (3, 256, 300):
        tokens, _ = inverse_cdf(torch.full((2, vocabulary), torch.nan), uniform(2, 1)[:, 0])
        assert ((tokens >= 0) & (tokens < vocabulary)).all()


# --- truncate


@settings(deadline=None)
@given(st.integers(2, 40), st.integers(1, 45), st.floats(0.01, 1), st.integers(0, 10_000))
def test_truncates_as_transformers_does(vocabulary: int, top_k: int, top_p: float, seed: int) -> None:
    logits = random_logits(vocabulary, seed, rows=3)
    truth = TopKLogitsWarper(top_k)(None, logits)
    assert torch.equal(truncate(logits, SamplingParams(top_k=top_k)), truth)
    truth = TopPLogitsWarper(top_p)(None, truth)
    assert torch.equal(truncate(logits, SamplingParams(1.0, top_k, top_p)), truth)


def test_zero_and_one_truncate_nothing() -> None:
    logits = random_logits(9)
    assert truncate(logits, SamplingParams()) is logits


# --- sample


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000), st.integers(1, 4), st.lists(st.integers(1, 6), min_size=4, max_size=4))
def test_completions_end_at_their_first_eos_or_at_their_limit(seed: int, group: int, limits: list[int]) -> None:
    rollout = draw(ending_model(), PROMPTS, limits, uniform(4 * group, 6, seed))
    for i, row in enumerate(rollout.completions.tolist()):
        limit = limits[i // group]
        end = row.index(EOS) + 1 if EOS in row[:limit] else limit
        assert rollout.lengths[i] == end
        assert row[end:] == [EOS] * (len(row) - end)
        assert rollout.completion_mask[i].tolist() == [t < end for t in range(len(row))]
        assert rollout.ended([EOS])[i] == (row[end - 1] == EOS)
        assert completion_tokens(rollout, [EOS])[i] == [token for token in row[:end] if token != EOS]
    assert rollout.completions.shape[1] == rollout.lengths.max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 7, 1.0), (0.6, 7, 1.0), (1.3, 4, 0.8)])
def test_sampled_logprobs_are_those_of_the_model(
    dtype: torch.dtype, tolerance: float, temperature: float, top_k: int, top_p: float
) -> None:
    """Both: of the distribution that is sampled, truncated by transformers' warpers, and of the whole one."""
    model = tiny_neox(dtype=dtype, eos_logit=1.0)
    how = {"top_k": top_k, "top_p": top_p, "temperature": temperature}
    rollout = draw(model, PROMPTS, [6, 3, 6, 5], uniform(12, 6), **how)
    assert len(set(rollout.lengths.tolist())) > 2
    for i, length in enumerate(rollout.lengths.tolist()):
        row = rollout.completions[i, :length]
        with torch.no_grad():
            logits = plain_logits(model, PROMPTS[i // 3], row.tolist())[:-1] / temperature
        kept = TopPLogitsWarper(top_p)(None, TopKLogitsWarper(top_k)(None, logits))
        for logprobs, table in ((rollout.sampler_logprobs, kept), (rollout.logprobs, logits)):
            truth = table.log_softmax(-1).gather(1, row[:, None])[:, 0]
            torch.testing.assert_close(logprobs[i, :length], truth, rtol=0, atol=tolerance)


@pytest.mark.parametrize("architecture", [tiny_neox, tiny_gpt2])
def test_a_prompt_s_completions_do_not_depend_on_the_other_prompts(architecture: Callable[[], PreTrainedModel]) -> None:
    model, noise, group = architecture(), uniform(12, 6), 3
    together = draw(model, PROMPTS, [6, 4, 5, 6], noise)
    for b, (prompt, limit) in enumerate(zip(PROMPTS, [6, 4, 5, 6], strict=True)):
        rows = slice(b * group, (b + 1) * group)
        alone = draw(model, [prompt], [limit], noise[rows])
        width = alone.completions.shape[1]
        assert torch.equal(together.lengths[rows], alone.lengths)
        assert torch.equal(together.completions[rows, :width], alone.completions)
        counts = alone.completion_mask
        torch.testing.assert_close(together.logprobs[rows, :width][counts], alone.logprobs[counts], rtol=0, atol=1e-12)


@pytest.mark.parametrize("eos_logit", [0.0, 2.0])
def test_the_most_likely_token_each_time_is_greedy_decoding(eos_logit: float) -> None:
    model = tiny_neox(eos_logit=eos_logit)
    rollout = draw(model, PROMPTS, [8] * 4, uniform(4, 8), top_k=1)
    for i, prompt in enumerate(PROMPTS):
        truth = greedy(model, prompt, max_new_tokens=8)
        assert rollout.completions[i, : rollout.lengths[i]].tolist() == truth
    assert rollout.sampler_logprobs[rollout.completion_mask].abs().max() == 0  # nothing else could be sampled


def test_whole_completions_are_as_frequent_as_they_are_likely() -> None:
    vocabulary, limit, draws = 4, 2, 5000
    model = tiny_neox(vocabulary)
    with torch.no_grad():
        model.get_output_embeddings().weight /= 4  # flat enough for every completion to be expected some times
    rows, lengths = all_completions(vocabulary, limit)
    with torch.no_grad():
        pairs = zip(rows, lengths, strict=True)
        likely = [plain_logprobs(model, [1, 2], row[:length].tolist()).sum().exp() for row, length in pairs]
    rollout = draw(model, [[1, 2]], [limit], uniform(draws, limit, seed=3))
    seen = (rollout.completions[:, None] == rows).all(2).sum(0)
    expected = torch.stack(likely) * draws
    assert seen.sum() == draws
    assert expected.min() > 5
    assert chisquare(seen.numpy(), expected.numpy()).pvalue > 0.001


# --- limits


def test_limits_of_completions() -> None:
    assert completion_limits([3, 25], 20, "completion").tolist() == [20, 20]
    assert completion_limits([3, 19, 20, 25], 20, "total").tolist() == [17, 1, 1, 1]


def test_as_long_as_generate_makes_them_where_the_prompt_counts() -> None:
    """The notebook's `max_length`, which counts the prompt's tokens too."""
    model, longest = tiny_neox(eos_logit=-50.0), 9
    limits = completion_limits([len(p) for p in PROMPTS], longest, "total").tolist()
    rollout = draw(model, PROMPTS, limits, uniform(4, longest))
    for i, prompt in enumerate(PROMPTS):
        assert rollout.lengths[i] == len(greedy(model, prompt, max_length=longest))


@pytest.mark.parametrize("columns", [1, 2, 7, 128, 393])
def test_sums_by_doubling_are_the_running_sums(columns: int) -> None:
    """What a GPU adds up in place of its cumsum, whose order is any."""
    mass = uniform(3, columns)
    torch.testing.assert_close(doubling_sums(mass), mass.cumsum(-1), rtol=1e-14, atol=0)
