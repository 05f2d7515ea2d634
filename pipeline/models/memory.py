"""Less memory with the same numbers: bfloat16 copies and activation checkpointing; the settings that save memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline.config.schema import Params


def bf16_copy(model: PreTrainedModel) -> Callable[..., Any]:
    """A function that calls the model with its weights rounded to bfloat16. For sampling: autocast would round all
    weights again at each token. Weights that are bfloat16 already are not copied."""
    weights = {name: parameter.detach().to(torch.bfloat16) for name, parameter in model.named_parameters()}

    @wraps(model.forward)
    def forward(**inputs: Any) -> Any:
        return torch.func.functional_call(model, weights, kwargs=inputs)

    return forward


def cast_frozen_bf16(model: PreTrainedModel) -> None:
    """Rounds the frozen linear layers to bfloat16, in place; autocast would round them to the same numbers at each use.
    The embedding stays as it is, and so does a head tied to it."""
    embedding = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and not module.weight.requires_grad and module.weight is not embedding:
            module.to(torch.bfloat16)


@contextmanager
def activation_checkpointing(model: PreTrainedModel, layers: bool) -> Iterator[None]:
    """Inside, if `layers`, each layer keeps only its input and is computed again in the backward pass (gradient
    checkpointing; Chen et al., arXiv 1604.06174).

    It wraps the layers' forward passes: transformers' own switch needs training mode, in which dropout is on.
    """
    chosen = [module for module in model.modules() if layers and isinstance(module, GradientCheckpointingLayer)]
    for layer in chosen:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in chosen:
            del layer.forward  # removes this layer's attribute: its class's method applies again


def memory_settings(params: Params) -> list[str]:
    """The settings that would lower the memory of training and are not in use yet; the mildest change comes first."""
    sizes = params.train
    ways = [
        (sizes.micro_batch > 1, f"train.micro_batch below {sizes.micro_batch}"),
        (not sizes.gradient_checkpointing, "train.gradient_checkpointing: true"),
        (params.selected_recipe.precision == "float32", f"recipes.{params.recipe}.precision: bfloat16"),
        (not sizes.lora_rank, "train.lora_rank: 16 (adapters)"),
        (sizes.max_tokens > 1, f"train.max_tokens below {sizes.max_tokens}"),
    ]
    return [way for left, way in ways if left]
