"""Modes `latent_v` and `latent`: the hook's intervention, and a cache that keeps what it leaves: r numbers a token.

Nothing of the model is rewritten. At every attached layer
  - a hook on v_proj (and k_proj) projects what it returns, as mode `hook` does, and remembers the latent c = x U;
  - a hook before the attention puts a latent layer into the cache that it is given (see latent_cache.py);
  - the attention's own copy of its configuration names the attention function below, which runs over latents for a few
    query tokens, and expands them for the model's own attention function for many.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache

from spd.errors import InputError
from spd.intervention.hook import ProjectOutput
from spd.intervention.key_recipe import KeyRecipe, head_norm_weight, key_norm
from spd.intervention.latent_cache import make_room
from spd.intervention.rotary_table import RotaryTable
from spd.intervention.target import LatentMode, Target
from spd_kernels import latent_attention

FUNCTION = "spd_latent"
# Up to so many query tokens attention runs over latents; for more, expanding them once is cheaper.
SHORT_BLOCK = 16
# What an attention hands its function beside the operands without changing the result.
_HARMLESS = {"position_ids", "use_cache", "cache_position", "is_causal", "position_embeddings", "past_key_values"}


class Latent:
    """The intervention on a whole model. `recipes` says for mode "latent" how each layer makes its keys."""

    def __init__(self, mode: LatentMode, targets: Sequence[Target], recipes: dict[int, KeyRecipe]) -> None:
        self.mode: LatentMode = mode
        tables: dict[Any, RotaryTable] = {}
        self._layers: list[LatentLayerState] = []
        try:
            for number in dict.fromkeys(target.layer for target in targets):
                sides = {target.side: target for target in targets if target.layer == number}
                # Layers of one kind are rotated alike: gemma3 has two kinds.
                kind = getattr(sides["v"].attention, "layer_type", None)
                table = tables.setdefault(kind, RotaryTable())
                self._layers.append(LatentLayerState(mode, sides, recipes.get(number), table))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        for layer in self._layers:
            layer.remove()


class LatentLayerState:
    """One attached layer: its bases, and what passes between its hooks, its cache layer and its attention function.

    Attributes:
        returned_latents: whether the attention is about to be given latents rather than dense keys and values.
    """

    def __init__(
        self, mode: LatentMode, sides: dict[str, Target], recipe: KeyRecipe | None, table: RotaryTable
    ) -> None:
        self.mode: LatentMode = mode
        self.layer = sides["v"].layer
        self.returned_latents = False
        self.own_function = own_attention_function(sides["v"].attention)
        self._attention = cast(Any, sides["v"].attention)
        self._live = True
        self._recipe, self._table = recipe, table
        self._norm = key_norm(self._attention)
        self._head_norm: tuple[Tensor, float] | None = None
        self._captured: dict[str, _Capture] = {}
        self._positions: Tensor | None = None
        self._cached_positions: Tensor | None = None
        self._length: Tensor | None = None

        self._config = self._attention.config
        config = copy(self._config)
        config._attn_implementation = FUNCTION
        self._attention.config = config
        self._attention.spd_latent = self
        self._handles = [self._attention.register_forward_pre_hook(self._before, with_kwargs=True)]
        for side, target in sides.items():
            hook: ProjectOutput | _Capture = ProjectOutput(target, 0.0, 1.0)
            if side == "v" or mode == "latent":
                hook = self._captured[side] = _Capture(target)
            self._handles.append(target.projection.module.register_forward_hook(hook))

    def remove(self) -> None:
        self._live = False
        for handle in self._handles:
            handle.remove()
        self._attention.config = self._config
        del self._attention.spd_latent

    def take(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """For the cache: the latents (B, T, r) of the new tokens' K (None under "latent_v") and V; their positions."""
        if not self._live:
            raise InputError(
                f'past_key_values: layer {self.layer} holds latents of mode "{self.mode}", whose intervention was '
                "removed; start with an empty cache"
            )
        latents = {side: capture.take() for side, capture in self._captured.items()}
        positions, self._positions = self._positions, None
        if positions is None:
            positions = latents["v"].new_zeros((1, latents["v"].shape[1]), dtype=torch.int32)
        return latents.get("k"), latents["v"], positions

    def returning(self, positions: Tensor | None, length: Tensor | None) -> None:
        """The cache tells that it returns latents: the positions (B, T) of all its tokens, and, where it has room for
        more than it holds, how many it holds (B,)."""
        self.returned_latents = True
        self._cached_positions, self._length = positions, length

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None,
        dropout: float,
        arguments: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """query (B, H, Tq, D) over what the cache returned."""
        if self.returned_latents:
            self.returned_latents = False
            plain = not any(v is not None and v is not False for k, v in arguments.items() if k not in _HARMLESS)
            short = query.shape[2] <= SHORT_BLOCK and dropout == 0.0 and plain
            if short and not (torch.is_grad_enabled() and query.requires_grad):
                found = self._attend_latents(query, key, value, mask, scaling)
                if found is not None:
                    return found.transpose(1, 2).contiguous(), None
            key, value = self._dense(query, key, value)
        return self.own_function(
            self._attention, query, key, value, mask, scaling=scaling, dropout=dropout, **arguments
        )

    def _attend_latents(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
    ) -> Tensor | None:
        """Attention that expands nothing to memory; None where the kernel does not know this family's norm."""
        head_dim = query.shape[-1]
        u_v = self._captured["v"].basis(value)
        u_k: Tensor | None = None
        norm: Tensor | None = None
        eps = 1e-6
        cos: Tensor | None = None
        sin: Tensor | None = None
        if self.mode == "latent":
            assert self._recipe is not None
            if self._recipe.norm in ("flat", "rotated"):
                return None
            if self._recipe.norm == "head":
                known = self._kernel_norm(head_dim, query)
                if known is None:
                    return None
                norm, eps = known
            key, u_k = key[:, 0], self._captured["k"].basis(key)
            if self._recipe.rotation != "none":
                cos, sin = self._table.cos, self._table.sin
        positions = self._cached_positions
        visible = _visible(mask, value)
        if visible is not None:
            positions = torch.where(visible, 0 if positions is None else positions, -1)
        return latent_attention(
            query,
            key,
            value[:, 0],
            u_k,
            u_v,
            cos,
            sin,
            kv_heads=u_v.shape[0] // head_dim,
            scale=scaling,
            positions=positions,
            lengths=self._length,
            norm_weight=norm,
            eps=eps,
            interleaved=self._recipe is not None and self._recipe.rotation == "interleaved",
        )

    def _dense(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, kv_heads, T, D) of all cached tokens."""
        head_dim = query.shape[-1]
        values = self._captured["v"].expand(value[:, 0]).unflatten(-1, (-1, head_dim)).transpose(1, 2)
        if self.mode == "latent_v":
            return key, values
        assert self._recipe is not None
        cos = sin = query.new_zeros((1, 1, head_dim // 2))
        if self._recipe.rotation != "none":
            assert self._cached_positions is not None
            at = self._cached_positions.long()
            cos, sin = self._table.cos[at], self._table.sin[at]
        return self._recipe.keys(self._captured["k"].expand(key[:, 0]), cos, sin, head_dim, self._norm), values

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the attention runs: its cache gets a layer for latents, and the new tokens' positions are noted."""
        self.returned_latents = False
        cache = next((each for each in (*args, *kwargs.values()) if isinstance(each, Cache)), None)
        if cache is None:
            if kwargs.get("cache") is not None or kwargs.get("past_key_values") is not None:
                raise InputError(
                    f'mode "{self.mode}": expected a cache of transformers; continuous batching and other engines '
                    'keep their own, and take mode "fold"'
                )
            for capture in self._captured.values():
                capture.forget()
            return
        layer = make_room(cache, self.layer, self)
        if self.mode == "latent_v" or self._recipe is None or self._recipe.rotation == "none":
            return
        positions, embeddings = kwargs.get("position_ids"), kwargs.get("position_embeddings")
        if positions is None or positions.dim() != 2 or embeddings is None:
            raise InputError(
                f'mode "latent": {type(module).__name__} is not given position_ids (B, T) and position_embeddings, '
                'which its keys need; mode "latent_v" can be used'
            )
        cos, sin = (self._recipe.once(each) for each in embeddings)
        self._table.note(positions, cos, sin, layer.room(positions.shape[1]))
        self._positions = positions

    def _kernel_norm(self, head_dim: int, like: Tensor) -> tuple[Tensor, float] | None:
        if self._head_norm is None and self._norm is not None:
            self._head_norm = head_norm_weight(self._norm, head_dim, like)
        return self._head_norm


