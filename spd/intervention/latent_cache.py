"""Cache layers that keep latents: r numbers a token in place of d.

They stand in a transformers cache where a dense layer stood, so that whatever a cache can do (grow, be reordered by
beam search, cropped by assisted decoding, repeated, offloaded, deep-copied) is inherited or done alike.
"""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer

from spd.errors import InputError

if TYPE_CHECKING:
    from spd.intervention.latent import LatentLayerState

# A full buffer grows by a sixty-fourth of itself and at least so many tokens: little is spare, and a token added costs
# the copying of sixty-four.
GROWTH, LEAST_GROWTH = 64, 16


class _LatentLayer(CacheLayerMixin):
    """What the growing and the static layer share.

    Attributes:
        keys: (B, kv_heads, T, head_dim), projected and rotated, under "latent_v"; (B, 1, T, r_k) under "latent".
        values: (B, 1, T, r_v).
        positions: rotary position of every token, (B, 1, T, 1) int32, kept once a cache: in its first latent layer.
    """

    positions: Tensor | None = None
    device: torch.device
    _tensors = ("keys", "values", "positions")

    def __init__(self, state: LatentLayerState, first: _LatentLayer | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.state = state
        self.first = first  # the layer that keeps the positions, None if this one does

    def cached_positions(self) -> Tensor | None:
        """(B, T) int32; None under "latent_v", whose keys are rotated already."""
        kept = self.positions if self.first is None else self.first.positions
        # Where a model is spread over devices, the first layer may be on another one.
        return None if kept is None else kept[:, 0, :, 0].to(self.device)

    def room(self, new: int) -> int:
        """How many positions there can be once `new` more tokens are cached."""
        raise NotImplementedError

    def _new(self, key_states: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The new tokens as they are stored: keys, values, positions."""
        latent_k, latent_v, positions = self.state.take()
        keys = key_states if latent_k is None else latent_k[:, None]
        kept = None
        if latent_k is not None and self.first is None:
            kept = positions.to(torch.int32).expand(keys.shape[0], -1)[:, None, :, None]
        return keys, latent_v[:, None], kept

    def _change(self, change: Any) -> None:
        for name in self._tensors:
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, change(tensor))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Tensors are copied, the model's attention that the layer belongs to is not."""
        twin = copy(self)
        memo[id(self)] = twin
        if self.first is not None:
            twin.first = memo.get(id(self.first), self.first)
        twin._change(torch.clone)
        if isinstance(getattr(self, "cumulative_length", None), Tensor):
            twin.cumulative_length = self.cumulative_length.clone()  # type: ignore[attr-defined]
        return twin


class LatentLayer(_LatentLayer, DynamicLayer):
    """The growing layer. Buffers have a little room to spare, so that a new token does not copy all the old ones."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values, positions = self._new(key_states)
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
            self.keys, self.values, self.positions = keys, values, positions
            return key_states, value_states  # nothing older to expand: the attention gets what it always gets
        assert self.keys is not None and self.values is not None
        self.keys, self.values = _append(self.keys, keys), _append(self.values, values)
        if positions is not None:
            assert self.positions is not None
            self.positions = _append(self.positions, positions)
        self.state.returning(self.cached_positions(), None)
        return self.keys, self.values

    def room(self, new: int) -> int:
        return int(self.get_seq_length()) + new

    def reset(self) -> None:
        super().reset()
        self.positions = None

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.positions is not None and self.keys is not None:
            self.positions = self.positions[:, :, : self.keys.shape[-2]]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda tensor: tensor[indices.to(tensor.device)])


class StaticLatentLayer(_LatentLayer, StaticLayer):
    """The layer of a static cache: buffers of a fixed length, for torch.compile."""

    def __init__(self, state: LatentLayerState, first: _LatentLayer | None, max_cache_len: int) -> None:
        super().__init__(state, first, max_cache_len=max_cache_len)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values, positions = self._new(key_states)
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            # Keys may have several heads where the latents of V are one.
            self.values = values.new_zeros((values.shape[0], 1, self.max_cache_len, values.shape[-1]))
            if positions is not None:
                self.positions = positions.new_zeros((keys.shape[0], 1, self.max_cache_len, 1))
            if not torch.compiler.is_compiling():
                for name in self._tensors:
                    if getattr(self, name) is not None:
                        torch._dynamo.mark_static_address(getattr(self, name))
        if positions is not None:
            assert self.positions is not None
            new = torch.arange(keys.shape[-2], device=self.device) + self.cumulative_length
            self.positions.index_copy_(2, new, positions)
        stored = StaticLayer.update(self, keys, values)
        self.state.returning(self.cached_positions(), self.cumulative_length.expand(keys.shape[0]))
        return stored

    def room(self, new: int) -> int:
        return self.max_cache_len

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))


def make_room(cache: Cache, layer: int, state: LatentLayerState) -> _LatentLayer:
    """The cache's latent layer for this attention, put where the dense one stands if that is still empty.

    Raises:
        InputError: the cache cannot hold one, or holds keys and values of another mode.
    """
    while len(cache.layers) <= layer:
        cache.layers.append(cache.layer_class_to_replicate())  # type: ignore[misc]
    old: Any = cache.layers[layer]
    if isinstance(old, _LatentLayer):
        if old.state is state:
            return old
        raise InputError(
            f"past_key_values: layer {layer} holds latents of an intervention that was removed; make a new cache"
        )
    if old.is_initialized and int(old.get_seq_length()) > 0:
        raise InputError(
            f'past_key_values: layer {layer} holds keys and values of another mode; mode "{state.mode}" '
            "needs a cache that starts empty"
        )
    first = next((each for each in cache.layers if isinstance(each, _LatentLayer)), None)
    new: _LatentLayer
    if type(old) is DynamicLayer:
        new = LatentLayer(state, first)
    elif type(old) is StaticLayer:
        new = StaticLatentLayer(state, first, old.max_cache_len)
    else:
        raise InputError(
            f'mode "{state.mode}": layer {layer} of the cache is a {type(old).__name__}, which cannot hold latents; '
            'mode "fold" can be used with it'
        )
    cache.layers[layer] = new
    return new


def cache_bytes(cache: Cache) -> dict[int, int]:
    """Bytes that the keys and values of every layer of a cache take, by layer; latent layers and dense ones alike.

    What a layer has to spare is not counted (at most a sixty-fourth, or 16 tokens), nor are the positions that "latent"
    keeps once for all layers (4 bytes a token and sequence).
    """
    if not isinstance(cache, Cache):
        raise InputError(f"cache: expected a cache of transformers, got a {type(cache).__name__}")
    taken = {}
    for number, layer in enumerate(cache.layers):
        kept = (getattr(layer, "keys", None), getattr(layer, "values", None))
        taken[number] = sum(t.numel() * t.element_size() for t in kept if isinstance(t, Tensor))
    return taken


def _append(stored: Tensor, new: Tensor) -> Tensor:
    """`stored` (B, h, T, w) with `new` behind it: written into the room behind `stored` where it has some."""
    batch, heads, tokens, width = stored.shape
    total = tokens + new.shape[2]
    traced = torch.compiler.is_compiling()  # a trace knows no storage
    if traced or (torch.is_grad_enabled() and (new.requires_grad or stored.requires_grad)):
        return torch.cat((stored, new), dim=2)
    if total > _capacity(stored):
        room = total + max(LEAST_GROWTH, total // GROWTH)
        buffer = new.new_empty((batch, heads, room, width))
        buffer[:, :, :tokens] = stored
        stored = buffer
    grown = stored.as_strided((batch, heads, total, width), stored.stride())
    grown[:, :, tokens:] = new
    return grown


def _capacity(stored: Tensor) -> int:
    """How many tokens the memory of `stored` holds if it is the front of a buffer of its own, else what it has."""
    batch, heads, tokens, width = stored.shape
    if stored.is_inference() and not torch.is_inference_mode_enabled():
        return tokens  # such a tensor may not be written any more
    room = stored.stride(1) // max(width, 1)
    laid_out = stored.stride() == (heads * room * width, room * width, width, 1)
    whole = stored.untyped_storage().nbytes() == batch * heads * room * width * stored.element_size()
    return room if laid_out and whole and stored.storage_offset() == 0 else tokens
