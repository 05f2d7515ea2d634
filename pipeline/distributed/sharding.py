"""FSDP (Zhao et al., arXiv 2304.11277) by torch's `fully_shard`: each process holds a part of the policy's weights,
gradients and optimizer state, and a layer is gathered where it is computed."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def shard(policy: PreTrainedModel, device: torch.device, processes: int) -> None:
    """Shards the policy in place, layer by layer, each part on its process's device. Gradients are summed over the
    processes, not averaged, since the loss's normalisers are those of the whole batch."""
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
    """This process's part of a tensor, sharing its memory; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_full(tree: Any, keep: bool = True, copy: bool = False) -> Any:
    """Collective call: gathers the sharded tensors of a tree of dicts and lists on the CPU. Ranks with keep=False get
    empty tensors: several whole copies may not fit into one machine. With copy=True every tensor of the result lies on
    the CPU and shares no memory with the tree."""
    if isinstance(tree, dict):
        return {key: gather_full(value, keep, copy) for key, value in tree.items()}
    if isinstance(tree, list):
        return [gather_full(value, keep, copy) for value in tree]
    if isinstance(tree, DTensor):
        together = tree.full_tensor()
        return together.to("cpu", copy=copy) if keep else together.new_empty(0)
    return tree.to("cpu", copy=True) if copy and isinstance(tree, Tensor) else tree


def distribute_like(parameter: Tensor, value: Tensor) -> Tensor:
    """Shards a whole tensor as the parameter is sharded. Nothing is sent."""
    if not isinstance(parameter, DTensor):
        return value
    on_device = value.to(parameter.device)
    return distribute_tensor(on_device, parameter.device_mesh, parameter.placements, src_data_rank=None)


@torch.no_grad()
def copy_full_weights(policy: PreTrainedModel, plain: PreTrainedModel) -> None:
    """Copies a sharded policy's weights into a plain model, rounded to its dtypes."""
    for parameter, target in zip(policy.parameters(), plain.parameters(), strict=True):
        target.copy_(parameter.full_tensor() if isinstance(parameter, DTensor) else parameter)
