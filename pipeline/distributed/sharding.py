"""A policy spread over the processes: each holds a part of its weights, gradients and optimizer state, and layers are put
together where they are computed (FSDP; Zhao et al., arXiv 2304.11277), by torch's `fully_shard`."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def shard(policy: PreTrainedModel, device: torch.device, processes: int) -> None:
    """Spreads the policy, in place: its layers one by one, the rest as one, each part to its process's device. Gradients
    are summed over the processes, as the normalisers are of the whole batch."""
    mesh = init_device_mesh(device.type, (processes,))
    for module in policy.modules():
        if isinstance(module, GradientCheckpointingLayer):
            fully_shard(module, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def local_tensor(tensor: Tensor) -> Tensor:
    """This process's part, sharing its memory; of what is not spread, all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_full(tree: Any, here: bool = True) -> Any:
    """A tree of dicts and lists whose spread tensors are put together, on the CPU. Every process has to ask for it; one
    that has no use for them, not `here`, gets them empty: whole, they may be more than the machine holds several times."""
    if isinstance(tree, dict):
        return {key: gather_full(value, here) for key, value in tree.items()}
    if isinstance(tree, list):
        return [gather_full(value, here) for value in tree]
    if not isinstance(tree, DTensor):
        return tree
    together = tree.full_tensor()
    return together.cpu() if here else together.new_empty(0)


def distribute_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole tensor, spread as the parameter is; nothing is sent."""
    if not isinstance(parameter, DTensor):
        return value
    on_device = value.to(parameter.device)
    return distribute_tensor(on_device, parameter.device_mesh, parameter.placements, src_data_rank=None)


@torch.no_grad()
def copy_full_weights(policy: PreTrainedModel, plain: PreTrainedModel) -> None:
    """The spread policy's weights into a plain model of the same shape, rounded to what that one holds."""
    for parameter, target in zip(policy.parameters(), plain.parameters(), strict=True):
        target.copy_(parameter.full_tensor() if isinstance(parameter, DTensor) else parameter)
