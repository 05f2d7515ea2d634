"""Teacher-forced log-probabilities of completions.

N completions, P prompt tokens (left-padded), T completion tokens, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.config.schema import SamplingParams
from pipeline.models.logprobs import log_probabilities, upcast
from pipeline.models.packing import Rows, move, pack, pad_right
from pipeline.models.sampling import Rollout, truncate


@dataclass(frozen=True)
class Scores:
    """Log-probabilities in nats under softmax(logits / temperature). Zero behind the tokens that were scored."""

    logprobs: Tensor  # [N, T] of token t given what precedes it: log pi(y_t | x, y_<t)
    scored: Tensor  # [N, T] for the loss: the same, or shifted (the notebook's), or of the truncated softmax
    entropy: Tensor  # [N, T] of the full softmax at temperature 1


def score(
    model: PreTrainedModel,
    prompt_ids: Tensor,  # [N, P]
    prompt_mask: Tensor,  # [N, P] True = a token of the prompt
    completions: Tensor,  # [N, T]
    sampling_params: SamplingParams = SamplingParams(),
    alignment: Literal["correct", "shifted"] = "correct",
    *,
    lengths: Tensor | None = None,  # [N] tokens of each completion to score, its first ones; None = all T
    entropy_gradient: bool = False,
    packing: bool = True,
) -> Scores:
    """Scores completions. The gradient flows through both kinds of log-probabilities; `entropy_gradient`: also through
    the entropy.

    alignment: shifted scores token t by the prediction made after it. sampling_params: the distribution of `scored`. A
    truncated distribution always keeps the sampled token, since rounding may put it just outside.

    A prompt is computed once for consecutive completions of it. Tokens behind `lengths` are not computed, and logits
    only where they predict a token. packing: False computes each sequence in a row of its own, for models whose
    attention does not follow the mask and the positions that it is given.
    """
    size, device = completions.shape, completions.device
    given = [prompt_ids, prompt_mask.long(), completions, *([] if lengths is None else [lengths])]
    ids, inside, drawn, *ends = move(given, torch.device("cpu"))
    counts = ends[0].tolist() if ends else [size[1]] * size[0]
    # the last token of a completion predicts what comes after it, which only the notebook's alignment asks for
    fed = [max(count - (alignment == "correct"), 0) for count in counts]
    prompts = [row[mask].tolist() for row, mask in zip(ids, inside.bool(), strict=True)]
    inputs = [row[:count] for row, count in zip(drawn.tolist(), fed, strict=True)]
    layout = (pack if packing else pad_right)(prompts, inputs)
    wanted = torch.arange(size[1]) < torch.tensor(counts)[:, None]
    rows, columns = wanted.nonzero(as_tuple=True)  # [K]
    sources = layout.sources(rows, columns, "correct")  # [K]
    shifted = layout.sources(rows, columns, "shifted") if alignment == "shifted" else None
    positions, index = torch.cat([sources] if shifted is None else [sources, shifted]).unique(return_inverse=True)
    layout, moved = layout.with_others_on(device, rows, columns, drawn[rows, columns], positions, index)
    rows, columns, tokens, positions, index = moved
    logits = logits_at(model, layout, positions)

    def table(values: Tensor) -> Tensor:
        return torch.zeros(size, dtype=values.dtype, device=values.device).index_put((rows, columns), values)

    count = len(tokens)
    if shifted is None:
        plain, entropy = log_probabilities(logits, index, tokens, sampling_params.temperature)
        logprobs = scored = table(plain)
        if sampling_params.top_k > 0 or sampling_params.top_p < 1:
            scored = table(_truncated(logits, index, tokens, sampling_params))
    else:
        both, entropy = log_probabilities(logits, index, tokens.repeat(2), sampling_params.temperature)
        logprobs, scored = table(both[:count]), table(both[count:])
    entropy = table(entropy[index[:count]])
    return Scores(logprobs, scored, entropy if entropy_gradient else entropy.detach())


def logits_at(model: PreTrainedModel, rows: Rows, positions: Tensor) -> Tensor:
    """Logits [M, V] at flat positions [M] of rows [R, L], and only there."""
    given, mask = {}, rows.mask
    if mask is not None:
        given = {"attention_mask": _attention_mask(model, mask), "position_ids": rows.positions}
    with _select_head_positions(model, positions) as seen:
        logits = model(input_ids=rows.ids, use_cache=False, **given).logits
    return logits.squeeze(0) if seen else logits.flatten(0, 1)[positions]


def _attention_mask(model: PreTrainedModel, mask: Tensor) -> Tensor:
    """The mask in the form that the model's attention takes: eager attention adds it to the scores."""
    if model.config._attn_implementation != "eager":
        return mask
    autocast = torch.is_autocast_enabled(mask.device.type)
    dtype = torch.get_autocast_dtype(mask.device.type) if autocast else model.dtype
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


@contextmanager
def _select_head_positions(model: PreTrainedModel, positions: Tensor) -> Iterator[list[bool]]:
    """Inside, the output embedding computes these flat positions [M] only: its input [R, L, H] becomes [1, M, H].

    A hook does this, since `logits_to_keep` takes the same positions of every row. What a model does with its logits (a
    cap, a scale) still applies. The list stays empty if the model does not call its output embedding as a module.
    """
    seen: list[bool] = []

    def choose(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        seen.append(True)
        return (inputs[0].flatten(0, 1)[positions][None],)

    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(choose) if head is not None else None
    try:
        yield seen
    finally:
        if handle is not None:
            handle.remove()


@torch.no_grad()
def score_microbatched(
    model: PreTrainedModel, rollout: Rollout, micro_batch: int, temperature: float = 1.0, packing: bool = True
) -> Scores:
    """`score` of a rollout up to its completions' ends, a micro-batch at a time. No gradient."""
    parts = []
    for start in range(0, len(rollout.completions), micro_batch):
        rows = slice(start, start + micro_batch)
        inputs = rollout.prompt_ids[rows], rollout.prompt_mask[rows], rollout.completions[rows]
        lengths = rollout.lengths[rows]
        part = score(model, *inputs, SamplingParams(temperature), lengths=lengths, packing=packing)
        parts.append((part.logprobs, part.scored, part.entropy))
    return Scores(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _truncated(logits: Tensor, positions: Tensor, tokens: Tensor, sampling_params: SamplingParams) -> Tensor:
    """[K] log-probabilities under the sampler's truncated distribution, from logits [M, V]; keeps each token."""
    scaled = upcast(logits)[positions] / sampling_params.temperature
    kept = truncate(scaled, sampling_params)
    chosen = scaled.gather(1, tokens[:, None])
    kept = kept.scatter(1, tokens[:, None], chosen)
    return chosen.squeeze(1) - kept.logsumexp(-1)
