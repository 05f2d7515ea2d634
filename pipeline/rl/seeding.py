"""Random numbers from (seed, step, purpose): no draw depends on how many others came before it."""

import hashlib

import torch
from torch import Tensor


def generator(seed: int, step: int, purpose: str) -> torch.Generator:
    """A CPU generator of its own for (seed, step, purpose): no draw depends on how many others came before it."""
    digest = hashlib.sha256(f"{seed}/{step}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def draw_uniforms(seed: int, step: int, purpose: str, samples: int, tokens: int) -> Tensor:
    """[samples, tokens] float64 in [0, 1), the same on every device."""
    return torch.rand(samples, tokens, generator=generator(seed, step, purpose), dtype=torch.float64)


def draw_probe_prompts(seed: int, step: int, prompts: int, count: int) -> list[int]:
    """`count` places among a step's prompts, in order: those whose completions are scored again after the update."""
    return sorted(torch.randperm(prompts, generator=generator(seed, step, "rescored"))[:count].tolist())


def draw_prompts(seed: int, step: int, count: int, available: int, draw: str, purpose: str = "prompts") -> list[int]:
    """Indices of a step's prompts.

    replacement: each is drawn from all prompts, as in the notebook. shuffled: the next `count` prompts of an endless
    sequence of epochs. Each epoch is a permutation of all prompts, so that every prompt comes equally often.
    """
    if draw == "replacement":
        return torch.randint(available, (count,), generator=generator(seed, step, purpose)).tolist()
    chosen: list[int] = []
    for slot in range(step * count, (step + 1) * count):
        epoch, place = divmod(slot, available)
        if not chosen or place == 0:
            order = torch.randperm(available, generator=generator(seed, epoch, "prompts")).tolist()
        chosen.append(order[place])
    return chosen
