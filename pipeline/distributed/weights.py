"""The trained weights of a policy and the state of their optimizer, as whole tensors: what a resume state holds."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.distributed.sharding import distribute_like, gather_full


def trained_weights(policy: PreTrainedModel, keep: bool = True, copy: bool = False) -> dict[str, Tensor]:
    """The trained parameters by name, whole: all of them, or the adapters only. Collective call for a sharded policy:
    ranks with keep=False get empty tensors. copy=True: on the CPU, in memory of their own."""
    return {name: gather_full(p.detach(), keep, copy) for name, p in policy.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_weights(policy: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """The inverse of `trained_weights`. Raises ValueError for the weights of another policy."""
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    if trained.keys() != weights.keys():
        raise ValueError(f"weights of another policy: {sorted(trained.keys() ^ weights.keys())[:3]} differ")
    for name, parameter in trained.items():
        parameter.copy_(distribute_like(parameter, weights[name]))


def optimizer_state(optimizer: torch.optim.Optimizer, keep: bool = True, copy: bool = False) -> dict[str, Any]:
    """The optimizer's `state_dict` with whole tensors; for the arguments see `trained_weights`."""
    return gather_full(optimizer.state_dict(), keep, copy)


def state_bytes(policy: PreTrainedModel, optimizer: torch.optim.Optimizer) -> int:
    """The bytes of the whole tensors of both: 12 per trained parameter with Adam in float32."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    moments = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in [*trained, *moments])


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The inverse of `optimizer_state`."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    spread = {
        i: {
            key: distribute_like(parameters[i], value) if value.shape == parameters[i].shape else value
            for key, value in entry.items()
        }
        for i, entry in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": spread})
