"""The processes that train one policy together: which prompts each one computes, and their collective calls.

Every process draws the same prompts and random numbers for the whole step. It samples, scores and differentiates its
own part and gathers the others' parts, so that whatever is computed from whole batches is the same in all processes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class DistContext:
    """This process among `world_size`. With one process nothing is sent and torch.distributed is not needed.

    Gathered values are only numbers. They travel from CPU to CPU, by `host_group`, in which processes may wait long,
    for example for rank 0 to write a checkpoint. Gradients and sharded weights go from device to device, by torch's
    default group.
    """

    rank: int = 0
    world_size: int = 1
    sharded: bool = False  # FSDP: each process holds a part of the policy
    host_group: Any = None  # the process group for CPU tensors; None: torch's default one

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes the files: rank 0 does."""
        return self.rank == 0

    @property
    def description(self) -> int | str:
        """The number of processes, as run.json records it."""
        return f"{self.world_size} sharded" if self.sharded else self.world_size

    def shard_slice(self, items: int) -> slice:
        """This process's share of `items`: consecutive items; shares differ by at most one."""
        share, more = divmod(items, self.world_size)
        start = self.rank * share + min(self.rank, more)
        return slice(start, start + share + (self.rank < more))

    def group_slice(self, rows: int, group: int) -> slice:
        """This process's share of [rows] completions: whole groups, all completions of a prompt."""
        prompts = self.shard_slice(rows // group)
        return slice(prompts.start * group, prompts.stop * group)

    def gather(self, part: Tensor, filler: float = 0) -> Tensor:
        """Collective call: this process's rows [n, ...] -> the rows of all processes [N, ...], by rank.

        Processes may have different shapes: the other dimensions are padded with `filler` to the largest.
        """
        if self.world_size == 1:
            return part
        shapes = self._all(torch.tensor(part.shape))
        room = torch.stack(shapes).amax(0).tolist()
        padded = torch.full(room, filler, dtype=part.dtype)
        padded[tuple(slice(size) for size in part.shape)] = part.cpu()
        whole = torch.cat([rows[: int(shape[0])] for rows, shape in zip(self._all(padded), shapes, strict=True)])
        return whole.to(part.device)

    def _all(self, same: Tensor) -> list[Tensor]:
        """The CPU tensors of all processes, which have one shape."""
        received = [torch.empty_like(same) for _ in range(self.world_size)]
        dist.all_gather(received, same, group=self.host_group)
        return received

    def all_reduce_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sums each gradient over the processes, in place. FSDP has summed them already."""
        for parameter in parameters if self.world_size > 1 and not self.sharded else ():
            if parameter.requires_grad:
                if parameter.grad is None:  # this process's share has no token in the loss
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)

    def barrier(self) -> None:
        """Wait until all processes have called this."""
        if self.world_size > 1:
            dist.barrier(group=self.host_group)

    def all_reduce_max(self, value: int) -> int:
        return int(self.gather(torch.tensor([value])).max())

    def reduce_if_sharded(self, value: float) -> float:
        """A sum over the weights that this process holds -> the sum over all weights."""
        return self.all_reduce_sum(value) if self.sharded else value

    def all_reduce_sum(self, value: float) -> float:
        """The sum of a number over the processes."""
        return self.gather(torch.tensor([value], dtype=torch.float64)).sum().item()


SINGLE_PROCESS = DistContext()
