"""The gradient of one batch, accumulated over micro-batches."""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.config.schema import Recipe
from pipeline.distributed.dist_context import SINGLE_PROCESS, DistContext
from pipeline.file_io import total
from pipeline.models.memory import activation_checkpointing
from pipeline.models.sampling import Rollout
from pipeline.rl.loss import token_weights
from pipeline.rl.micro_batch import Batch, microbatch_loss, rows_without_gradient, score_rows
from pipeline.rl.optimizer import Update, optimizer_step, square_norm


@dataclass(frozen=True)
class BackwardResult:
    """Results of the backward pass besides the gradient itself."""

    loss: float
    logprobs: Tensor  # [n, T] of the policy, correctly aligned, full softmax
    loss_logprobs: Tensor  # [n, T] what the loss used: equal to logprobs unless the recipe shifts or truncates them
    entropy: Tensor  # [n, T]
    clip_share: float  # share of the tokens in the loss whose importance ratio was clipped
    snr: float  # see `signal_to_noise`; NaN where it cannot be computed from the micro-batches


def make_loss_mask(rollout: Rollout, group: int, padding: str) -> Tensor:
    """[N, T] True = the token is in the loss.

    masked: up to and including the first EOS. counted: up to the length of the longest completion of the prompt's
    group, as in the notebook; the EOS tokens that fill up shorter completions count.
    """
    if padding == "masked":
        return rollout.completion_mask
    longest = rollout.lengths.view(-1, group).amax(1).repeat_interleave(group)
    return torch.arange(rollout.completions.shape[1], device=longest.device) < longest[:, None]


def backward(
    policy: PreTrainedModel,
    batch: Batch,
    recipe: Recipe,
    micro_batch: int,
    group: int = 1,
    processes: DistContext = SINGLE_PROCESS,
    gradient_checkpointing: bool = False,
    packing: bool = True,
) -> BackwardResult:
    """Adds the gradient of the recipe's loss on this batch to the policy's `.grad`, which should be empty at first: the
    signal-to-noise ratio is computed from it.

    Normalisers come from the whole batch: micro-batches change memory, not the gradient. The processes' gradients add
    up to the gradient of the batch. `group`: completions of a prompt; `gradient_checkpointing`: computes layers again
    in the backward pass; `packing`: see `score`.
    """
    rollout, total, clipped = batch.rollout, 0.0, 0
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    weights = token_weights(batch.loss_mask, recipe.aggregation, batch.normalizers)
    lengths = torch.maximum(batch.loss_mask.sum(1), rollout.lengths)
    # the signal-to-noise ratio needs each micro-batch's own gradient, which takes time: only where it is defined
    track_microbatch_norms = len(weights) > micro_batch and micro_batch % group == 0 and not processes.sharded
    mine = processes.group_slice(len(weights), group)
    flat = rows_without_gradient(batch, recipe, mine, processes)
    separately: AbstractContextManager[list[Tensor | float]] = (
        _record_microbatch_norms(policy) if track_microbatch_norms else nullcontext([])
    )
    device = weights.device
    # one autocast context for all micro-batches rounds the weights once; its cache must be off where layers are
    # gathered or computed again
    keep = not (processes.sharded or gradient_checkpointing)
    half = torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16", cache_enabled=keep)
    starts = list(range(mine.start, mine.stop, micro_batch))
    # FSDP needs all ranks in each forward pass: ranks with fewer micro-batches run dummy ones
    dummy_microbatches = processes.all_reduce_max(len(starts)) - len(starts) if processes.sharded else 0
    with separately as squares, half, activation_checkpointing(policy, gradient_checkpointing):
        for start in starts + [mine.start] * dummy_microbatches:
            rows = slice(start, min(start + micro_batch, mine.stop))
            squares.append(0.0)
            scores = score_rows(policy, rollout, lengths, recipe, packing, rows, flat)
            with torch.autocast(device.type, enabled=False):
                loss, cut = microbatch_loss(scores, batch, rows, weights, recipe)
                if loss.requires_grad:
                    (loss * 0 if len(parts) == len(starts) else loss).backward()
            if len(parts) == len(starts):
                continue
            total += loss.item()
            clipped += cut
            parts.append((scores.logprobs.detach(), scores.scored.detach(), scores.entropy.detach()))
    processes.all_reduce_gradients(policy.parameters())
    snr = math.nan
    if track_microbatch_norms:
        whole = square_norm(p.grad for p in policy.parameters())
        squared = torch.tensor([float(square) for square in squares], dtype=torch.float64)
        sizes = torch.tensor([len(part[0]) for part in parts])
        snr = signal_to_noise(whole, processes.gather(squared).tolist(), processes.gather(sizes).tolist())
    logprobs, scored, entropy = (processes.gather(torch.cat(tensors)) for tensors in zip(*parts, strict=True))
    share = processes.all_reduce_sum(clipped) / max(int(batch.loss_mask.sum()), 1)
    return BackwardResult(processes.all_reduce_sum(total), logprobs, scored, entropy, share, snr)