class _Capture:
    """A forward hook that projects, as mode `hook` does, and keeps the latent c = x U for the cache."""

    def __init__(self, target: Target) -> None:
        self._projection, self._basis = target.projection, target.basis
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._latent: Tensor | None = None

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        activation = self._projection.read(output)
        self._latent = activation @ self.basis(activation)
        return self._projection.write(output, self.expand(self._latent))

    def basis(self, like: Tensor) -> Tensor:
        """U (d, r) on the device and in the dtype of `like`."""
        key = like.device, like.dtype
        if key not in self._copies:
            self._copies[key] = self._basis.to(*key)
        return self._copies[key]

    def expand(self, latent: Tensor) -> Tensor:
        """c Uᵀ, (..., d)."""
        return latent @ self.basis(latent).mT

    def take(self) -> Tensor:
        """The latent, once."""
        latent = self._latent
        assert latent is not None, "the cache is updated after the projections have run"
        self._latent = None
        return latent

    def forget(self) -> None:
        self._latent = None


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What the attached attentions call by the name `FUNCTION`; the signature is the attention interface's."""
    state: LatentLayerState = module.spd_latent  # type: ignore[assignment]
    return state.attend(query, key, value, attention_mask, scaling, dropout, kwargs)


AttentionInterface.register(FUNCTION, attention_function)


def own_attention_function(attention: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function that the attention uses under its configuration.

    Raises:
        InputError: it does not choose one through transformers' attention interface.
    """
    modeling: Any = sys.modules[type(attention).__module__]
    interface = getattr(modeling, "ALL_ATTENTION_FUNCTIONS", None)
    eager = getattr(modeling, "eager_attention_forward", None)
    config = getattr(attention, "config", None)
    if interface is None or eager is None or config is None:
        raise InputError(
            f"model: {type(attention).__name__} does not choose its attention through transformers' attention "
            'interface, so no cache can keep latents for it; modes "fold" and "hook" can be used'
        )
    return interface.get_interface(config._attn_implementation, eager)


def _visible(mask: Tensor | None, value: Tensor) -> Tensor | None:
    """(B, T) which cached tokens the last query sees, from any form of mask; None: all."""
    if mask is None:
        return None
    rows = mask if mask.dim() == 2 else mask[:, 0, -1]
    seen = rows > torch.finfo(rows.dtype).min / 2 if rows.is_floating_point() else rows.bool()
    tokens = value.shape[2]
    missing = tokens - seen.shape[-1]
    if missing > 0:  # a mask that stops at the last token of a static cache
        seen = nn.functional.pad(seen, (0, missing), value=False)
    return seen[:, :tokens].expand(value.shape[0], -1)
