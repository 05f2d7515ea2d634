"""What makes a policy smaller in memory, and changes no number that training computes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def bf16_copy(model: PreTrainedModel) -> Callable[..., Any]:
    """The model with its weights rounded to bfloat16, to be called like it; for sampling, where autocast would round
    all of them again at every token. What is bfloat16 already is not copied."""
    weights = {name: parameter.detach().to(torch.bfloat16) for name, parameter in model.named_parameters()}

    @wraps(model.forward)
    def forward(**inputs: Any) -> Any:
        return torch.func.functional_call(model, weights, kwargs=inputs)

    return forward


def cast_frozen_bf16(model: PreTrainedModel) -> None:
    """Rounds the linear layers that are not trained to bfloat16, in place. Autocast would round them at every use, to the
    same numbers. The embedding stays, and a head that shares its weights."""
    embedding = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and not module.weight.requires_grad and module.weight is not embedding:
            module.to(torch.bfloat16)


@contextmanager
def activation_checkpointing(model: PreTrainedModel, layers: bool) -> Iterator[None]:
    """Inside, if asked, each layer keeps its input only, and the backward pass computes the rest of it again (gradient
    checkpointing; Chen et al., arXiv 1604.06174). Only inside: a layer in this mode takes no cache to sample with.

    Around the layers' forward passes and not by transformers' own switch, which asks for training mode, in which many
    layers drop out.
    """
    chosen = [module for module in model.modules() if layers and isinstance(module, GradientCheckpointingLayer)]
    for layer in chosen:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in chosen:
            del layer.forward  # the attribute of this layer; its class's method is there again
