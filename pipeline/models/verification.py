"""Checks that sampling, scoring and their gradient agree with the model's own forward pass.

The truth is the model's plain forward pass of one sequence in float32: tokens and nothing else, no padding, packing,
cache or memory settings. No list of architectures decides what works, only this comparison.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.errors import UserError, cut, one_line
from pipeline.models.memory import activation_checkpointing, bf16_copy, cast_frozen_bf16
from pipeline.models.sampling import Rollout, SamplingLayout, pad_prompts, sample, takes
from pipeline.models.scoring import score

PROBES, SAMPLES = 4, 2  # prompts, and completions of each
SAMPLED = 64  # tokens of a completion that are sampled; a longer one begins as a part of the prompt
NATS, RELATIVE = 3e-4, 3e-5  # a log-probability may be off by NATS and by this share of itself ...
GRADIENT = 1e-3  # ... and a gradient by this share of its length (L2); rounding moves them by a hundredth of that
# bfloat16 may be off by HALF_FACTOR times the error of the plain forward pass in bfloat16, and by this much more
HALF_NATS, HALF_GRADIENT, HALF_FACTOR = 0.05, 0.05, 4.0
WINDOWS = ("sliding_window", "attention_window", "attention_chunk_size", "window_size", "local_attention")
RECURRENT = ("mamba", "ssm_", "conv_kernel", "conv_L", "recurrent", "linear_attention", "rwkv", "xlstm")


@dataclass(frozen=True)
class Layout:
    """How sequences are laid out for a model. A slower way is for models that compute other numbers in a faster one."""

    sampling: SamplingLayout = "left_padding"  # see `sample`
    packing: bool = True  # see `score`

    def __str__(self) -> str:
        sampled = {
            "left_padding": "left-padded prompts",
            "equal_lengths": "prompts of equal length at a time (slower)",
            "no_cache": "without a cache (much slower)",
        }[self.sampling]
        return f"samples {sampled}, scores {'packed sequences' if self.packing else 'a sequence a row (slower)'}"


def probe_prompts(prompts: Sequence[list[int]], limits: Sequence[int]) -> tuple[list[list[int]], list[int]]:
    """A few prompts for `choose_layout`, of lengths from the shortest to the longest, and how much to sample of each.
    Among them is the one that makes the longest sequence.

    The shortest prompt stays as it is. If a completion may have more than SAMPLED tokens, the other prompts are longer
    by the difference, so that sampling reaches the full length. All added tokens are taken from the prompts.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    chosen = [order[round(k * (len(order) - 1) / (PROBES - 1))] for k in range(PROBES)]
    chosen = list(dict.fromkeys([*chosen, max(order, key=lambda i: len(prompts[i]) + limits[i])]))
    tokens = cycle([token for i in order[-PROBES:] for token in prompts[i]])
    made = []
    for i in chosen:
        rest = 0 if i == order[0] and len(chosen) > 1 else max(0, limits[i] - SAMPLED)
        made.append(prompts[i] + list(islice(tokens, rest)))
    return made, [min(limits[i], SAMPLED) for i in chosen]


def choose_layout(
    policy: PreTrainedModel,
    prompts: list[list[int]],
    limits: list[int],
    key: str,
    *,
    eos: Sequence[int] = (),
    special: Collection[int] = (),
    bfloat16: bool = False,
    gradient_checkpointing: bool = False,
) -> tuple[Layout, str]:
    """The fastest layout in which sampling, scoring and the gradient agree with the model's plain forward pass, and a
    description with the largest difference.

    policy: in float32, as training starts with it, its adapters included. bfloat16: also compares the layout in
    bfloat16, and leaves the policy rounded as training rounds it. prompts and limits: of `probe_prompts`. key: names
    the model in messages. eos: ids that end a completion, which are never sampled here. special: other special tokens,
    such as padding, which get a quarter of the probability.

    Raises UserError where no layout agrees, naming the cause where it is known.
    """
    with _probable(policy, eos, sorted(set(special) - set(eos))):
        return _choose_layout(policy, prompts, limits, key, bfloat16, gradient_checkpointing)


