"""Sampling completions from a causal LM: one prefill per prompt, its cache shared by the samples of the group.

B prompts, G samples a prompt, N = B * G, P prompt tokens (left-padded), T completion tokens, V vocabulary.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.schema import SamplingParams
from pipeline.models.cache_size import completions_at_once
from pipeline.models.growing_cache import grow_in_steps
from pipeline.models.logprobs import row_slices, upcast
from pipeline.models.stop_strings import Stopped

SamplingLayout = Literal["left_padding", "equal_lengths", "no_cache"]
CDF_BLOCK = 128  # vocabulary entries summed together before the first look-up; divides Pythia's 50,304
SAMPLED_AT_ONCE = 512  # completions at most, see also `completions_at_once`: more are no faster
COMPACT_BELOW = 7 / 8  # when this share of the rows or less is running, the ended rows leave the cache


@dataclass(frozen=True)
class Rollout:
    """N completions, prompt-major: rows b * G ... b * G + G - 1 belong to prompt b."""

    prompt_ids: Tensor  # [N, P] int64, left-padded
    prompt_mask: Tensor  # [N, P] bool, True = a token of the prompt
    completions: Tensor  # [N, T] int64, filled with EOS behind the end
    lengths: Tensor  # [N] int64, tokens up to and including the end: the first end-of-text token, or what stopped it
    sampler_logprobs: Tensor  # [N, T] nats under the distribution that was sampled
    logprobs: Tensor  # [N, T] nats under softmax(logits / temperature), not truncated

    @property
    def completion_mask(self) -> Tensor:
        """[N, T] True = up to and including the first end. From lengths, never from ids: EOS is also the filler."""
        return torch.arange(self.completions.shape[1], device=self.lengths.device) < self.lengths[:, None]

    def text_mask(self, eos: Sequence[int]) -> Tensor:
        """[N, T] True = a token of the text: `completion_mask` without the end-of-text token, one of `eos`."""
        text = self.lengths - self.ended(eos).long()
        return torch.arange(self.completions.shape[1], device=self.lengths.device) < text[:, None]

    def take(self, rows: Tensor) -> "Rollout":
        """The completions at these indices [n]."""
        return Rollout(**{field.name: getattr(self, field.name)[rows] for field in dataclasses.fields(self)})

    def token_lists(self) -> list[list[int]]:
        """The tokens of each completion, up to and including what ends it."""
        rows = zip(self.completions.tolist(), self.lengths.tolist(), strict=True)
        return [tokens[:length] for tokens, length in rows]

    def ended(self, eos: Sequence[int]) -> Tensor:
        """[N] True = the completion ended with one of the end-of-text ids `eos`."""
        last = self.completions.gather(1, self.lengths[:, None] - 1).squeeze(1)
        return torch.isin(last, torch.tensor(eos, device=last.device))


def pad_prompts(prompts: list[list[int]], filler: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token lists -> (ids [B, P], mask [B, P]), left-padded so that completions start in one column."""
    width = max(map(len, prompts))
    ids = torch.tensor([[filler] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts], device=device)
    return ids, mask


def truncate(logits: Tensor, sampling_params: SamplingParams) -> Tensor:
    """Sets to -inf what top-k and then top-p (nucleus; Holtzman et al., arXiv 1904.09751) leave out. [N, V]."""
    top_k, top_p = sampling_params.top_k, sampling_params.top_p
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = cumulative(ordered.softmax(-1)) - ordered.softmax(-1)  # mass of the more likely tokens
        out = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(out, -torch.inf)
    return logits


