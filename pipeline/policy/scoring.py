"""Teacher-forced log-probabilities of completions.

N completions, P prompt tokens (left-padded), T completion tokens, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.policy.sampling import Rollout, positions, truncate


@dataclass(frozen=True)
class Scores:
    """Log-probabilities in nats under softmax(logits / temperature)."""

    logprobs: Tensor  # [N, T] of token t given what precedes it: log pi(y_t | x, y_<t)
    scored: Tensor  # [N, T] for the loss: the same, or shifted (the notebook's), or of the truncated softmax
    entropy: Tensor  # [N, T] of the full softmax at temperature 1


def completion_logits(model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor, completions: Tensor) -> Tensor:
    """Logits [N, T + 1, V] from the last prompt token on: entry t predicts completion token t, entry T what follows.

    What stands behind a completion's end cannot change its logits, because attention is causal; the left padding is
    masked out.
    """
    mask = torch.cat([prompt_mask, torch.ones_like(completions, dtype=torch.bool)], dim=1)
    ids = torch.cat([prompt_ids, completions], dim=1)
    output = model(
        input_ids=ids, attention_mask=mask.long(), position_ids=positions(mask),
        use_cache=False, logits_to_keep=completions.shape[1] + 1,
    )  # fmt: skip
    return output.logits


def score(
    model: PreTrainedModel,
    prompt_ids: Tensor,  # [N, P]
    prompt_mask: Tensor,  # [N, P] True = a token of the prompt
    completions: Tensor,  # [N, T]
    temperature: float = 1.0,
    alignment: Literal["correct", "shifted"] = "correct",
    top_k: int = 0,
    top_p: float = 1.0,
    *,
    entropy_gradient: bool = False,
) -> Scores:
    """Scores completions. The gradient flows through both kinds of log-probabilities, through the entropy if asked.

    alignment: shifted reads token t off the prediction made after it. top_k and top_p: what `scored` is truncated by,
    0 and 1 being the full softmax; the sampled token always stays, since rounding may put it just outside.
    """
    logits = completion_logits(model, prompt_ids, prompt_mask, completions)
    logits = _precise(logits)
    logprobs = scored = _selected(logits[:, :-1] / temperature, completions)
    if alignment == "shifted":
        scored = _selected(logits[:, 1:] / temperature, completions)
    elif top_k > 0 or top_p < 1:
        scored = _selected(_truncated(logits[:, :-1] / temperature, completions, top_k, top_p), completions)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        full = logits[:, :-1].log_softmax(-1)
        entropy = -(full.exp() * full).sum(-1)
    return Scores(logprobs, scored, entropy)


@torch.no_grad()
def score_rollout(model: PreTrainedModel, rollout: Rollout, micro_batch: int, temperature: float = 1.0) -> Tensor:
    """Log-probabilities [N, T] of a rollout under another model, such as the untouched checkpoint. No gradient."""
    parts = []
    for start in range(0, len(rollout.completions), micro_batch):
        rows = slice(start, start + micro_batch)
        completions = rollout.completions[rows]
        logits = completion_logits(model, rollout.prompt_ids[rows], rollout.prompt_mask[rows], completions)
        parts.append(_selected(_precise(logits)[:, :-1] / temperature, completions))
    return torch.cat(parts)


@torch.no_grad()
def score_whole(model: PreTrainedModel, rollout: Rollout, micro_batch: int, temperature: float = 1.0) -> Scores:
    """`score` of a whole rollout, a micro-batch at a time. No gradient."""
    parts = []
    for start in range(0, len(rollout.completions), micro_batch):
        rows = slice(start, start + micro_batch)
        part = score(
            model, rollout.prompt_ids[rows], rollout.prompt_mask[rows], rollout.completions[rows], temperature
        )  # fmt: skip
        parts.append((part.logprobs, part.scored, part.entropy))
    return Scores(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _precise(logits: Tensor) -> Tensor:
    """float32 for what an autocast model gives in half precision; float64 stays."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _truncated(logits: Tensor, tokens: Tensor, top_k: int, top_p: float) -> Tensor:
    """What the sampler drew from: [N, T, V] with -inf outside of top-k and top-p, the tokens [N, T] themselves kept."""
    kept = truncate(logits.flatten(0, 1), top_k, top_p).view_as(logits)
    index = tokens[..., None]
    return kept.scatter(-1, index, logits.gather(-1, index))


def _selected(logits: Tensor, tokens: Tensor) -> Tensor:
    """log_softmax at the tokens: logit - logsumexp. [N, T, V], [N, T] -> [N, T]."""
    return logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(-1)