def _choose_layout(
    policy: PreTrainedModel,
    prompts: list[list[int]],
    limits: list[int],
    key: str,
    bfloat16: bool,
    gradient_checkpointing: bool,
) -> tuple[Layout, str]:
    longest = max(len(p) + limit for p, limit in zip(prompts, limits, strict=True))

    def refuse(what: str, failure: str) -> UserError:
        return UserError(f"{key}: {policy.config.model_type} cannot be {what}: {failure}")

    def words(error: Exception) -> str:
        """The error in words, with a possible cause if the numbers disagree."""
        return _failure(error) + (_because(policy, longest) if isinstance(error, DisagreementError) else "")

    # Any error that torch or transformers raises here means that the model cannot be used in this way.
    try:
        _check_plain(policy, max(prompts, key=len))
    except Exception as error:
        raise refuse("trained", words(error)) from error
    failure = ""  # of the slowest way, tried last
    for way in get_args(SamplingLayout):
        try:
            rollout = _sample(policy, prompts, limits, way)
            truth = _plain(policy, rollout)
            _compare(rollout.logprobs, truth.logprobs, rollout, "sampled")
            break
        except Exception as error:
            failure = words(error)
    else:
        raise refuse("sampled", failure)
    for packing in (True, False):
        try:
            scored = _scored(policy, rollout, packing, gradient_checkpointing)
            gap = _compare(scored.logprobs, truth.logprobs, rollout, "scored")
            _compare_gradients(scored.gradient, truth.gradient)
            break
        except Exception as error:
            failure = words(error)
    else:
        raise refuse("scored", failure)
    layout = Layout(way, packing)
    if bfloat16:
        try:
            _check_bfloat16(policy, rollout, truth, layout, prompts, limits, gradient_checkpointing)
        except Exception as error:
            raise refuse("trained in bfloat16", f"{words(error)}; precision: float32 would do") from error
    why = "" if layout == Layout() else _because(policy, longest)
    return layout, f"{layout}{why}; log-probabilities within {gap:.0e} nats of the model's own forward pass"


class DisagreementError(Exception):
    """The model computes something else than its plain forward pass."""


@dataclass(frozen=True)
class _Pass:
    logprobs: Tensor  # [N, T] zero behind the ends
    gradient: list[Tensor]  # of the sum of `_weights` times logprobs, one for each trained parameter


@contextmanager
def _probable(policy: PreTrainedModel, never: Sequence[int], often: Sequence[int]) -> Iterator[None]:
    """Inside, in each call of the policy, the tokens `never` have probability 0, and the tokens `often` together have
    probability 1/4, in equal parts."""

    def hook(_module: torch.nn.Module, _inputs: Any, output: Any) -> Any:
        logits = output.logits
        known = range(logits.shape[-1])  # a file may name a token that the model does not have
        banned, raised = (
            torch.tensor([i for i in ids if i in known], device=logits.device, dtype=torch.long)
            for ids in (never, often)
        )
        logits = logits.index_fill(-1, banned, -1e4)
        if len(raised):
            rest = logits.index_fill(-1, raised, -1e4).float().logsumexp(-1, keepdim=True)
            share = (rest - math.log(3 * len(raised))).to(logits.dtype)
            logits = logits.index_copy(-1, raised, share.expand(*logits.shape[:-1], len(raised)))
        output.logits = logits
        return output

    handle = policy.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _check_plain(policy: PreTrainedModel, prompt: list[int]) -> None:
    """Raises DisagreementError unless predictions are finite, repeatable and independent of later tokens."""
    with torch.no_grad():
        ids = torch.tensor([prompt * 2 if len(prompt) < 2 else prompt], device=policy.device)
        logits, again, part = (policy(input_ids=x, use_cache=False).logits[0] for x in (ids, ids, ids[:, :-1]))
    if not torch.isfinite(logits).all():
        raise DisagreementError("its own forward pass gives numbers that are not finite")
    if not torch.equal(logits, again):
        raise DisagreementError("its own forward pass gives other numbers each time")
    if not torch.allclose(logits[:-1], part, rtol=1e-2, atol=1e-2):
        raise DisagreementError(
            "its predictions depend on the tokens that follow, so it is no causal LM (is it `is_decoder`?)"
        )