def inverse_cdf(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The token i of each row with F(i - 1) <= u < F(i), where F is the cumulative softmax; and log sum exp of the row.

    Exact, with one uniform number a row. Finds the block of CDF_BLOCK entries first, then the entry inside it, so that
    no cumulative sum of the vocabulary's size is needed. logits [N, V], uniforms [N] float64 -> [N] int64, [N].
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
    never chosen, even if rounding puts the goal at the very end."""
    up_to = cumulative(mass)
    goal = torch.minimum(goal, up_to[:, -1] * (1 - 1e-15))
    # the clamp is for NaN, which no comparison finds: the token's logprob is NaN too, and stops the run properly
    index = torch.searchsorted(up_to, goal[:, None], right=True).clamp(max=mass.shape[1] - 1)
    # rounding can leave slightly less than 0, which would choose a first entry without mass
    return index.squeeze(1), (goal - (up_to - mass).gather(1, index).squeeze(1)).clamp(min=0)


def cumulative(mass: Tensor) -> Tensor:
    """Sums of each row's first 1, 2, 3, ... entries, [n, K]. CUDA's cumsum adds in no fixed order, so on a GPU
    each entry repeatedly adds the one 1, 2, 4, ... places before it (Hillis & Steele, 1986)."""
    if mass.device.type == "cpu":
        return mass.cumsum(-1)
    return doubling_sums(mass)


def doubling_sums(mass: Tensor) -> Tensor:
    """`cumulative` in log2(K) additions, whose order is always the same."""
    distance = 1
    while distance < mass.shape[-1]:
        mass = mass + F.pad(mass[..., :-distance], (distance, 0))
        distance *= 2
    return mass


@torch.no_grad()
def sample(
    model: Callable[..., Any],  # a causal LM
    prompt_ids: Tensor,  # [B, P] left-padded
    prompt_mask: Tensor,  # [B, P] True = a token of the prompt
    limits: Tensor,  # [B] tokens that a completion of each prompt may have, at least 1
    uniforms: Tensor,  # [N, T] float64 in [0, 1): all the randomness there is
    eos: Sequence[int],  # end-of-text ids; the first one fills the places behind a completion's end
    sampling_params: SamplingParams = SamplingParams(),
    layout: SamplingLayout = "left_padding",
    stopped: Stopped | None = None,  # called after each token: does a stop string end the completion?
) -> Rollout:
    """Samples G = N / B completions a prompt.

    Prompts of similar length are sampled together. The bound on the cache and SAMPLED_AT_ONCE limit the completions at
    a time, so a larger batch or longer completions take no more memory.

    layout: left_padding puts prompts of any lengths together. equal_lengths feeds the model nothing but tokens, as in
    its plain forward pass; slower, for models whose masks or positions do not follow left padding. no_cache also
    does without the model's cache, and computes the whole sequence for each token.
    """
    group = len(uniforms) // len(prompt_ids)
    lengths, most = prompt_mask.sum(1).tolist(), limits.tolist()
    complete: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = _generate
    if layout != "left_padding":
        complete = partial(_generate_each_row, use_cache=layout == "equal_lengths")
    at_once = SAMPLED_AT_ONCE
    if layout != "no_cache" and len(uniforms) > 1:
        shortest, longest = lengths.index(min(lengths)), max(map(sum, zip(lengths, most, strict=True)))
        prompt = prompt_ids[shortest, -lengths[shortest] :]
        at_once = min(at_once, completions_at_once(model, prompt, longest, placed=layout == "left_padding"))
    parts, places = [], []
    for chosen in _batches(most, lengths, max(1, at_once // group), layout):
        prompts = torch.tensor(chosen, device=prompt_ids.device)
        width = max(lengths[prompt] for prompt in chosen)
        for samples in torch.arange(group, device=prompts.device).split(at_once):  # one part unless a group is larger
            rows = (prompts[:, None] * group + samples).flatten()
            parts.append(
                complete(
                    model,
                    prompt_ids[prompts, -width:],
                    prompt_mask[prompts, -width:],
                    limits[prompts].repeat_interleave(len(samples)),
                    uniforms[rows],
                    eos,
                    partial(sample_tokens, sampling_params),
                    stopped,
                )
            )
            places.append(rows)
    columns = max(part[0].shape[1] for part in parts)
    back = torch.cat(places).argsort()
    completions, sampled, full = (
        torch.cat([F.pad(part[k], (0, columns - part[k].shape[1]), value=filler) for part in parts])[back]
        for k, filler in enumerate((eos[0], 0.0, 0.0))
    )
    return Rollout(
        prompt_ids.repeat_interleave(group, 0),
        prompt_mask.repeat_interleave(group, 0),
        completions,
        lengths=torch.cat([part[3] for part in parts])[back],
        sampler_logprobs=sampled,
        logprobs=full,
    )


def _batches(limits: list[int], lengths: list[int], at_once: int, layout: SamplingLayout) -> Iterator[list[int]]:
    """Indices of the prompts that are sampled together, at most `at_once` of them."""
    # a stable order, the same whatever the device
    order = sorted(range(len(lengths)), key=list(zip(limits, lengths, strict=True)).__getitem__)
    together: list[int] = []
    for prompt in order:
        fits = layout == "left_padding" or not together or lengths[prompt] == lengths[together[-1]]
        if len(together) == at_once or not fits:
            yield together
            together = []
        together.append(prompt)
    yield together


def sample_tokens(sampling_params: SamplingParams, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, ...]:
    """Tokens [n] by inverse CDF, their log-probabilities under the sampled distribution and under the full softmax.

    A few rows at a time, which stay in the processor's cache.
    """
    parts, temperature = [], sampling_params.temperature
    for rows in row_slices(logits):
        part = upcast(logits[rows])
        part = part if temperature == 1 else part / temperature
        kept = truncate(part, sampling_params)
        token, log_sum = inverse_cdf(kept, uniforms[rows])
        chosen = part.gather(1, token[:, None]).squeeze(1)
        full = log_sum if kept is part else part.logsumexp(-1)
        parts.append((token, chosen - log_sum, chosen - full))
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))


def _generate(
    model: Callable[..., Any],
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    limits: Tensor,
    uniforms: Tensor,
    eos: Sequence[int],
    choose: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    stopped: Stopped | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(completions, sampler_logprobs, logprobs [n, T], lengths [n]) of n = len(limits) completions, prompt-major."""
    group = len(limits) // len(prompt_ids)
    output = model(
        input_ids=prompt_ids,
        attention_mask=prompt_mask.long(),
        position_ids=positions(prompt_mask),
        use_cache=True,
        logits_to_keep=1,
    )
    cache = output.past_key_values
    cache.batch_repeat_interleave(group)
    found = _Completions(limits, eos, stopped)
    grow_in_steps(cache, prompt_ids.shape[1] + found.width)
    logits, mask = output.logits[:, -1].repeat_interleave(group, 0), prompt_mask.repeat_interleave(group, 0)
    position = mask.sum(1)
    for t in range(found.width):
        token, *logprobs = choose(logits, uniforms[found.present, t])
        found.add(t, token, *logprobs)
        left = int(found.running.sum())
        if left == 0:
            break
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        if left <= COMPACT_BELOW * len(found.running):  # completions that have ended leave the cache
            stay = found.running.nonzero().squeeze(1)
            cache.batch_select_indices(stay)
            found.keep(stay)
            token, mask = token[stay], mask[stay]
        output = model(
            input_ids=token[:, None],
            attention_mask=mask.long(),
            position_ids=(position[found.present] + t)[:, None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = output.logits[:, -1]
    return found.columns(t + 1)


def _generate_each_row(
    model: Callable[..., Any],
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    limits: Tensor,
    uniforms: Tensor,
    eos: Sequence[int],
    choose: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    stopped: Stopped | None,
    use_cache: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_generate`, for prompts of equal length. The model gets the new tokens and its own cache, which nothing else
    changes, or all tokens each time.

    So each sample has its own prefill, and completions that have ended are computed to the last step but not read.
    """
    ids = prompt_ids.repeat_interleave(len(limits) // len(prompt_ids), 0)
    last = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}
    found = _Completions(limits, eos, stopped)
    cache: dict[str, Any] = {}
    for t in range(found.width):
        output = model(input_ids=ids, use_cache=use_cache, **cache, **last)
        token, *logprobs = choose(output.logits[:, -1], uniforms[:, t])
        found.add(t, token, *logprobs)
        if not found.running.any():
            break
        if use_cache:
            ids, cache = token[:, None], {"past_key_values": output.past_key_values}
        else:
            ids = torch.cat([ids, token[:, None]], 1)
    return found.columns(t + 1)


class _Completions:
    """n completions as they grow, a token at a time."""

    def __init__(self, limits: Tensor, eos: Sequence[int], stopped: Stopped | None) -> None:
        self.limits, self.width = limits, int(limits.max())
        self.eos, self.stopped = torch.tensor(eos, device=limits.device), stopped
        self.present = torch.arange(len(limits), device=limits.device)  # the completion of each row of the cache
        self.running = torch.ones_like(self.present, dtype=torch.bool)  # rows that have not ended
        self.tokens = torch.full((len(limits), self.width), eos[0], device=limits.device)
        self.lengths = torch.zeros_like(limits)
        self.logprobs: list[Tensor] = []  # of the sampler, of the full softmax; created once their precision is known

    def add(self, t: int, token: Tensor, of_sampler: Tensor, of_softmax: Tensor) -> None:
        """Records token t of the rows that are running."""
        if not self.logprobs:
            self.logprobs = [of_softmax.new_zeros(self.tokens.shape) for _ in range(2)]
        # `where`, since the host would wait for a GPU to count the rows that are running
        for table, values in zip([self.tokens, *self.logprobs], [token, of_sampler, of_softmax], strict=True):
            table[self.present, t] = torch.where(self.running, values, table[self.present, t])
        self.lengths[self.present] = torch.where(self.running, t + 1, self.lengths[self.present])
        self.running = self.running & ~torch.isin(token, self.eos) & (t + 1 < self.limits[self.present])
        if self.stopped is not None:
            rows = self.running.nonzero().squeeze(1)
            stopped = self.stopped(self.tokens[self.present[rows], : t + 1].tolist())
            self.running[rows] = ~torch.tensor(stopped, dtype=torch.bool, device=rows.device)

    def keep(self, rows: Tensor) -> None:
        """Keeps only these rows of the cache."""
        self.present, self.running = self.present[rows], self.running[rows]

    def columns(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tokens, sampled, full = (table[:, :count] for table in (self.tokens, *self.logprobs))
        return tokens, sampled, full, self.lengths


def takes(model: Callable[..., Any], argument: str) -> bool:
    """Whether a model's forward pass has an argument of this name."""
    return argument in inspect.signature(getattr(model, "forward", model)).parameters


def positions(mask: Tensor) -> Tensor:
    """Position of each token in its own sequence, whatever the padding before it. [N, L] bool -> [N, L] int64."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