@contextmanager
def _record_microbatch_norms(policy: PreTrainedModel) -> Iterator[list[Tensor | float]]:
    """Inside, each backward pass also adds the squared L2 norm of its own gradient to the last entry of the list. It
    adds parameter by parameter, as gradients arrive, and holds no second copy of the whole gradient."""
    sums: dict[Tensor, Tensor] = {}
    squares: list[Tensor | float] = []

    def take(parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        squares[-1] += torch.linalg.vector_norm(gradient, dim=-1).double().square().sum()
        sums[parameter] = sums[parameter].add_(gradient) if parameter in sums else gradient
        parameter.grad = None

    parameters = [p for p in policy.parameters() if p.requires_grad]
    before = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    handles = [p.register_post_accumulate_grad_hook(take) for p in parameters]
    try:
        yield squares
    finally:
        for handle in handles:
            handle.remove()
        for p, earlier in zip(parameters, before, strict=True):
            added = sums.get(p)
            p.grad = added if earlier is None else earlier if added is None else earlier.add_(added)


def update_policy(
    batch: Batch,
    policy: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    lr: float,
    micro_batch: int,
    group: int,
    processes: DistContext = SINGLE_PROCESS,
    gradient_checkpointing: bool = False,
    packing: bool = True,
) -> tuple[BackwardResult, dict[str, float]]:
    """Run the recipe's `epochs` updates on one batch. Returns the first, on-policy result and the updates' metrics."""
    gradients: list[BackwardResult] = []
    updates: list[Update] = []
    while len(updates) < recipe.epochs and not (updates and updates[-1].skipped):
        optimizer.zero_grad()
        gradients.append(
            backward(policy, batch, recipe, micro_batch, group, processes, gradient_checkpointing, packing)
        )
        updates.append(optimizer_step(policy, optimizer, recipe.max_grad_norm, lr, gradients[-1].loss, processes))
        batch = dataclasses.replace(batch, old_logprobs=gradients[0].loss_logprobs)
    return gradients[0], {
        "grad_norm": updates[0].grad_norm, "relative_update": updates[0].update_norm_ratio,
        "clip_share": gradients[-1].clip_share, "nonfinite": float(updates[-1].skipped),
    }  # fmt: skip


def signal_to_noise(whole: float, parts: list[float], sizes: list[int]) -> float:
    """Signal-to-noise ratio of the batch's gradient G = sum_m G_m, over micro-batches m of whole prompts.

    The G_m are independent with means s_m g: s_m is the micro-batch's share of the batch, g the expected gradient. So
    the products of different G_m separate signal from noise (McCandlish et al., arXiv 1812.06162, appendix A.1, do so
    with two batch sizes):

        |g|^2 = (|G|^2 - sum_m |G_m|^2) / (1 - sum_m s_m^2),    snr = |g|^2 / (|G|^2 - |g|^2)

    Numerator and denominator are unbiased. The ratio is noisy with few micro-batches, and can be negative by chance.
    whole: |G|^2; parts: |G_m|^2; sizes: samples in each. NaN for a single micro-batch, or without any gradient.
    """
    shares = [size / sum(sizes) for size in sizes]
    rest = 1 - total(share**2 for share in shares)
    if len(parts) < 2:
        return math.nan
    signal = (whole - total(parts)) / rest
    return signal / (whole - signal) if whole != signal else math.nan
