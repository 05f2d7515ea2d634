"""A key-value cache that grows by many tokens at a time. A cache that concatenates copies itself for each token."""

from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from pipeline.models.cache_size import own_keys

ROOM = 64  # tokens that a full buffer is enlarged by


def grow_in_steps(cache: Cache, most: int) -> None:
    """Replaces the layers that would concatenate by layers with room for further tokens, up to `most` tokens a
    sequence. Other kinds of layers (sliding windows, recurrent states) stay."""
    layers = own_keys(cache).layers
    for i, layer in enumerate(layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            layers[i] = GrowingLayer(layer, most)


class GrowingLayer(DynamicLayer):
    """The same keys and values [N, heads, tokens, size] as the layer that it replaces would hold."""

    def __init__(self, layer: DynamicLayer, most: int) -> None:
        super().__init__()
        assert layer.keys is not None
        assert layer.values is not None
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values
        self._keys, self._values = _Buffer(most), _Buffer(most)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        self.keys = self._keys.append(self.keys, key_states)
        self.values = self._values.append(self.values, value_states)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._keys.clear()
        self._values.clear()


class _Buffer:
    """A tensor with room for more tokens behind those in its view."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.clear()

    def clear(self) -> None:
        self.tensor: Tensor | None = None
        self.view: Tensor | None = None

    def append(self, held: Tensor, new: Tensor) -> Tensor:
        """Returns `held` followed by `new`. Copies `held` only if it is not the last view, or the buffer is full."""
        start, end = held.shape[-2], held.shape[-2] + new.shape[-2]
        if self.tensor is None or held is not self.view or end > self.tensor.shape[-2]:
            room = max(end, min(end + ROOM, self.most))
            self.tensor = held.new_empty(*held.shape[:-2], room, held.shape[-1])
            self.tensor[..., :start, :] = held
        self.tensor[..., start:end, :] = new
        self.view = self.tensor[..., :end, :]
        return self.view
