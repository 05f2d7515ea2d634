"""What stays the same through a run: parameters, prompts, reward and models."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.config.schema import Params
from pipeline.data.prompts import Prompt, read_prompts
from pipeline.distributed.dist_context import SINGLE_PROCESS, DistContext
from pipeline.distributed.sharding import copy_full_weights, shard
from pipeline.distributed.weights import load_weights, trained_weights
from pipeline.errors import UserError
from pipeline.models.adapters import without_lora
from pipeline.models.load import end_of_text_ids, init_policy, load_layout, load_policy, load_tokenizer
from pipeline.models.memory import cast_frozen_bf16
from pipeline.models.rollout import longest_sequence
from pipeline.models.tokenization import encode_prompt
from pipeline.models.verification import Layout
from pipeline.paths import CHECKPOINT, CLASSIFIERS, HELDOUT_PROMPTS, TRAIN_PROMPTS
from pipeline.rewards.batch import Reward
from pipeline.rewards.build import build_reward, check_rows
from pipeline.rewards.classifier import Cuts, stored_classifiers
from pipeline.rl.seeding import generator


@dataclass(frozen=True)
class TrainContext:
    """What stays the same through a run."""

    params: Params
    prompts: list[Prompt]
    tokenizer: PreTrainedTokenizerBase
    rollout_model: PreTrainedModel  # samples and scores: the policy itself, or an unsharded copy of a sharded policy
    # `with context.reference() as model` gives the reference: a second model, or the policy without its adapters
    reference: Callable[[], AbstractContextManager[PreTrainedModel]]
    reward: Reward
    device: torch.device
    eos: tuple[int, ...]  # ids that end a completion; the first one pads
    layout: Layout
    processes: DistContext = SINGLE_PROCESS
    heldout: tuple[Prompt, ...] = ()  # prompts of the held-out curve, which training measures
    cuts: Cuts = field(default_factory=Cuts)  # counts the inputs that the reward's classifiers cut, in this process


def build_context(
    params: Params, device: torch.device, processes: DistContext = SINGLE_PROCESS
) -> tuple[TrainContext, PreTrainedModel]:
    """The context of a run, from the files of `prepare` and `cache`, and the policy to train. Raises UserError where
    this run's sequences are longer than those that `cache` compared."""
    # a policy that will be sharded may not fit on one device, so it is loaded on the CPU
    policy = rollout_model = initial_policy(params, device, torch.device("cpu") if processes.sharded else device)
    reference: Callable[[], AbstractContextManager[PreTrainedModel]]
    if not params.train.lora_rank:
        reference = partial(unchanged, load_reference(params, device))
    elif processes.sharded:
        raise UserError("train.lora_rank: adapters need no spreading; choose another distributed_type than FSDP, or 0")
    else:
        reference = partial(without_lora, policy)
    if processes.sharded:
        rollout_model = load_reference(params, device)
        shard(policy, device, processes.world_size)
    tokenizer, prompts = load_tokenizer(CHECKPOINT / "policy"), read_prompts(TRAIN_PROMPTS)
    measured = read_prompts(HELDOUT_PROMPTS)[: params.evaluate.prompts or None] if HELDOUT_PROMPTS.exists() else []
    check_rows(params.reward, params.selected_reward, [*prompts, *measured])
    heldout = curve_prompts(params, measured, processes.world_size) if params.evaluate.every else []
    chat = params.selected_model.chat
    lengths = [len(encode_prompt(tokenizer, prompt.content, chat)) for prompt in [*prompts, *heldout]]
    longest = longest_sequence(lengths, params.train.max_tokens, params.selected_recipe.length_limit)
    cuts = Cuts()
    context = TrainContext(
        params,
        prompts,
        tokenizer,
        rollout_model,
        reference,
        build_reward(
            params.reward, params.selected_reward, CHECKPOINT / "encoder", device, stored_classifiers(CLASSIFIERS), cuts
        ),
        device,
        end_of_text_ids(CHECKPOINT / "policy", tokenizer),
        load_layout(CHECKPOINT / "layout.json", longest),
        processes,
        tuple(heldout),
        cuts,
    )
    return context, policy


def curve_prompts(params: Params, heldout: list[Prompt], processes: int) -> list[Prompt]:
    """The prompts of the held-out curve: the first ones, as in `evaluate`. Raises UserError if there are too few."""
    prompts = heldout[: params.evaluate.curve_prompts]
    if len(prompts) < max(2, processes):
        raise UserError(
            f"evaluate.every: a curve needs a held-out prompt for each process, and one to choose by and one to report "
            f"on; {HELDOUT_PROMPTS} and evaluate.curve_prompts leave {len(prompts)}"
        )
    return prompts


def initial_policy(params: Params, device: torch.device, weights_device: torch.device) -> PreTrainedModel:
    """The policy before its first update, with this run's adapters."""
    return init_policy(
        CHECKPOINT / "policy",
        device,
        weights_device,
        lora_rank=params.train.lora_rank,
        lora_alpha=params.train.lora_alpha,
        generator=generator(params.seed, 0, "adapters"),
        bfloat16=params.selected_recipe.precision == "bfloat16",
    )


def load_reference(params: Params, device: torch.device) -> PreTrainedModel:
    """The reference model: the policy as `cache` stored it, without gradients."""
    model = load_policy(CHECKPOINT / "policy", device).requires_grad_(False)
    if params.selected_recipe.precision == "bfloat16":
        cast_frozen_bf16(model)
    return model


def unchanged(model: PreTrainedModel) -> AbstractContextManager[PreTrainedModel]:
    return nullcontext(model)


def sync_rollout_model(context: TrainContext, policy: PreTrainedModel) -> None:
    """Copies the weights of a sharded policy into the model that samples for it."""
    if context.rollout_model is not policy:
        copy_full_weights(policy, context.rollout_model)


def gather_full_policy(policy: PreTrainedModel, processes: DistContext) -> PreTrainedModel:
    """The policy to save. For a sharded policy this is a collective call: rank 0 gets a whole copy on the CPU."""
    if not processes.sharded:
        return policy
    weights = trained_weights(policy, processes.is_main_process)
    if processes.is_main_process:
        policy = load_policy(CHECKPOINT / "policy", torch.device("cpu"))
        load_weights(policy, weights)
    return policy
