"""The notebook's loop, cells 10, 11, 14, 15 and 17, as it computes: one prompt at a time, `generate`, one more pass for
the log-probabilities, one backward pass for the whole batch. Only globals have become arguments, and tensors lie where
their model does.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, BertModel, PreTrainedModel, PreTrainedTokenizerBase

MAX_LENGTH = 20  # tokens, the prompt's included


def has_length(sample: str, target_len: int) -> float:
    return -abs(len(sample) - target_len)


def bert_distance(encoder: Path, sample_sentence: str, device: str = "cpu") -> Callable[[str], Tensor]:
    """Reward of a completion: one text at a time through the encoder, each distinct text once."""
    bert_tokenizer = AutoTokenizer.from_pretrained(encoder)
    bert_model: Any = BertModel.from_pretrained(encoder, add_pooling_layer=True)
    bert_model.to(device)

    @functools.cache
    def bert_sentence_embedding(sentence: str) -> Tensor:
        inputs = bert_tokenizer(sentence, return_tensors="pt", padding=True, truncation=True).to(device)
        with torch.no_grad():
            outputs = bert_model(**inputs)
        return outputs.last_hidden_state.mean(dim=1).squeeze()

    return lambda text: -torch.norm(bert_sentence_embedding(text) - bert_sentence_embedding(sample_sentence))


def get_selected_log_probs(tokens: Tensor, log_probs: tuple[Tensor, ...], prompt_len: int) -> list[Tensor]:
    output = []
    for mc_sample_idx in range(len(tokens)):
        sample_log_probs = []
        for token_pos in range(len(tokens[mc_sample_idx, prompt_len:])):
            token_idx = tokens[mc_sample_idx][token_pos + prompt_len]
            sample_log_probs.append(log_probs[token_pos][mc_sample_idx][token_idx])
        output.append(torch.stack(sample_log_probs))
    return output


def draw_mc_samples(
    prompt: str, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_samples: int, max_length: int
) -> tuple[Tensor, list[Tensor]]:
    prompt_input = tokenizer(prompt, return_tensors="pt").to(lm.device)
    prompt_input_ids, prompt_attention_mask = prompt_input["input_ids"], prompt_input["attention_mask"]
    outputs = lm.generate(
        input_ids=prompt_input_ids.repeat(num_samples, 1), attention_mask=prompt_attention_mask.repeat(num_samples, 1),
        pad_token_id=tokenizer.eos_token_id, max_length=max_length, return_dict_in_generate=True, output_scores=True,
        do_sample=True, temperature=1.0,
    )  # fmt: skip
    prompt_len = len(prompt_input_ids[0])
    output_tokens = outputs.sequences
    log_probs_with_grad = lm(output_tokens).logits[:, prompt_len:, :].permute(1, 0, 2)
    output_log_softmax = tuple(torch.log_softmax(score_matrix, dim=-1) for score_matrix in log_probs_with_grad)
    return output_tokens, get_selected_log_probs(output_tokens, output_log_softmax, prompt_len)


def step(
    lm: PreTrainedModel, tokenizer: Any, opt: torch.optim.Optimizer, drawn: list[str],
    reward: Callable[[str], float | Tensor], num_mc_samples: int,
) -> float:  # fmt: skip
    """One step on the drawn prompts; gives the mean reward."""
    batch_loss = torch.zeros((), device=lm.device)
    batch_rewards = []
    for prompt in drawn:
        prompt_length = tokenizer(prompt, return_tensors="pt")["input_ids"].shape[1]
        output_tokens, output_log_probs = draw_mc_samples(prompt, lm, tokenizer, num_mc_samples, MAX_LENGTH)
        sequence_log_probs = torch.stack([vec.sum() for vec in output_log_probs])
        output_continuations = [tokenizer.decode(tokens) for tokens in output_tokens[:, prompt_length:]]
        rewards = torch.tensor([reward(text) for text in output_continuations], dtype=torch.float32, device=lm.device)
        reward_baseline = rewards.mean()
        batch_rewards.append(rewards.mean().item())
        loss = -((rewards - reward_baseline) * sequence_log_probs).mean()
        batch_loss = batch_loss + loss
    batch_loss = batch_loss / len(drawn)
    opt.zero_grad()
    batch_loss.backward()
    opt.step()
    return sum(batch_rewards) / len(drawn)
