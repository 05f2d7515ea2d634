"""What a training step holds on one device, in bytes: a formula, part by part.

Tests hold it against `benchmarks.simulated_memory`; docs/SCALE.md explains the parts.
"""

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import material
from pipeline.models.cache_size import CACHE_BYTES
from pipeline.models.logprobs import ROWS, ROWS_OF_A_GPU
from pipeline.models.packing import pack
from pipeline.models.sampling import SAMPLED_AT_ONCE
from pipeline.rl.optimizer import CHUNK_BYTES

RANK = 16
# What a layer keeps for the backward pass, in numbers of a token and hidden unit: two outputs of layer norms, qkv (3),
# queries, keys and values (3), the attention's output, and the MLP before and after its activation (8); the residual
# stream is one more, always in float32
KEPT, RESIDUAL_BYTES = 17, 4


@dataclass(frozen=True)
class Sizes:
    """Parameters of a GPT-NeoX with Pythia's vocabulary."""

    linear: int  # in linear layers, the head included: what is rounded where it is not trained
    rest: int  # embedding and norms
    adapters: int
    hidden: int
    layers: int
    heads: int

    @property
    def all(self) -> int:
        return self.linear + self.rest

    @property
    def head(self) -> int:
        return material.VOCABULARY * self.hidden


@dataclass(frozen=True)
class Step:
    """What a step samples."""

    prompts: tuple[int, ...] = (8,) * 16  # tokens of each
    samples: int = 8
    tokens: int = 20  # of each completion
    micro_batch: int = 64


@dataclass(frozen=True)
class Packed:
    """The largest micro-batch behind the first, as `pack` lays it out."""

    positions: int  # tokens of all rows, padding included
    width: int  # of a row
    predicted: int  # positions that have logits


DEFAULT_STEP = Step()  # that of the tables


def sizes(shape: str, rank: int = RANK) -> Sizes:
    h, layers, heads = material.SHAPES[shape]
    v = material.VOCABULARY
    block = 12 * h * h + 9 * h  # qkv 3h, dense h, h to 4h and back; their biases
    adapters = rank * (4 * h + 2 * h + 5 * h + 5 * h)
    return Sizes(layers * block + v * h, v * h + layers * 4 * h + 2 * h, layers * adapters, h, layers, heads)


