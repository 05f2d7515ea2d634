"""Teacher-forced logprobs against the definition: one sequence at a time, without padding."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from pipeline.config.schema import SamplingParams
from pipeline.models.sampling import Rollout, pad_prompts, sample
from pipeline.models.scoring import score, score_microbatched
from tests.models import EOS, plain_logits, plain_logprobs, rollout_of, tiny_gpt2, tiny_neox, token_lists, uniform

pytestmark = pytest.mark.numeric

PROMPTS = [prompt for prompt in token_lists([2, 7, 1], 7) for _ in range(4)]
COMPLETIONS = token_lists([6, 1, 9, 30, 2, 2, 25, 8, 12, 5, 30, 3], 7, seed=1)
PRECISIONS = [(torch.float32, 1e-4), (torch.float64, 1e-10)]


@pytest.fixture(scope="module")
def rollout() -> Rollout:
    return rollout_of(PROMPTS, COMPLETIONS)


@pytest.mark.parametrize(("dtype", "attention", "tolerance"), [
    (torch.float32, "sdpa", 1e-4), (torch.float64, "sdpa", 1e-12),
    (torch.float64, "eager", 1e-6),  # which wants another kind of mask; its softmax is float32
])  # fmt: skip
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("architecture", [tiny_neox, tiny_gpt2])
@pytest.mark.parametrize("packing", [True, False])
def test_scores_are_those_of_each_sequence_alone(
    rollout: Rollout, architecture: Callable[[], PreTrainedModel], dtype: torch.dtype, attention: str, tolerance: float,
    temperature: float, packing: bool,
) -> None:  # fmt: skip
    model = architecture().to(dtype)  # type: ignore[arg-type]  # wrapped without types
    model.set_attn_implementation(attention)
    with torch.no_grad():
        arguments = (rollout.prompt_ids, rollout.prompt_mask, rollout.completions, SamplingParams(temperature))
        scores = score(model, *arguments, "shifted", packing=packing, lengths=rollout.lengths)
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
        assert not scores.logprobs[i, len(completion) :].any()


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
def test_what_stands_in_the_padding_changes_nothing(
    shapes: list[tuple[int, int]], wider: int, longer: int, filler: int
) -> None:
    prompts, completions = (token_lists([shape[k] for shape in shapes], 7, seed=k) for k in (0, 1))
    clean, model = rollout_of(prompts, completions), tiny_neox()
    other, mask = rollout_of(prompts, completions, wider, longer, filler), clean.completion_mask
    with torch.no_grad():
        truth, measured = (
            score(model, one.prompt_ids, one.prompt_mask, one.completions, alignment="shifted")
            for one in (clean, other)
        )
    for name in ("logprobs", "scored", "entropy"):
        part = getattr(measured, name)[:, : mask.shape[1]]
        torch.testing.assert_close(part[mask], getattr(truth, name)[mask], rtol=0, atol=1e-12)


@pytest.mark.parametrize("how", [SamplingParams(0.8), SamplingParams(0.8, 4, 0.8)])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_scores_equal_the_sampled_logprobs(dtype: torch.dtype, tolerance: float, how: SamplingParams) -> None:
    """Also in float32, where rounding may put the sampled token just outside of what top-k and top-p keep."""
    model = tiny_neox(dtype=dtype, eos_logit=1.0)
    ids, mask = pad_prompts(token_lists([3, 1, 6, 2, 4], 7), EOS, torch.device("cpu"))
    rollout = sample(model, ids, mask, torch.full((5,), 6), uniform(50, 6), [EOS], how)
    arguments, counts = (model, rollout.prompt_ids, rollout.prompt_mask, rollout.completions), rollout.completion_mask
    scored, expected = score(*arguments, how).scored, rollout.sampler_logprobs[counts]
    torch.testing.assert_close(scored[counts], expected, rtol=0, atol=tolerance)
    assert ((expected - rollout.logprobs[counts]).max() > 0.1) == (how.top_k > 0)
    assert torch.isfinite(
        score(*arguments, SamplingParams(top_k=1)).scored
    ).all()  # also of tokens that are not the most likely


@pytest.mark.parametrize("micro_batch", [1, 2, 5, 100])
def test_another_model_scores_a_rollout_in_any_micro_batches(rollout: Rollout, micro_batch: int) -> None:
    reference = tiny_neox(seed=9)
    scored = score_microbatched(reference, rollout, micro_batch).logprobs
    assert not scored.requires_grad
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        with torch.no_grad():
            truth = plain_logprobs(reference, prompt, completion)
        torch.testing.assert_close(scored[i, : len(completion)], truth, rtol=0, atol=1e-12)
