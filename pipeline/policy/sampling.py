"""Sampling completions from a causal LM: one prefill per prompt, its cache shared by the samples of the group.

B prompts, G samples a prompt, N = B * G, P prompt tokens (left-padded), T completion tokens, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.policy.vocabulary import precise, slices

CDF_BLOCK = 128  # vocabulary entries summed together before the first look-up; divides Pythia's 50,304
SAMPLED_AT_ONCE = 512  # completions
COMPACT_BELOW = 7 / 8  # of the rows are running: then the others leave the cache


@dataclass(frozen=True)
class Rollout:
    """N completions, prompt-major: rows b * G ... b * G + G - 1 belong to prompt b."""

    prompt_ids: Tensor  # [N, P] int64, left-padded
    prompt_mask: Tensor  # [N, P] bool, True = a token of the prompt
    completions: Tensor  # [N, T] int64, filled with EOS behind the end
    lengths: Tensor  # [N] int64, tokens up to and including the first EOS
    sampler_logprobs: Tensor  # [N, T] nats under the distribution that was sampled
    logprobs: Tensor  # [N, T] nats under softmax(logits / temperature), not truncated

    @property
    def completion_mask(self) -> Tensor:
        """[N, T] True = up to and including the first EOS. From lengths, never from ids: EOS is also the filler."""
        return torch.arange(self.completions.shape[1], device=self.lengths.device) < self.lengths[:, None]

    def take(self, rows: Tensor) -> "Rollout":
        """The completions at these indices [n]."""
        return Rollout(**{field.name: getattr(self, field.name)[rows] for field in dataclasses.fields(self)})

    def ended(self, eos: int) -> Tensor:
        """[N] True = the completion ended by itself, with EOS."""
        return self.completions.gather(1, self.lengths[:, None] - 1).squeeze(1) == eos


def pad_prompts(prompts: list[list[int]], filler: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token lists -> (ids [B, P], mask [B, P]), left-padded so that completions start in one column."""
    width = max(map(len, prompts))
    ids = torch.tensor([[filler] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts], device=device)
    return ids, mask