def packed(step: Step) -> Packed:
    group, found = step.samples, []
    for start in range(0, len(step.prompts) * group, step.micro_batch):
        numbers = range(start, min(start + step.micro_batch, len(step.prompts) * group))
        prompts = [[number // group] * step.prompts[number // group] for number in numbers]
        rows = pack(prompts, [[0] * (step.tokens - 1)] * len(prompts))
        completion, token = torch.ones(len(prompts), step.tokens).nonzero(as_tuple=True)
        asked = rows.sources(completion, token, "correct").unique()
        found.append(Packed(rows.ids.numel(), rows.ids.shape[1], len(asked)))
    return max(found[1:] or found, key=lambda one: one.positions)


def predicted(
    shape: str, changes: dict[str, Any], step: Step = DEFAULT_STEP, processes: int = 1, gpu: bool = True
) -> dict[str, float]:  # fmt: skip
    """Bytes on one device: what is always held, the most while sampling and while updating, and `all`, their maximum.

    changes: of the recipe and of `train`, as SETTINGS of `benchmarks.memory` has them. processes: over which the policy
    is sharded, 1 = it is not.
    """
    size = sizes(shape, changes.get("lora_rank", 0) or 0)
    half, lora = changes.get("precision", "float32") == "bfloat16", size.adapters > 0
    trained = size.adapters if lora else size.all
    frozen = 2 * size.linear + 4 * size.rest if half else 4 * size.all  # beside adapters, and the reference
    adam = 8 if changes.get("optimizer", "adam") == "adam" else 0
    copies = 2 if processes > 1 else 1  # the reference, and what samples for a sharded policy
    held = frozen * copies + (4 + adam) * trained / processes
    return _peaks(
        held,
        sampling_bytes(size, step, half, lora, gpu),
        update_bytes(size, step, half, lora, changes.get("gradient_checkpointing", False), processes, gpu),
    )


def _peaks(held: float, sampling: float, update: float) -> dict[str, float]:
    return {"held": held, "sampling": held + sampling, "update": held + update, "all": held + max(sampling, update)}


def sampling_bytes(size: Sizes, step: Step, half: bool, lora: bool, gpu: bool) -> float:
    """A copy of the policy in bfloat16, the key/value cache at its longest, and logits.

    Logits [n, V] are there with their float32 and their exponentials; or, where those are of a few rows, with those of
    the token before. Or, before there are new ones, the keys or the values of one layer twice, as they grow; a GPU's
    attention, without fused kernels, multiplies bfloat16 in float32: keys, scaled keys and values of the layer.
    """
    copy = 2 * (size.rest + size.adapters if lora else size.all) if half else 0
    width, longest = 2 if half else 4, max(step.prompts) + step.tokens
    of_token = 2 * size.layers * size.hidden * width
    fit = min(SAMPLED_AT_ONCE, max(1, CACHE_BYTES["cuda" if gpu else "cpu"] // (longest * of_token)))
    at_once = min(len(step.prompts) * step.samples, fit if fit < step.samples else fit // step.samples * step.samples)
    cache = at_once * (longest - 1) * of_token
    slices = 4 * min(at_once, ROWS_OF_A_GPU if gpu else ROWS) * (1 + half)
    logits = material.VOCABULARY * at_once * width
    of_layer = cache / size.layers
    more = max(material.VOCABULARY * slices, logits, 3 * of_layer if half and gpu else of_layer / 2)
    return copy + cache + logits + more


def update_bytes(
    size: Sizes, step: Step, half: bool, lora: bool, checkpointing: bool, processes: int, gpu: bool
) -> float:  # fmt: skip
    """The gradient and the most of three times: at the logits, in a layer that is computed again, and at the end.

    Autocast's copies of the weights live as long as its cache, all micro-batches; then their gradients in bfloat16 are
    added only behind the whole backward pass. Without the cache (checkpointing, sharded) they live as long as their
    layer needs them.
    """
    batch, width, sharded = packed(step), 2 if half else 4, processes > 1
    trained, rounds = size.adapters if lora else size.all, half and not lora
    gradient = 4 * trained / processes + (8 * size.head if sharded else 0)  # FSDP keeps embedding and head whole
    of_layer = batch.positions * size.hidden * (KEPT * width + RESIDUAL_BYTES)
    in_float32 = half and gpu  # as above: what stands for qkv is as large
    weights = 4 if in_float32 else 4 + 2 * half  # of attention, in float32; and rounded
    of_layer += batch.positions * (size.heads * batch.width * weights - (0 if in_float32 else 3 * size.hidden * width))
    inputs = RESIDUAL_BYTES * batch.positions * size.hidden
    kept = size.layers * (inputs if checkpointing else of_layer) + inputs
    rounded = (2 * size.head if checkpointing else 2 * size.linear) if rounds else 0
    of_head = 0 if lora else width * size.head
    logits = width * batch.predicted * material.VOCABULARY + max(_slices(batch, half, gpu), of_head)
    times = [kept + rounded + logits]
    if checkpointing:
        block = (size.linear - size.head) / size.layers
        times.append(
            kept + of_layer + (0 if lora else (2 * block if half else 0) + 4 * size.hidden**2 * (4 + 2 * half))
        )
    elif rounds and not sharded:
        times.append(rounded + 2 * size.linear + 4 * size.head)
    # the optimizer holds some parameters as they were before; their gradients are freed after the step
    times.append(min(4 * trained / processes, max(CHUNK_BYTES, 4 * size.head)))
    return gradient + max(times)


def _slices(batch: Packed, half: bool, gpu: bool) -> float:
    """Of logits in float32 and of their gradients; those of one slice are there until the next ones are computed."""
    most = ROWS_OF_A_GPU if gpu else ROWS
    first, following = min(most, batch.predicted), min(most, max(0, batch.predicted - most))
    return 4 * material.VOCABULARY * (first * (1 + half) + following)
