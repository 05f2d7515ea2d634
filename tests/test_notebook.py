"""`recipe: notebook` is the notebook to rounding: its loop is transcribed here and runs on the same tokens."""

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.notebook_loop import get_selected_log_probs
from pipeline.models.rollout import completion_limits, completion_texts
from pipeline.models.sampling import Rollout, pad_prompts, sample
from pipeline.rl.advantages import BASELINES, advantages
from pipeline.rl.loss import LossNormalizers
from pipeline.rl.micro_batch import Batch
from pipeline.rl.optimizer import learning_rate, make_optimizer, optimizer_step
from pipeline.rl.update import backward, make_loss_mask
from tests import repositories
from tests.models import EOS, difference, gradient, recipe, tiny_neox, uniform

pytestmark = pytest.mark.numeric

GROUP, MAX_LENGTH = 4, 20
PROMPTS = ["Hi", "I'm sorry", "Is SEO relevant?", "Ünï"]
NOTEBOOK = recipe("notebook")
Drawn = list[tuple[int, Tensor, Tensor]]  # of each prompt: its length, its output_tokens, its rewards

# --- the notebook's cells 14, 15 and 17, from the sampled tokens on


def notebook_loss(lm: PreTrainedModel, drawn: Drawn) -> Tensor:
    batch_loss = torch.zeros(())
    for prompt_len, output_tokens, rewards in drawn:
        log_probs_with_grad = lm(output_tokens).logits[:, prompt_len:, :].permute(1, 0, 2)
        output_log_softmax = tuple(torch.log_softmax(score_matrix, dim=-1) for score_matrix in log_probs_with_grad)
        output_log_probs = get_selected_log_probs(output_tokens, output_log_softmax, prompt_len)
        sequence_log_probs = torch.stack([vec.sum() for vec in output_log_probs])
        reward_baseline = rewards.mean()
        batch_loss = batch_loss - ((rewards - reward_baseline) * sequence_log_probs).mean()
    return batch_loss / len(drawn)


# --- ours


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    repositories._write_tokenizer(folder, None)
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module")
def prompt_ids(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    assert tokenizer.eos_token_id == EOS
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    assert len({len(p) for p in ids}) == len(ids)
    return ids


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return tiny_neox(len(tokenizer), eos_logit=3.0, hidden=8)


@pytest.fixture(scope="module")
def rollout(model: PreTrainedModel, prompt_ids: list[list[int]]) -> Rollout:
    ids, mask = pad_prompts(prompt_ids, EOS, torch.device("cpu"))
    limits = completion_limits([len(p) for p in prompt_ids], MAX_LENGTH, NOTEBOOK.length_limit)
    noise = uniform(len(prompt_ids) * GROUP, MAX_LENGTH, seed=2)
    return sample(model, ids, mask, limits, noise, [EOS], NOTEBOOK.sampling_params)


@pytest.fixture(scope="module")
def drawn(rollout: Rollout, prompt_ids: list[list[int]]) -> Drawn:
    """The same tokens as `generate` returns them: each prompt's batch ends with the longest of its samples."""
    rewards = torch.randn(len(rollout.lengths), generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 9
    batches = []
    for b, prompt in enumerate(prompt_ids):
        rows = range(b * GROUP, (b + 1) * GROUP)
        own = [rollout.completions[i, : int(rollout.lengths[i])].tolist() for i in rows]
        longest = max(map(len, own))
        tokens = torch.tensor([prompt + row + [EOS] * (longest - len(row)) for row in own])
        batches.append((len(prompt), tokens, rewards[rows]))
    return batches


def test_the_batch_holds_what_makes_the_notebook_s_loop_peculiar(rollout: Rollout, drawn: Drawn) -> None:
    """Samples that stop before the others of their prompt, groups that end before the batch, prompts that are cut."""
    longest = [tokens.shape[1] - prompt for prompt, tokens, _ in drawn]
    assert len(set(longest)) > 1
    assert (rollout.lengths.view(-1, GROUP).amin(1) < torch.tensor(longest)).all()
    cut = rollout.lengths[~rollout.ended([EOS])]
    assert 0 < len(cut) < len(rollout.lengths)
    assert all(tokens.shape[1] <= MAX_LENGTH for _, tokens, _ in drawn)


def test_loss_and_gradient_are_the_notebook_s(model: PreTrainedModel, rollout: Rollout, drawn: Drawn) -> None:
    loss = notebook_loss(model, drawn)
    truth = torch.autograd.grad(loss, list(model.parameters()))
    rewards = torch.stack([group for _, _, group in drawn])
    advantage = advantages(rewards, BASELINES[NOTEBOOK.baseline](rewards), NOTEBOOK.advantage_norm).flatten()
    counted = make_loss_mask(rollout, GROUP, NOTEBOOK.padding)
    ref = torch.zeros(rollout.completions.shape, dtype=torch.float64)
    size = LossNormalizers(len(counted), int(counted.sum()), MAX_LENGTH)
    ours = backward(model, Batch(rollout, advantage, counted, ref, size), NOTEBOOK, micro_batch=3)
    assert ours.loss == pytest.approx(loss.item(), rel=1e-9)
    for (name, p), expected in zip(model.named_parameters(), truth, strict=True):
        assert difference(p.grad, expected) < 1e-9, name


def test_the_reward_reads_what_the_notebook_decodes(
    tokenizer: PreTrainedTokenizerFast, rollout: Rollout, drawn: Drawn
) -> None:
    """Special tokens as text, those that fill up to the longest sample of the prompt included."""
    truth = [str(tokenizer.decode(row)) for prompt_length, tokens, _ in drawn for row in tokens[:, prompt_length:]]
    assert completion_texts(rollout, tokenizer, NOTEBOOK.special_tokens, GROUP, [EOS]) == truth
    assert any(text.endswith("<|endoftext|><|endoftext|>") for text in truth)
    plain = [text.replace("<|endoftext|>", "") for text in truth]
    assert completion_texts(rollout, tokenizer, "strip", GROUP, [EOS]) == plain


def test_the_update_is_adam_s_of_the_notebook(model: PreTrainedModel, rollout: Rollout, drawn: Drawn) -> None:
    policy, notebook = (tiny_neox(model.config.vocab_size, eos_logit=3.0, hidden=8) for _ in range(2))
    ours = make_optimizer(policy.parameters(), NOTEBOOK)
    opt = torch.optim.Adam(notebook.parameters(), lr=3e-4)
    for step in range(3):
        opt.zero_grad()
        notebook_loss(notebook, drawn).backward()
        for mine, theirs in zip(policy.parameters(), notebook.parameters(), strict=True):
            assert theirs.grad is not None
            mine.grad = theirs.grad.clone()
        expected_norm = gradient(notebook).norm().item()
        opt.step()
        done = optimizer_step(policy, ours, NOTEBOOK.max_grad_norm, learning_rate(step, 3, NOTEBOOK, 8), loss=0.0)
        assert done.grad_norm == pytest.approx(expected_norm)
        assert not done.skipped
        for mine, theirs in zip(policy.parameters(), notebook.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-15)


def test_the_sampler_is_generate_s() -> None:
    """do_sample=True and nothing else: what `generate` truncates by itself, unless the checkpoint says otherwise."""
    defaults = GenerationConfig()._get_default_generation_params()
    truth = tuple(defaults[name] for name in ("top_k", "top_p", "temperature"))
    assert (NOTEBOOK.top_k, NOTEBOOK.top_p, NOTEBOOK.temperature) == truth
