"""LoRA: small trained matrices beside the frozen weights of a policy, through peft (Hu et al., arXiv 2106.09685)."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.errors import UserError

FOLDER_HAS = "adapter_config.json"  # only a folder with an adapter has this file; it names the checkpoint


def add_lora(policy: PreTrainedModel, rank: int, alpha: float, generator: torch.Generator) -> None:
    """W x becomes W x + (alpha / rank) B A x in every linear layer but the head, in place; only A and B are trained.

    A [rank, in] is drawn from `generator` as peft does, uniform in +- 1 / sqrt(in); B [out, rank] is zero, so the
    policy starts as it was. Raises UserError where peft is missing, or the model has no linear layer.
    """
    peft = _peft()
    head, modules = policy.get_output_embeddings(), dict(policy.named_modules())
    # a router computes more than the product W x
    routers = {name for name, module in modules.items() if "Router" in type(module).__name__}
    linear = {name for name, m in modules.items() if isinstance(m, nn.Linear | Conv1D) and m is not head} - routers
    if not linear:
        raise UserError(f"train.lora_rank = {rank}: {type(policy).__name__} has no linear layers; 0 trains all weights")
    # peft matches the end of a module's name: the last part, unless a module of another kind ends so too
    others = {name.rpartition(".")[2] for name in modules.keys() - linear}
    ends = ((name, name.rpartition(".")[2]) for name in linear)
    names = sorted({name if last in others else last for name, last in ends})
    transposed = any(isinstance(modules[name], Conv1D) for name in linear)
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=names, fan_in_fan_out=transposed, task_type="CAUSAL_LM"
    )
    try:
        policy.add_adapter(config)
    except ValueError as error:  # peft's message for models that it cannot adapt
        raise UserError(f"train.lora_rank = {rank}: {error}; 0 trains all weights") from error
    # peft turns the names into a set, which it would save in arbitrary order
    policy.peft_config["default"].target_modules = names  # type: ignore[attr-defined]
    for name, parameter in policy.named_parameters():
        if ".lora_A." in name:
            drawn = nn.init.kaiming_uniform_(torch.empty(parameter.shape), a=math.sqrt(5), generator=generator)
            parameter.data.copy_(drawn)  # drawn on the CPU: the same on every device
    policy.eval()


def load_lora(policy: PreTrainedModel, folder: Any) -> None:
    """Adds the adapter in this folder, in place. Raises UserError where peft is missing, and where transformers looks
    for a matrix of the adapter under another name than it was saved with: this matrix would count as zero."""
    _peft()
    report = policy.load_adapter(str(folder))
    policy.eval()
    if lost := sorted(report.missing_keys | report.unexpected_keys):
        raise UserError(f"{folder}: transformers loads only a part of its adapter: {lost[0]} is not what was saved")


def adapter_weights(policy: PreTrainedModel) -> dict[str, Tensor]:
    """The matrices A and B of each adapted layer, by name."""
    return {name: parameter for name, parameter in policy.named_parameters() if ".lora_" in name}


@contextmanager
def without_lora(policy: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Inside, the policy computes without its adapters: it is the reference model."""
    policy.disable_adapters()
    try:
        yield policy
    finally:
        policy.enable_adapters()


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UserError(
            "train.lora_rank needs peft, which is not installed: `pip install peft`, or set it to 0"
        ) from None
    return peft
