"""The memory of a training step on a device that is not there: the project's own sampling, scoring and update on fake
tensors, which have shapes and no numbers, while every storage is counted from its birth to its end.

`python -m benchmarks.memory simulate` writes what it finds.
"""

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from ruamel.yaml import YAML
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from benchmarks import material
from benchmarks.memory_formula import DEFAULT_STEP, Step
from benchmarks.real_steps import ROOT, set_keys
from pipeline.config.load import validate_params
from pipeline.config.schema import Params
from pipeline.models import cache_size, logprobs, sampling
from pipeline.models.adapters import add_lora, without_lora
from pipeline.models.memory import bf16_copy, cast_frozen_bf16
from pipeline.models.sampling import pad_prompts, sample
from pipeline.models.verification import Layout
from pipeline.rl.batch import score_batch
from pipeline.rl.context import TrainContext
from pipeline.rl.loss import LossNormalizers
from pipeline.rl.micro_batch import Batch
from pipeline.rl.optimizer import make_optimizer
from pipeline.rl.update import update_policy

aten = torch.ops.aten
BLOCK = 512  # bytes: torch's allocator of a GPU rounds up to a multiple


class Device(TorchDispatchMode):
    """Inside, operations on fake tensors give fake ones, all others compute; and the storages of both are counted.

    So whole numbers (tokens, masks, positions) are real and lead the code through its branches, and what comes from
    weights is fake. A number that is read out of a fake tensor is 1, and nothing in one is true.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.held = self.peak = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, torch.Tensor)]
        fake = any(isinstance(x, FakeTensor) for x in given)
        if fake and func is aten._local_scalar_dense.default:
            return 1.0 if given[0].dtype.is_floating_point else True
        if fake and func is aten.any.default:
            return torch.tensor(False)
        with self.fake if fake else contextlib.nullcontext():
            result = func(*args, **kwargs or {})
        self.count(result)
        return result

    def count(self, tensors: Any) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage not in self.seen:
                    self.seen.add(storage)
                    size = -(-storage.nbytes() // BLOCK) * BLOCK
                    self.held += size
                    self.peak = max(self.peak, self.held)
                    weakref.finalize(storage, self.release, size)

    def release(self, size: int) -> None:
        self.held -= size


def simulate(shape: str, changes: dict[str, Any], sampled: Step = DEFAULT_STEP, gpu: bool = True) -> dict[str, int]:
    """The most bytes held in each phase of the second of two steps, and `all`, the most of them.

    changes: of `train` and of the recipe `stable`. gpu: attention and the sizes of slices are those of a GPU.
    """
    sizes = {"prompts_per_step": len(sampled.prompts), "samples_per_prompt": sampled.samples}
    sizes |= {"max_tokens": sampled.tokens, "micro_batch": sampled.micro_batch}
    params = changed_params({**sizes, **changes})
    train, recipe = params.train, params.selected_recipe
    half, attention = recipe.precision == "bfloat16", "sdpa" if gpu else "eager"
    # on a GPU `configure_torch` switches the fused kernels off; on a CPU the policy's own attention is none
    with Device() as device, without_numbers(), bounds_of(gpu), sdpa_kernel(SDPBackend.MATH):
        policy = loaded(device, shape, attention)
        reference: Any = partial(without_lora, policy)
        if train.lora_rank:
            with device.fake:
                add_lora(policy, train.lora_rank, train.lora_alpha, torch.Generator())
            if half:
                cast_frozen_bf16(policy)
        else:
            checkpoint = loaded(device, shape, attention).requires_grad_(False)
            if half:
                cast_frozen_bf16(checkpoint)
            reference = partial(contextlib.nullcontext, checkpoint)
        optimizer = make_optimizer(policy.parameters(), recipe)
        nobody: Any = None  # asks for texts or rewards
        context = TrainContext(params, [], nobody, policy, reference, nobody, torch.device("cpu"), (0,), Layout())
        for each in (replace(sampled, tokens=2), sampled):  # in the second, Adam has its state
            peaks = step(device, context, policy, optimizer, each)
    return peaks | {"all": max(peaks.values())}


def loaded(device: Device, shape: str, attention: str) -> PreTrainedModel:
    with device.fake:
        policy = material.policy(shape)
    policy.set_attn_implementation(attention)
    return policy


def step(device: Device, context: TrainContext, policy: Any, optimizer: Any, sampled: Step) -> dict[str, int]:
    """Sampling, reference, update and the scores after it, as `train_step` has them."""
    params, peaks = context.params, {"held": device.held}
    train, recipe = params.train, params.selected_recipe

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        device.peak = device.held
        yield
        peaks[name] = device.peak

    # other prompts have other tokens: equal ones would share a row
    ids, mask = pad_prompts([[number] * count for number, count in enumerate(sampled.prompts, 1)], 0, context.device)
    uniforms = torch.rand(len(ids) * sampled.samples, sampled.tokens, dtype=torch.float64)
    limits = torch.full((len(ids),), sampled.tokens)
    with phase("sampling"):
        acting = bf16_copy(policy) if recipe.precision == "bfloat16" else policy
        rollout = sample(acting, ids, mask, limits, uniforms, context.eos, recipe.sampling_params)
        del acting
    with phase("reference"), context.reference() as reference:
        score_batch(reference, rollout, context)
    inside = rollout.completion_mask
    normalizers = LossNormalizers(len(inside), int(inside.sum()), train.max_tokens)
    batch = Batch(rollout, torch.ones(len(inside)), inside, None, normalizers)
    with phase("update"):
        update_policy(
            batch, policy, optimizer, recipe, 1e-4, train.micro_batch, train.samples_per_prompt,
            gradient_checkpointing=train.gradient_checkpointing,
        )  # fmt: skip
    probe = torch.arange(sampled.samples * train.kl_probe_prompts)
    with phase("rescoring"):
        score_batch(policy, rollout.take(probe), context)
    return peaks


def cast(module: torch.nn.Module, *where: Any, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """As torch's own, which cannot change a fake tensor in place."""
    dtypes = [each for each in (*where, dtype) if isinstance(each, torch.dtype)]
    for part in module.modules():
        for name, p in list(part.named_parameters(recurse=False)):
            if dtypes and p.dtype != dtypes[0]:
                setattr(part, name, torch.nn.Parameter(p.detach().to(dtypes[0]), p.requires_grad))
    return module


@contextlib.contextmanager
def without_numbers() -> Iterator[None]:
    """Inside, no token depends on numbers that are not there, and modules are cast as fake tensors allow it."""
    plain = sampling.sample_tokens

    def tokens(*inputs: Any) -> tuple[torch.Tensor, ...]:
        found = plain(*inputs)
        return (torch.ones(len(found[0]), dtype=torch.long), *found[1:])

    with mock.patch.object(sampling, "sample_tokens", tokens), mock.patch.object(torch.nn.Module, "to", cast):
        yield


@contextlib.contextmanager
def bounds_of(gpu: bool) -> Iterator[None]:
    """Inside, a CPU's slices of logits and bound of the cache are those of a GPU, if `gpu`."""
    rows = logprobs.ROWS_OF_A_GPU if gpu else logprobs.ROWS
    cache = cache_size.CACHE_BYTES["cuda" if gpu else "cpu"]
    with mock.patch.object(logprobs, "ROWS", rows), mock.patch.dict(cache_size.CACHE_BYTES, cpu=cache):
        yield


def changed_params(changes: dict[str, Any]) -> Params:
    tree = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    set_keys(tree, changes)
    return validate_params(tree)
