"""NCCL between processes that each have a pretend GPU: what it refuses is refused, gloo carries the rest.

Each process writes the names of its collective calls to $PRETEND_CALLS, a folder, where that is set.
"""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllreduceOptions, BroadcastOptions, Work, _create_work_from_future
from torch.futures import Future


def done(result: Any) -> Work:
    future: Future[Any] = Future()
    future.set_result(result)
    return _create_work_from_future(future)


class PretendNccl(dist.ProcessGroup):
    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self.gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        self.name = ""

    def getBackendName(self) -> str:  # noqa: N802  # torch's name
        return "pretendnccl"

    def _set_group_name(self, name: str) -> None:
        self.name = name

    @property
    def pg_name(self) -> str:
        return self.name

    @property
    def group_name(self) -> str:
        return self.name

    def host(self, call: str, tensor: Tensor) -> Tensor:
        """The tensor's memory, if NCCL would take it."""
        if folder := os.environ.get("PRETEND_CALLS"):
            with (Path(folder) / os.environ["RANK"]).open("a") as file:
                file.write(f"{call} {tensor.numel()}\n")
        if not tensor.is_cuda:
            raise RuntimeError(f"No backend type associated with device type {tensor.device.type}")
        if tensor.device.index != torch.cuda.current_device():
            raise RuntimeError(f"NCCL error: a tensor on {tensor.device}, not this process's device")
        if not tensor.is_contiguous():
            raise ValueError("Tensors must be contiguous")
        return torch.ops.pretend.on_host(tensor.detach())

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any = None) -> Work:
        own = self.host("allgather", inputs[0])
        self.gloo.allgather([[self.host("", part) for part in outputs[0]]], [own]).wait()
        return done(outputs)

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> Work:
        self.gloo.allreduce([self.host("allreduce", x) for x in tensors], options or AllreduceOptions()).wait()
        return done(tensors)

    def broadcast(self, tensors: list[Tensor], options: Any = None) -> Work:
        self.gloo.broadcast([self.host("broadcast", x) for x in tensors], options or BroadcastOptions()).wait()
        return done(tensors)

    def all_gather_single(self, output: Tensor, own: Tensor, options: Any = None) -> Work:
        whole = self.host("", output).view(-1)
        self.gloo.allgather([list(whole.chunk(self.size()))], [self.host("all_gather_single", own).view(-1)]).wait()
        return done(output)

    def reduce_scatter_single(self, output: Tensor, whole: Tensor, options: Any = None) -> Work:
        summed = self.host("reduce_scatter_single", whole).clone()
        self.gloo.allreduce([summed]).wait()
        own = self.host("", output)
        own.copy_(summed.view(-1).chunk(self.size())[self.rank()].view_as(own))
        return done(output)

    def all_gather_single_coalesced(self, outputs: list[Tensor], owns: list[Tensor], options: Any = None) -> Work:
        return [self.all_gather_single(*pair) for pair in zip(outputs, owns, strict=True)][-1]

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], wholes: list[Tensor], options: Any = None) -> Work:
        return [self.reduce_scatter_single(*pair) for pair in zip(outputs, wholes, strict=True)][-1]

    def barrier(self, options: Any = None) -> Work:
        raise RuntimeError("NCCL would guess this process's device")


def register() -> None:
    """Puts it in NCCL's place, and lets FSDP free the memory of tensors, which a build without CUDA cannot."""
    import torch.distributed.fsdp._fully_shard._fsdp_param as fsdp

    dist.Backend.register_backend("pretendnccl", PretendNccl, devices=["cuda"])
    init = dist.init_process_group
    dist.init_process_group = lambda backend=None, *given, **named: init(
        backend and backend.replace("nccl", "pretendnccl"), *given, **named
    )

    def resize(tensor: Tensor, size: int) -> None:
        if tensor.untyped_storage().size() != size:
            torch.ops.pretend.resize_storage(tensor, size)

    fsdp.free_storage = lambda tensor: resize(tensor, 0)
    fsdp.alloc_storage = lambda tensor: resize(tensor, tensor.numel() * tensor.itemsize)