def _sample(
    policy: PreTrainedModel, prompts: list[list[int]], limits: list[int], way: SamplingLayout, half: bool = False
) -> Rollout:
    """SAMPLES completions of each prompt, none of which ends before its limit."""
    # any numbers in [0, 1) will do: the multiples of the golden ratio lie evenly
    numbers = torch.arange(SAMPLES * len(prompts) * max(limits), dtype=torch.float64) * 0.6180339887498949 % 1
    uniforms = numbers.view(-1, max(limits))
    ids, mask = pad_prompts(prompts, prompts[0][0], policy.device)
    model, never = bf16_copy(policy) if half else policy, (-1,)  # no token ends a completion
    limit = torch.tensor(limits, device=policy.device)
    return sample(model, ids, mask, limit, uniforms.to(policy.device), never, layout=way)


def _plain(policy: PreTrainedModel, rollout: Rollout) -> _Pass:
    """The plain forward pass, each sequence by itself."""
    policy.zero_grad()
    weights, logprobs = _weights(rollout), torch.zeros_like(rollout.logprobs)
    for i, length in enumerate(rollout.lengths.tolist()):
        prompt, completion = rollout.prompt_ids[i][rollout.prompt_mask[i]], rollout.completions[i, :length]
        logits = policy(input_ids=torch.cat([prompt, completion])[None], use_cache=False).logits[0]
        found = logits[len(prompt) - 1 : -1].float().log_softmax(-1).gather(1, completion[:, None]).squeeze(1)
        (found * weights[i, :length]).sum().backward()
        logprobs[i, :length] = found.detach()
    return _Pass(logprobs, _taken_gradient(policy))


def _scored(policy: PreTrainedModel, rollout: Rollout, packing: bool, gradient_checkpointing: bool) -> _Pass:
    """All sequences as training scores them."""
    policy.zero_grad()
    with activation_checkpointing(policy, gradient_checkpointing):
        inputs = rollout.prompt_ids, rollout.prompt_mask, rollout.completions
        logprobs = score(policy, *inputs, lengths=rollout.lengths, packing=packing).logprobs
        with torch.autocast(policy.device.type, enabled=False):
            (logprobs * _weights(rollout)).sum().backward()
    return _Pass(logprobs.detach(), _taken_gradient(policy))


def _weights(rollout: Rollout) -> Tensor:
    """[N, T] a different weight for each token, of both signs: swapped tokens would show; zero behind the ends."""
    drawn = torch.arange(rollout.completions.numel(), device=rollout.lengths.device).view_as(rollout.completions).cos()
    return drawn * rollout.completion_mask


def _taken_gradient(policy: PreTrainedModel) -> list[Tensor]:
    gradient = [p.grad if p.grad is not None else torch.zeros_like(p) for p in policy.parameters() if p.requires_grad]
    policy.zero_grad()
    return gradient


def _check_bfloat16(
    policy: PreTrainedModel,
    rollout: Rollout,
    truth: _Pass,
    layout: Layout,
    prompts: list[list[int]],
    limits: list[int],
    gradient_checkpointing: bool,
) -> None:
    """Raises DisagreementError where the layout in bfloat16 is farther from the plain pass in float32 than rounding
    explains: HALF_FACTOR times the error of the plain pass in bfloat16, and a constant more. Leaves the policy rounded.
    """
    cast_frozen_bf16(policy)
    half = torch.autocast(policy.device.type, torch.bfloat16)
    with half:
        plain = _plain(policy, rollout)
        scored = _scored(policy, rollout, layout.packing, gradient_checkpointing)
    mask = rollout.completion_mask
    nats = HALF_NATS + HALF_FACTOR * _mean_gap(plain.logprobs, truth.logprobs, mask)
    _compare_means(scored.logprobs, truth.logprobs, mask, nats, "scored")
    share = HALF_GRADIENT + HALF_FACTOR * _relative(plain.gradient, truth.gradient)
    _compare_gradients(scored.gradient, truth.gradient, share)
    # compared on the tokens that are sampled in bfloat16, which may be others
    sampled = _sample(policy, prompts, limits, layout.sampling, half=True)
    with half:
        plain = _plain(policy, sampled)
    _compare_means(sampled.logprobs, plain.logprobs, sampled.completion_mask, nats, "sampled")


