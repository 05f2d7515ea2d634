"""The optimizer of a recipe and its learning rate."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config.schema import Recipe
from pipeline.distributed.dist_context import SINGLE_PROCESS, DistContext
from pipeline.distributed.sharding import local_tensor

CHUNK_BYTES = 2**26  # parameters that are updated together; the embedding of Pythia-70M alone has 100 MB


def make_optimizer(parameters: Iterable[torch.nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """Adam (Kingma & Ba, arXiv 1412.6980) without weight decay, or plain SGD, over the trained parameters."""
    parameters = [p for p in parameters if p.requires_grad]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=recipe.lr)
    # fused: ten times faster on a CPU, and torch does not choose the implementation by itself
    return torch.optim.Adam(parameters, lr=recipe.lr, eps=recipe.adam_eps, fused=True)


def learning_rate(step: int, steps: int, recipe: Recipe, hidden_size: int) -> float:
    """Rises linearly over `warmup_steps` to the full rate; then stays, or decays to reach 0 after `steps`.

    The full rate is the recipe's lr; with an `lr_base_width` it is lr * lr_base_width / hidden_size. Adam moves every
    weight by about lr, so the output of a layer's unit moves by about lr * hidden_size. The base width keeps this
    change the same for models of any width (muP: Yang et al., arXiv 2203.03466, table 3).

    With p = (step - warmup_steps) / (steps - warmup_steps), from 0 to 1 after the warm-up:
    linear lr (1 - p), cosine lr (1 + cos(pi p)) / 2. `step` counts from 0 to steps - 1, so the last rate is above 0.
    """
    done = max(0, step - recipe.warmup_steps) / max(1, steps - recipe.warmup_steps)
    decay = {"none": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[recipe.lr_decay]
    full = recipe.lr * recipe.lr_base_width / hidden_size if recipe.lr_base_width else recipe.lr
    return full * min(1.0, (step + 1) / (recipe.warmup_steps + 1)) * decay


@dataclass(frozen=True)
class Update:
    """What one step of the optimizer did."""

    grad_norm: float  # L2, before clipping
    update_norm_ratio: float  # |change of the weights| / |weights|, L2 over all trained weights
    skipped: bool  # True = no step was made, since loss or gradient was not finite


def optimizer_step(
    policy: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
    lr: float,
    loss: float,
    processes: DistContext = SINGLE_PROCESS,
) -> Update:
    """Clip the gradient to `max_grad_norm` (0 = off), step unless loss or gradient is not finite, free the gradient."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    norm = torch.nn.utils.get_total_norm([local_tensor(p.grad) for p in parameters if p.grad is not None])
    if processes.sharded:
        norm = torch.tensor(processes.all_reduce_sum(norm.double().item() ** 2) ** 0.5, device=norm.device)
    if not (math.isfinite(loss) and torch.isfinite(norm)):
        optimizer.zero_grad()
        return Update(norm.item(), 0.0, True)
    if max_grad_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    squares: list[tuple[Tensor, Tensor]] = []
    for chunk in _with_gradient_in_chunks(parameters):  # so that only one chunk's old weights are held
        before = [local_tensor(p.detach()).clone() for p in chunk]
        sizes = [_square(part) for part in before]
        optimizer.step()
        changes = [_square(part.sub_(local_tensor(p.detach()))) for part, p in zip(before, chunk, strict=True)]
        squares += zip(sizes, changes, strict=True)
    whole, change = (processes.reduce_if_sharded(_total(part)) for part in zip(*squares, strict=True))
    return Update(norm.item(), (change / whole) ** 0.5, False)


def _with_gradient_in_chunks(parameters: list[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Yield the parameters in chunks. Only the yielded chunk has gradients, so the optimizer updates only this chunk.
    Frees the gradients. A chunk has up to CHUNK_BYTES, at least one parameter: small chunks leave a GPU idle."""
    gradients = {p: p.grad for p in parameters}
    for p in parameters:
        p.grad = None
    for chunk in _chunks(parameters):
        for p in chunk:
            p.grad = gradients.pop(p)
        yield chunk
        for p in chunk:
            p.grad = None


def _chunks(parameters: list[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    chunk: list[torch.nn.Parameter] = []
    size = 0
    for p in parameters:
        bytes_of_it = local_tensor(p.detach()).nbytes
        if chunk and size + bytes_of_it > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(p)
        size += bytes_of_it
    if chunk:
        yield chunk


def square_norm(tensors: Iterable[Tensor | None]) -> float:
    """Squared L2 norm of all tensors as one vector; rows in their own precision, their sum in float64."""
    return _total([_square(x) for x in tensors if x is not None])


def _square(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1).double().square().sum()


def _total(squares: Sequence[Tensor]) -> float:
    return torch.stack(list(squares)).sum().item() if squares else 0.0
