"""The processes that train one policy together: which prompts are whose, and what they tell each other.

Every process draws the same prompts and the same random numbers for all of a step, samples, scores and differentiates
its own part, and gathers the parts of the others: what is computed from whole batches is the same everywhere.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class DistContext:
    """This process among `count`. Alone, nothing is sent, and torch.distributed is not needed."""

    rank: int = 0
    world_size: int = 1
    sharded: bool = False  # the policy is spread over them, not held by each

    @property
    def is_main_process(self) -> bool:
        """One of them writes files and talks to the tracker."""
        return self.rank == 0

    @property
    def description(self) -> int | str:
        """How a run was computed, for its record."""
        return f"{self.world_size} sharded" if self.sharded else self.world_size

    def shard_slice(self, items: int) -> slice:
        """This process's share of `items`, a run of them; shares differ by one at most."""
        share, more = divmod(items, self.world_size)
        start = self.rank * share + min(self.rank, more)
        return slice(start, start + share + (self.rank < more))

    def group_slice(self, rows: int, group: int) -> slice:
        """This process's share of [rows] completions, whole groups of one prompt."""
        prompts = self.shard_slice(rows // group)
        return slice(prompts.start * group, prompts.stop * group)

    def gather(self, part: Tensor, filler: float = 0) -> Tensor:
        """The rows of all processes [N, ...], in their order, of this one's [n, ...].

        Parts may differ in rows, and in what else they measure, which is filled up to the largest.
        """
        if self.world_size == 1:
            return part
        shapes = self._all(torch.tensor(part.shape, device=part.device))
        room = torch.stack(shapes).amax(0).tolist()
        padded = part.new_full(room, filler)
        padded[tuple(slice(size) for size in part.shape)] = part
        return torch.cat([rows[: int(shape[0])] for rows, shape in zip(self._all(padded), shapes, strict=True)])

    def _all(self, same: Tensor) -> list[Tensor]:
        """Tensors of one shape, of all processes."""
        received = [torch.empty_like(same) for _ in range(self.world_size)]
        dist.all_gather(received, same)
        return received

    def all_reduce_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sums each parameter's gradient over the processes, in place. Of a spread policy it is summed already."""
        for parameter in parameters if self.world_size > 1 and not self.sharded else ():
            if parameter.requires_grad:
                if parameter.grad is None:  # a share without tokens in the loss
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)

    def barrier(self) -> None:
        """Until all have come here."""
        if self.world_size > 1:
            dist.barrier()

    def all_reduce_max(self, value: int, device: torch.device) -> int:
        return int(self.gather(torch.tensor([value], device=device)).max())

    def reduce_if_sharded(self, value: float, device: torch.device) -> float:
        """A sum over all weights from one over this process's part of them."""
        return self.all_reduce_sum(value, device) if self.sharded else value

    def all_reduce_sum(self, value: float, device: torch.device) -> float:
        """The sum of a number over the processes."""
        return self.gather(torch.tensor([value], dtype=torch.float64, device=device)).sum().item()


SINGLE_PROCESS = DistContext()
