"""How many completions can be sampled at once: as many as a bounded key-value cache has room for."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# CPU: 1 GiB, less than the update of any policy takes whose cache gets so large. GPU: 4 GiB, a sixth of a 24 GiB card.
# A GPU reads all weights for each token, whatever the number of completions, so few completions at once are slow.
CACHE_BYTES = {"cpu": 2**30, "cuda": 2**32}


def completions_at_once(model: Callable[..., Any], prompt: Tensor, tokens: int, placed: bool) -> int:
    """Completions whose cache takes at most CACHE_BYTES when each has `tokens` tokens, prompt included; at least one.
    prompt [P], placed: see `sequence_bytes`."""
    bound = CACHE_BYTES["cpu" if prompt.device.type == "cpu" else "cuda"]
    return max(1, int(bound // max(1, sequence_bytes(model, prompt, tokens, placed))))


def sequence_bytes(model: Callable[..., Any], prompt: Tensor, tokens: int, placed: bool) -> int:
    """Bytes of the cache of one sequence of `tokens` tokens.

    Measured as c(P) + (tokens - P) (c(P + 1) - c(P)), c(P) being the cache of a prompt [P]. So it holds for keys and
    values of any number of heads and precision, and for a recurrent state, which does not grow. A sliding window takes
    less.
    placed: whether the model is given a mask and positions.
    """

    def call(ids: Tensor, end: int, cache: Any = None) -> Any:
        places = torch.arange(end - len(ids), end, device=ids.device)[None]
        where = {"attention_mask": places.new_ones(1, end), "position_ids": places} if placed else {}
        more = {} if cache is None else {"past_key_values": cache}
        return model(input_ids=ids[None], use_cache=True, **where, **more).past_key_values

    cache = call(prompt, len(prompt))
    of_prompt = cache_bytes(cache)
    of_token = cache_bytes(call(prompt[-1:], len(prompt) + 1, cache)) - of_prompt
    return of_prompt + (tokens - len(prompt)) * of_token


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors of a cache of transformers, whose layers keep them as attributes, or of nested tuples."""
    cache = own_keys(cache)
    held = [vars(layer) for layer in cache.layers] if hasattr(cache, "layers") else cache
    return sum(leaf.nbytes for leaf in tree_leaves(held) if isinstance(leaf, torch.Tensor))


def own_keys(cache: Any) -> Any:
    """The cache itself, or the part for its own tokens if the model is a decoder that could have an encoder."""
    return getattr(cache, "self_attention_cache", cache)
