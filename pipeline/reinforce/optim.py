"""The optimizer of a recipe and its learning rate."""

import math
from collections.abc import Iterable

import torch

from pipeline.params import Recipe


def make_optimizer(parameters: Iterable[torch.nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """Adam (Kingma & Ba, arXiv 1412.6980) without weight decay, or plain SGD."""
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=recipe.lr)
    # foreach=False: one code path on every machine, so that the same seed gives the same bytes
    return torch.optim.Adam(parameters, lr=recipe.lr, eps=recipe.adam_eps, foreach=False)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Rises linearly over `warmup_steps` to the recipe's rate and stays there. `step` counts from 0."""
    return recipe.lr * min(1.0, (step + 1) / (recipe.warmup_steps + 1))


def update(
    policy: torch.nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, step: int, loss: float
) -> tuple[float, bool]:
    """Clips the gradient and steps. A non-finite loss or gradient is not applied.

    Returns the gradient's L2 norm before clipping, and whether the step was withheld.
    """
    parameters = list(policy.parameters())
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if not (math.isfinite(loss) and torch.isfinite(norm)):
        return norm.item(), True
    if recipe.max_grad_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, recipe.max_grad_norm, norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, recipe)
    optimizer.step()
    return norm.item(), False
