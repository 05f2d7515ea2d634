"""Teacher-forced log-probabilities against the definition: one sequence at a time, without padding."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from pipeline.config.schema import SamplingParams
from pipeline.models.sampling import Rollout, pad_prompts, sample
from pipeline.models.scoring import score, score_rollout
from tests.models import (
    EOS,
    mask_of,
    plain_logits,
    plain_logprobs,
    rollout_of,
    tiny_gpt2,
    tiny_neox,
    token_lists,
    uniform,
)

pytestmark = pytest.mark.numeric

PROMPTS = token_lists([3, 1, 6, 2, 4], 7)
COMPLETIONS = token_lists([4, 5, 1, 3, 2], 7, seed=1)


def batch(prompts: list[list[int]], completions: list[list[int]]) -> Rollout:
    columns = max(map(len, completions))
    ids = torch.tensor([c + [EOS] * (columns - len(c)) for c in completions])
    return rollout_of(prompts, ids, torch.tensor([len(c) for c in completions]))


@pytest.fixture(scope="module")
def rollout() -> Rollout:
    return batch(PROMPTS, COMPLETIONS)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-12)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("architecture", [tiny_neox, tiny_gpt2])
@pytest.mark.parametrize("packing", [True, False])
def test_scores_are_those_of_each_sequence_alone(
    rollout: Rollout, architecture: Callable[[], PreTrainedModel], dtype: torch.dtype, tolerance: float,
    temperature: float, packing: bool,
) -> None:  # fmt: skip
    model = architecture().to(dtype)  # type: ignore[arg-type]  # wrapped without types
    with torch.no_grad():
        arguments = (
            rollout.prompt_ids,
            rollout.prompt_mask,
            rollout.completions,
            SamplingParams(temperature),
            "shifted",
        )
        scores = score(model, *arguments, packing=packing)
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        with torch.no_grad():
            logits = plain_logits(model, prompt, completion)
        logprobs = torch.log_softmax(logits / temperature, -1)
        correct = torch.stack([logprobs[t, token] for t, token in enumerate(completion)])
        one_later = torch.stack([logprobs[t + 1, token] for t, token in enumerate(completion)])
        entropy = torch.distributions.Categorical(logits=logits[:-1]).entropy()  # at temperature 1, whatever the loss's
        truths = {"logprobs": correct, "scored": one_later, "entropy": entropy}
        for name, truth in truths.items():
            torch.testing.assert_close(getattr(scores, name)[i, : len(completion)], truth, rtol=0, atol=tolerance)


def test_by_default_what_is_scored_is_the_log_probability(rollout: Rollout) -> None:
    arguments = (tiny_neox(), rollout.prompt_ids, rollout.prompt_mask, rollout.completions)
    scores = score(*arguments)
    assert scores.scored is scores.logprobs
    assert scores.logprobs.requires_grad
    assert not scores.entropy.requires_grad
    assert score(*arguments, entropy_gradient=True).entropy.requires_grad


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(1, 6)), min_size=1, max_size=5),
    st.integers(0, 3), st.integers(0, 3), st.integers(0, 6),
)  # fmt: skip
def test_garbage_in_the_padding_changes_nothing(
    shapes: list[tuple[int, int]], wider: int, longer: int, garbage: int
) -> None:
    """Other tokens behind the ends, other and more tokens before the prompts, more columns behind."""
    prompts, completions = (token_lists([shape[k] for shape in shapes], 7, seed=k) for k in (0, 1))
    clean, model = batch(prompts, completions), tiny_neox()
    mask = clean.completion_mask
    ids = torch.nn.functional.pad(torch.where(clean.prompt_mask, clean.prompt_ids, garbage), (wider, 0), value=garbage)
    prompt_mask = torch.nn.functional.pad(clean.prompt_mask, (wider, 0))
    tokens = torch.nn.functional.pad(torch.where(mask, clean.completions, garbage), (0, longer), value=garbage)
    with torch.no_grad():
        truth = score(model, clean.prompt_ids, clean.prompt_mask, clean.completions, alignment="shifted")
        soiled = score(model, ids, prompt_mask, tokens, alignment="shifted")
    for name in ("logprobs", "scored", "entropy"):
        measured, expected = getattr(soiled, name)[:, : mask.shape[1]], getattr(truth, name)
        torch.testing.assert_close(measured[mask], expected[mask], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_scored_logprobs_equal_the_sampled_ones(dtype: torch.dtype, tolerance: float) -> None:
    model, (ids, mask) = tiny_neox(dtype=dtype, eos_logit=1.0), pad_prompts(PROMPTS, EOS, torch.device("cpu"))
    rollout = sample(model, ids, mask, torch.full((5,), 6), uniform(15, 6), [EOS], SamplingParams(0.8))
    scored = score_rollout(model, rollout, micro_batch=4, temperature=0.8)
    counts = rollout.completion_mask
    torch.testing.assert_close(scored[counts], rollout.sampler_logprobs[counts], rtol=0, atol=tolerance)


def test_truncated_scores_equal_the_truncated_sampler_s() -> None:
    """Also in float32, where rounding may put the sampled token just outside of what is kept."""
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        model, (ids, mask) = tiny_neox(dtype=dtype, eos_logit=1.0), pad_prompts(PROMPTS, EOS, torch.device("cpu"))
        how = SamplingParams(0.8, 4, 0.8)
        rollout = sample(model, ids, mask, torch.full((5,), 6), uniform(50, 6), [EOS], how)
        arguments = (model, rollout.prompt_ids, rollout.prompt_mask, rollout.completions)
        scored, counts = score(*arguments, how).scored, rollout.completion_mask
        torch.testing.assert_close(scored[counts], rollout.sampler_logprobs[counts], rtol=0, atol=tolerance)
        assert (rollout.sampler_logprobs - rollout.logprobs)[counts].max() > 0.1
        never = score(
            *arguments, SamplingParams(top_k=1)
        ).scored  # of the most likely token alone; the others stay finite
        assert torch.isfinite(never).all()


@pytest.mark.parametrize("micro_batch", [1, 2, 5, 100])
def test_another_model_scores_a_rollout_in_any_micro_batches(rollout: Rollout, micro_batch: int) -> None:
    reference = tiny_neox(seed=9)
    scored = score_rollout(reference, rollout, micro_batch)
    assert not scored.requires_grad
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        with torch.no_grad():
            truth = plain_logprobs(reference, prompt, completion)
        torch.testing.assert_close(scored[i, : len(completion)], truth, rtol=0, atol=1e-12)


def test_the_gradient_of_a_score_is_autograd_s_of_the_definition(rollout: Rollout) -> None:
    model = tiny_neox()
    mask = mask_of(rollout.lengths, rollout.completions.shape[1])
    scores = score(model, rollout.prompt_ids, rollout.prompt_mask, rollout.completions, SamplingParams(0.7))
    measured = torch.autograd.grad(scores.logprobs[mask].sum(), list(model.parameters()))
    pairs = zip(PROMPTS, COMPLETIONS, strict=True)
    total = torch.stack([plain_logprobs(model, prompt, completion, 0.7).sum() for prompt, completion in pairs]).sum()
    for one, truth in zip(measured, torch.autograd.grad(total, list(model.parameters())), strict=True):
        torch.testing.assert_close(one, truth, rtol=1e-10, atol=1e-12)