def _compare(found: Tensor, truth: Tensor, rollout: Rollout, what: str) -> float:
    """The largest difference. Raises DisagreementError where one is beyond what is allowed."""
    off = (found - truth)[rollout.completion_mask].abs()
    allowed = NATS + RELATIVE * truth[rollout.completion_mask].abs()
    if not (off <= allowed).all():  # NaN too
        worst = int((off - allowed).nan_to_num(torch.inf).argmax())
        raise DisagreementError(
            f"log-probabilities {what} differ from its own forward pass by {off[worst]:.2g} nats "
            f"(allowed: {allowed[worst]:.1g})"
        )
    return off.max().item()


def _compare_means(found: Tensor, truth: Tensor, mask: Tensor, allowed: float, what: str) -> None:
    """Raises DisagreementError where log-probabilities in bfloat16 are on average farther from the truth than allowed.
    The mean counts, since rounding alone may send a token another way, as to another expert."""
    if not (off := _mean_gap(found, truth, mask)) <= allowed:
        raise DisagreementError(
            f"log-probabilities {what} in bfloat16 differ from its own forward pass by {off:.2g} nats a token "
            f"(allowed: {allowed:.2g})"
        )


def _mean_gap(found: Tensor, truth: Tensor, mask: Tensor) -> float:
    return (found - truth)[mask].abs().mean().item()


def _compare_gradients(found: list[Tensor], truth: list[Tensor], share: float = GRADIENT) -> None:
    if not (off := _relative(found, truth)) <= share:
        raise DisagreementError(
            f"the gradient differs from that of its own forward pass by {off:.1%} (allowed: {share:.1%})"
        )


def _relative(found: list[Tensor], truth: list[Tensor]) -> float:
    """The largest |found - truth| / (|truth| + |all of truth| / 100) of a parameter, L2."""
    norms = torch.stack([torch.linalg.vector_norm(t) for t in truth])
    off = torch.stack([torch.linalg.vector_norm(f - t) for f, t in zip(found, truth, strict=True)])
    return (off / (norms + torch.linalg.vector_norm(norms) / 100)).max().item()


def _because(policy: PreTrainedModel, longest: int) -> str:
    """Known properties of the model that may be the cause, such as ` (it keeps a recurrent state)`."""
    config = policy.config.get_text_config()
    settings = {**policy.config.to_dict(), **config.to_dict()}
    kinds = [str(kind) for name in ("layer_types", "layers_block_type") for kind in settings.get(name) or ()]
    causes = []
    if any(sign in word for word in [*settings, *kinds, config.model_type] for sign in RECURRENT):
        causes.append("it keeps a recurrent state")
    if settings.get("alibi") or "'alibi': True" in str(settings.get("attn_config")):
        causes.append("its attention goes by distance (ALiBi)")
    elif not takes(policy, "position_ids"):
        causes.append("it takes no position_ids")
    windows = {name: settings.get(name) for name in WINDOWS}
    causes += [f"{name} is {size}" for name, size in windows.items() if type(size) is int and size < longest]
    rope = settings.get("rope_parameters") or {}
    start = settings.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    if rope.get("rope_type") == "longrope" and type(start) is int and start < longest:
        causes.append(f"its positions change for sequences beyond {start} tokens (longrope)")
    return f" ({', '.join(causes)})" if causes else ""


def _failure(error: Exception) -> str:
    """An error in words. Raises it again if memory ran out, which says nothing about how a model computes."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        raise error
    text = cut(one_line(str(error)), 200)
    return text if isinstance(error, DisagreementError) else f"{type(error).__name__}: {text}"
