"""The gradient of one batch, accumulated over micro-batches."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.params import Recipe
from pipeline.policy.sampling import Rollout
from pipeline.policy.scoring import score
from pipeline.reinforce.loss import kl_loss_k2, policy_loss, token_weights


@dataclass(frozen=True)
class Gradient:
    """What the backward pass leaves besides the gradient itself. N completions of T tokens."""

    loss: float
    logprobs: Tensor  # [N, T] of the policy, correctly aligned
    scored: Tensor  # [N, T] what the loss used: equal to logprobs unless the recipe shifts them
    entropy: Tensor  # [N, T]


def loss_mask(rollout: Rollout, group: int, padding: str) -> Tensor:
    """[N, T] True = the token is in the loss.

    masked: up to and including the first EOS. counted: up to the longest completion of the prompt's group, the filling
    EOS tokens of the shorter ones included, as in the notebook.
    """
    if padding == "masked":
        return rollout.completion_mask
    longest = rollout.lengths.view(-1, group).amax(1).repeat_interleave(group)
    return torch.arange(rollout.completions.shape[1], device=longest.device) < longest[:, None]


def accumulate_gradient(
    policy: PreTrainedModel,
    rollout: Rollout,
    advantages: Tensor,  # [N]
    counted: Tensor,  # [N, T] True = in the loss
    ref_logprobs: Tensor,  # [N, T]
    recipe: Recipe,
    micro_batch: int,
) -> Gradient:
    """Adds the gradient of the recipe's loss on this batch to the policy's `.grad`.

    Normalisers come from the whole batch, so the size of the micro-batches changes memory, not the gradient.
    """
    weights = token_weights(counted, recipe.aggregation)
    total, parts = 0.0, []
    for start in range(0, len(advantages), micro_batch):
        rows = slice(start, start + micro_batch)
        with torch.autocast(weights.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            scores = score(
                policy, rollout.prompt_ids[rows], rollout.prompt_mask[rows], rollout.completions[rows],
                recipe.temperature, recipe.alignment,
            )  # fmt: skip
        scored = scores.logprobs if scores.shifted_logprobs is None else scores.shifted_logprobs
        loss = policy_loss(scored, advantages[rows], weights[rows])
        if recipe.kl == "loss_k2":
            mask = rollout.completion_mask[rows]
            loss = loss + recipe.kl_coef * kl_loss_k2(scores.logprobs, ref_logprobs[rows], mask, len(advantages))
        loss.backward()
        total += loss.item()
        parts.append((scores.logprobs.detach(), scored.detach(), scores.entropy))
    logprobs, scored, entropy = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Gradient(total, logprobs, scored, entropy)
