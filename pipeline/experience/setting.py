"""What stays the same through a run: parameters, prompts, reward, and the models: the policy, what acts for it, and the
untouched checkpoint."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import UserError
from pipeline.io.artifacts import read_jsonl
from pipeline.io.runtime import generator
from pipeline.params import Params
from pipeline.policy.adapters import without_lora
from pipeline.policy.load import end_of_text_ids, init_policy, load_layout, load_policy, load_tokenizer
from pipeline.policy.memory import round_frozen
from pipeline.policy.rollout import longest_sequence
from pipeline.policy.sharding import put_together, shard
from pipeline.policy.tokenization import encode_prompt
from pipeline.policy.verification import Layout
from pipeline.policy.weights import put_weights, trained_weights
from pipeline.reinforce.processes import ALONE, Processes
from pipeline.rewards.build import Reward, build_reward

PROMPTS, CHECKPOINT = Path("data/prompts/train.jsonl"), Path("data/checkpoint")


@dataclass(frozen=True)
class Setting:
    """What stays the same through a run."""

    params: Params
    prompts: list[str]
    tokenizer: PreTrainedTokenizerBase
    acting: PreTrainedModel  # samples and scores for the policy: itself, or a copy of one that is spread over processes
    # `with setting.reference() as model`: the untouched checkpoint, a model of its own or the policy without its adapters
    reference: Callable[[], AbstractContextManager[PreTrainedModel]]
    reward: Reward
    device: torch.device
    eos: tuple[int, ...]  # every id that ends a completion; the first one fills up behind an end
    layout: Layout
    processes: Processes = ALONE


def set_stage(
    params: Params, device: torch.device, processes: Processes = ALONE
) -> tuple[Setting, PreTrainedModel]:  # fmt: skip
    """What `prepare` and `cache` left, and the policy to train. Raises UserError where `cache` did not try the policy with
    sequences as long as this run's."""
    # a policy that is spread may be too large for one device: from the CPU its parts are sent where they belong
    policy = acting = first_policy(params, device, torch.device("cpu") if processes.sharded else device)
    reference: Callable[[], AbstractContextManager[PreTrainedModel]]
    if not params.train.lora_rank:
        reference = partial(as_it_is, untrained(params, device))
    elif processes.sharded:
        raise UserError("train.lora_rank: adapters need no spreading; choose another distributed_type than FSDP, or 0")
    else:
        reference = partial(without_lora, policy)
    if processes.sharded:
        acting = untrained(params, device)
        shard(policy, device, processes.count)
    tokenizer, prompts = load_tokenizer(CHECKPOINT / "policy"), [row["prompt"] for row in read_jsonl(PROMPTS)]
    lengths = [len(encode_prompt(tokenizer, prompt)) for prompt in prompts]
    longest = longest_sequence(lengths, params.train.max_tokens, params.selected("recipe").length_limit)
    setting = Setting(
        params, prompts, tokenizer, acting, reference,
        build_reward(params.reward, params.selected("reward"), CHECKPOINT / "encoder", device), device,
        end_of_text_ids(CHECKPOINT / "policy", tokenizer), load_layout(CHECKPOINT / "layout.json", longest), processes,
    )  # fmt: skip
    return setting, policy


def first_policy(params: Params, device: torch.device, at: torch.device) -> PreTrainedModel:
    """The policy before its first update, with this run's adapters."""
    return init_policy(
        CHECKPOINT / "policy", device, at, lora_rank=params.train.lora_rank, lora_alpha=params.train.lora_alpha,
        generator=generator(params.seed, 0, "adapters"), bfloat16=params.selected("recipe").precision == "bfloat16",
    )  # fmt: skip


def untrained(params: Params, device: torch.device) -> PreTrainedModel:
    """The checkpoint, as a model that takes no gradient."""
    model = load_policy(CHECKPOINT / "policy", device).requires_grad_(False)
    if params.selected("recipe").precision == "bfloat16":
        round_frozen(model)
    return model


def as_it_is(model: PreTrainedModel) -> AbstractContextManager[PreTrainedModel]:
    return nullcontext(model)


def catch_up(setting: Setting, policy: PreTrainedModel) -> None:
    """Has the model that acts for the policy hold its present weights."""
    if setting.acting is not policy:
        put_together(policy, setting.acting)


def in_one_piece(policy: PreTrainedModel, processes: Processes) -> PreTrainedModel:
    """The policy to be saved. Of a spread one every process has to ask; the one that writes gets it, on the CPU."""
    if not processes.sharded:
        return policy
    weights = trained_weights(policy, processes.writes)
    if processes.writes:
        policy = load_policy(CHECKPOINT / "policy", torch.device("cpu"))
        put_weights(policy, weights)
    return policy
