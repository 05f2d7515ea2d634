"""Sampling completions from a causal LM: one prefill per prompt, its cache shared by the samples of the group.

B prompts, G samples a prompt, N = B * G, P prompt tokens (left-padded), T completion tokens, V vocabulary.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

CDF_BLOCK = 256  # vocabulary entries summed together before the first look-up


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


def inverse_cdf(logits: Tensor, uniforms: Tensor) -> Tensor:
    """The token i of each row with F(i - 1) <= u < F(i), where F is the cumulative softmax.

    Exact, with one uniform number a row; looks first for the block of CDF_BLOCK entries, then inside it, so that
    nothing cumulative of the vocabulary's size is made. logits [N, V], uniforms [N] float64 in [0, 1) -> [N] int64.
    """
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    weights = torch.nn.functional.pad(weights, (0, -weights.shape[-1] % CDF_BLOCK))
    blocks = weights.unflatten(-1, (-1, CDF_BLOCK))
    block_mass = blocks.sum(-1, dtype=torch.float64)  # [N, V / CDF_BLOCK]
    block, rest = _search(block_mass, uniforms * block_mass.sum(-1))
    inside = blocks[torch.arange(len(block), device=block.device), block].double()  # [N, CDF_BLOCK]
    return (block * CDF_BLOCK + _search(inside, rest)[0]).clamp(max=logits.shape[-1] - 1)  # NaN: see _search


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
    model: PreTrainedModel,
    prompt_ids: Tensor,  # [B, P] left-padded
    prompt_mask: Tensor,  # [B, P] True = a token of the prompt
    limits: Tensor,  # [B] tokens that a completion of each prompt may have, at least 1
    uniforms: Tensor,  # [N, T] float64 in [0, 1): all the randomness there is
    eos: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Rollout:
    """Samples G = N / B completions a prompt from softmax(logits / temperature), truncated by top-k and top-p."""
    group = len(uniforms) // len(prompt_ids)
    output = model(
        input_ids=prompt_ids, attention_mask=prompt_mask.long(), position_ids=positions(prompt_mask),
        use_cache=True, logits_to_keep=1,
    )  # fmt: skip
    cache = output.past_key_values
    cache.batch_repeat_interleave(group)
    logits = output.logits[:, -1].repeat_interleave(group, 0)
    prompt_ids, mask = prompt_ids.repeat_interleave(group, 0), prompt_mask.repeat_interleave(group, 0)
    limits, position = limits.repeat_interleave(group, 0), mask.sum(1)

    done = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    lengths = torch.zeros_like(limits)
    tokens, sampled, full = [], [], []
    for t in range(int(limits.max())):
        logits = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
        kept = truncate(logits, top_k, top_p)
        token = inverse_cdf(kept, uniforms[:, t]).masked_fill(done, eos)
        tokens.append(token)
        chosen = logits.gather(1, token[:, None]).squeeze(1)
        full.append(chosen - logits.logsumexp(-1))
        sampled.append(full[-1] if kept is logits else chosen - kept.logsumexp(-1))
        lengths += ~done
        done = done | (token == eos) | (lengths >= limits)
        if done.all():
            break
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        output = model(
            input_ids=token[:, None], attention_mask=mask.long(), position_ids=(position + t)[:, None],
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        logits = output.logits[:, -1]
    return Rollout(
        prompt_ids=prompt_ids, prompt_mask=prompt_mask.repeat_interleave(group, 0), completions=torch.stack(tokens, 1),
        lengths=lengths, sampler_logprobs=torch.stack(sampled, 1), logprobs=torch.stack(full, 1),
    )  # fmt: skip


def positions(mask: Tensor) -> Tensor:
    """Position of each token in its own sequence, whatever the padding before it. [N, L] bool -> [N, L] int64."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