def truncate(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Sets to -inf what top-k and then top-p (nucleus; Holtzman et al., arXiv 1904.09751) leave out. [N, V]."""
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # mass of the more likely tokens
        out = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(out, -torch.inf)
    return logits


def inverse_cdf(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The token i of each row with F(i - 1) <= u < F(i), where F is the cumulative softmax; and log sum exp of the row.

    Exact, with one uniform number a row; looks first for the block of CDF_BLOCK entries, then inside it, so that
    nothing cumulative of the vocabulary's size is made. logits [N, V], uniforms [N] float64 in [0, 1) -> [N] int64, [N].
    """
    top = logits.amax(-1, keepdim=True)
    weights = (logits - top).exp_()
    if excess := -weights.shape[-1] % CDF_BLOCK:
        weights = torch.nn.functional.pad(weights, (0, excess))
    blocks = weights.unflatten(-1, (-1, CDF_BLOCK))
    block_mass = blocks.sum(-1, dtype=torch.float64)  # [N, V / CDF_BLOCK]
    mass = block_mass.sum(-1)
    block, rest = _search(block_mass, uniforms * mass)
    inside = blocks[torch.arange(len(block), device=block.device), block].double()  # [N, CDF_BLOCK]
    token = (block * CDF_BLOCK + _search(inside, rest)[0]).clamp(max=logits.shape[-1] - 1)  # NaN: see _search
    return token, mass.log().to(logits.dtype) + top.squeeze(-1)


def _search(mass: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """First index whose cumulative mass exceeds `goal`, and what is left of `goal` before it. An entry without mass is
    never chosen, also where rounding puts the goal at the very end."""
    cumulative = mass.cumsum(-1)
    goal = torch.minimum(goal, cumulative[:, -1] * (1 - 1e-15))
    # the clamp is for NaN, which no comparison finds: its logprob, NaN too, then stops the run in an orderly way
    index = torch.searchsorted(cumulative, goal[:, None], right=True).clamp(max=mass.shape[1] - 1)
    # rounding can leave a hair less than nothing, and would then choose a first entry without mass
    return index.squeeze(1), (goal - (cumulative - mass).gather(1, index).squeeze(1)).clamp(min=0)


@torch.no_grad()
def sample(
    model: Callable[..., Any],  # a causal LM
    prompt_ids: Tensor,  # [B, P] left-padded
    prompt_mask: Tensor,  # [B, P] True = a token of the prompt
    limits: Tensor,  # [B] tokens that a completion of each prompt may have, at least 1
    uniforms: Tensor,  # [N, T] float64 in [0, 1): all the randomness there is
    eos: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Rollout:
    """Samples G = N / B completions a prompt from softmax(logits / temperature), truncated by top-k and top-p.

    Prompts of like length go together, SAMPLED_AT_ONCE completions at a time: a larger batch takes no more memory.
    """
    group = len(uniforms) // len(prompt_ids)
    prompt_lengths = prompt_mask.sum(1)
    # a stable order, the same whatever the device
    order = sorted(
        range(len(prompt_ids)), key=list(zip(limits.tolist(), prompt_lengths.tolist(), strict=True)).__getitem__
    )
    at_once, parts, places = max(1, SAMPLED_AT_ONCE // group), [], []
    for start in range(0, len(order), at_once):
        chosen = torch.tensor(order[start : start + at_once], device=prompt_ids.device)
        rows = (chosen[:, None] * group + torch.arange(group, device=chosen.device)).flatten()
        width = int(prompt_lengths[chosen].max())
        parts.append(
            _complete(
                model,
                prompt_ids[chosen, -width:],
                prompt_mask[chosen, -width:],
                limits[chosen].repeat_interleave(group),
                uniforms[rows],
                eos,
                partial(draw, temperature, top_k, top_p),
            )
        )
        places.append(rows)
    longest = max(part[0].shape[1] for part in parts)
    back = torch.cat(places).argsort()
    completions, sampled, full = (
        torch.cat([F.pad(part[k], (0, longest - part[k].shape[1]), value=filler) for part in parts])[back]
        for k, filler in enumerate((eos, 0.0, 0.0))
    )
    return Rollout(
        prompt_ids.repeat_interleave(group, 0), prompt_mask.repeat_interleave(group, 0), completions,
        lengths=torch.cat([part[3] for part in parts])[back], sampler_logprobs=sampled, logprobs=full,
    )  # fmt: skip


def draw(temperature: float, top_k: int, top_p: float, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, ...]:
    """Tokens [n] by inverse CDF, their log-probabilities under what was sampled and under the full softmax. [n, V], [n].

    A few rows at a time, which stay in the processor's cache.
    """
    parts = []
    for rows in slices(logits):
        part = precise(logits[rows])
        part = part if temperature == 1 else part / temperature
        kept = truncate(part, top_k, top_p)
        token, log_sum = inverse_cdf(kept, uniforms[rows])
        chosen = part.gather(1, token[:, None]).squeeze(1)
        full = log_sum if kept is part else part.logsumexp(-1)
        parts.append((token, chosen - log_sum, chosen - full))
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))


def _complete(
    model: Callable[..., Any], prompt_ids: Tensor, prompt_mask: Tensor, limits: Tensor, uniforms: Tensor, eos: int,
    choose: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(completions, sampler_logprobs, logprobs [n, T], lengths [n]) of n = len(limits) completions, prompt-major."""
    group = len(limits) // len(prompt_ids)
    output = model(
        input_ids=prompt_ids, attention_mask=prompt_mask.long(), position_ids=positions(prompt_mask),
        use_cache=True, logits_to_keep=1,
    )  # fmt: skip
    cache = output.past_key_values
    cache.batch_repeat_interleave(group)
    logits, mask = output.logits[:, -1].repeat_interleave(group, 0), prompt_mask.repeat_interleave(group, 0)
    position = mask.sum(1)
    present = torch.arange(len(limits), device=limits.device)  # which completion each row of the cache belongs to
    running = torch.ones_like(present, dtype=torch.bool)  # rows that have not ended
    completions = torch.full((len(limits), int(limits.max())), eos, device=limits.device)
    lengths = torch.zeros_like(limits)
    sampled: Tensor | None = None
    for t in range(completions.shape[1]):
        token, of_sampler, of_softmax = choose(logits, uniforms[present, t])
        if sampled is None:
            sampled, full = (of_softmax.new_zeros(completions.shape) for _ in range(2))
        going = present[running]
        completions[going, t] = token[running]
        sampled[going, t], full[going, t] = of_sampler[running], of_softmax[running]
        lengths[going] = t + 1
        running = running & (token != eos) & (t + 1 < limits[present])
        left = int(running.sum())
        if left == 0:
            break
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        if left <= COMPACT_BELOW * len(running):  # what has ended stops costing
            stay = running.nonzero().squeeze(1)
            cache.batch_select_indices(stay)
            present, running, token, mask = present[stay], running[stay], token[stay], mask[stay]
        output = model(
            input_ids=token[:, None], attention_mask=mask.long(), position_ids=(position[present] + t)[:, None],
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        logits = output.logits[:, -1]
    assert sampled is not None
    return completions[:, : t + 1], sampled[:, : t + 1], full[:, : t + 1], lengths


def positions(mask: Tensor) -> Tensor:
    """Position of each token in its own sequence, whatever the padding before it. [N, L] bool -> [N, L] int64."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
