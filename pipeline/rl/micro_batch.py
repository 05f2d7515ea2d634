"""The batch that a step learns from, and one micro-batch of it: the scores of its rows, and their part of the loss."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.config.schema import Recipe
from pipeline.distributed.dist_context import DistContext
from pipeline.models.packing import move
from pipeline.models.sampling import Rollout
from pipeline.models.scoring import Scores, score
from pipeline.rl.importance import importance_weights
from pipeline.rl.loss import KL_LOSSES, LossNormalizers, entropy_bonus, policy_loss


@dataclass(frozen=True)
class Batch:
    """The batch that a step learns from: all N completions of all processes, or n of them."""

    rollout: Rollout
    advantages: Tensor  # [n]
    loss_mask: Tensor  # [n, T] True = in the loss
    ref_logprobs: Tensor | None  # [n, T]; not needed without a KL term in the loss
    normalizers: LossNormalizers  # of all N
    kl_coef: float = 0.0
    old_logprobs: Tensor | None = None  # [n, T] `loss_logprobs` of the batch's first update; None = this is the first


def rows_without_gradient(batch: Batch, recipe: Recipe, mine: slice, processes: DistContext) -> Tensor:
    """[n] on the host, True = this completion gives the loss no gradient: its advantage is zero, and the loss has no
    other term. Returns all False where every completion of this process has zero advantage: the parameters then get a
    gradient of zero, and Adam's momentum goes on. Also for a sharded policy: FSDP needs equal forward passes on ranks.
    """
    none = torch.zeros(len(batch.advantages), dtype=torch.bool)
    if recipe.kl in KL_LOSSES or recipe.entropy_coef > 0 or processes.sharded:
        return none
    flat = batch.advantages.cpu() == 0
    return none if flat[mine].all() else flat


def score_rows(
    policy: PreTrainedModel,
    rollout: Rollout,
    lengths: Tensor,  # [N] tokens of each completion to score
    recipe: Recipe,
    packing: bool,
    rows: slice,  # of the micro-batch
    flat: Tensor,  # [N] on the host, True = no gradient is needed
) -> Scores:
    """Scores of a micro-batch. Rows that need no gradient are computed separately and detached, which saves their
    backward pass, two thirds of the arithmetic."""

    def differentiable(chosen: slice | Tensor) -> Scores:
        return score(
            policy,
            rollout.prompt_ids[chosen],
            rollout.prompt_mask[chosen],
            rollout.completions[chosen],
            recipe.loss_params,
            recipe.alignment,
            lengths=lengths[chosen],
            entropy_gradient=recipe.entropy_coef > 0,
            packing=packing,
        )

    numbers = torch.arange(rows.start, rows.stop)
    apart, learning = numbers[flat[rows]], numbers[~flat[rows]]
    if not len(apart):
        return differentiable(rows)
    back = torch.cat([apart, learning]).argsort()
    apart, learning, back = move([apart, learning, back], lengths.device)
    # not under no_grad: autocast would round the weights without a graph, and reuse them for the other rows
    scores = differentiable(apart)
    parts = [(scores.logprobs.detach(), scores.scored.detach(), scores.entropy.detach())]
    del scores  # frees the graph
    if len(learning):
        scores = differentiable(learning)
        parts.append((scores.logprobs, scores.scored, scores.entropy))
    return Scores(*(torch.cat(tensors)[back] for tensors in zip(*parts, strict=True)))


def microbatch_loss(scores: Scores, batch: Batch, rows: slice, weights: Tensor, recipe: Recipe) -> tuple[Tensor, int]:
    """These rows' part of the batch's loss, and how many of their tokens are clipped.

        - sum_it w_it f_it A_i log pi_it  +  kl_coef * KL term  -  entropy_coef * sum_it w_it H_it

    w: `token_weights`; f: `importance_weights`, else 1. The KL term is per completion, whatever the aggregation.
    """
    factors, mask, clipped = weights[rows], batch.rollout.completion_mask[rows], 0
    if recipe.importance != "none":
        old = scores.scored.detach() if batch.old_logprobs is None else batch.old_logprobs[rows]
        limits = recipe.clip_range, recipe.clip_range_high
        ratio, cut = importance_weights(scores.scored, old, mask, batch.advantages[rows], recipe.importance, *limits)
        # `where`, since a ratio in the padding may be infinite
        factors = torch.where(factors > 0, factors * ratio.masked_fill(cut, 0.0), 0.0)
        clipped = int((cut & batch.loss_mask[rows]).sum())
    loss = policy_loss(scores.scored, batch.advantages[rows], factors)
    if recipe.kl in KL_LOSSES:
        assert batch.ref_logprobs is not None
        # logprobs under the sampled distribution: not the shifted ones, nor the full softmax of a truncated sampler
        acting = scores.scored if recipe.loss_distribution == "sampler" else scores.logprobs
        kl = KL_LOSSES[recipe.kl](acting, batch.ref_logprobs[rows], mask, batch.normalizers.samples)
        loss = loss + batch.kl_coef * kl
    if recipe.entropy_coef > 0:
        loss = loss - recipe.entropy_coef * entropy_bonus(scores.entropy, weights[rows] * mask)
    return loss, clipped
