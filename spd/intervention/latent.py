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
from spd.intervention.key_recipe import KeyRecipe, key_norm, rms_eps, rms_weight
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
        tables: dict[Any, RotaryTable] = {}  # by kind of layer, device and dtype
        self._layers: list[LatentLayerState] = []
        try:
            for number in dict.fromkeys(target.layer for target in targets):
                sides = {target.side: target for target in targets if target.layer == number}
                self._layers.append(LatentLayerState(mode, sides, recipes.get(number), tables))
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
        self, mode: LatentMode, sides: dict[str, Target], recipe: KeyRecipe | None, tables: dict[Any, RotaryTable]
    ) -> None:
        self.mode: LatentMode = mode
        self.layer = sides["v"].layer
        self.returned_latents = False
        self._attention = cast(Any, sides["v"].attention)
        self._live = True
        self._recipe, self._tables = recipe, tables
        self._table: RotaryTable | None = None
        self._norm = key_norm(self._attention)
        self._eps: float | None = None
        self._captured: dict[str, Capture] = {}
        self._positions: Tensor | None = None
        self._cached_positions: Tensor | None = None
        self._length: Tensor | None = None

        self._config = self._attention.config
        self._implementation = self._config._attn_implementation
        self._own_function = own_attention_function(self._attention, self._implementation)
        config = copy(self._config)
        config._attn_implementation = FUNCTION
        self._attention.config = config
        self._attention.spd_latent = self
        self._handles = [self._attention.register_forward_pre_hook(self._before, with_kwargs=True)]
        for side, target in sides.items():
            hook = ProjectOutput(target, 0.0, 1.0)
            if side == "v" or mode == "latent":
                hook = self._captured[side] = Capture(target)
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
                "removed; make a new cache"
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
            found = None
            plain = not any(v is not None and v is not False for k, v in arguments.items() if k not in _HARMLESS)
            trained = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
            alike = query.dtype == key.dtype == value.dtype  # not so under autocast
            if query.shape[2] <= SHORT_BLOCK and dropout == 0.0 and plain and alike and not trained:
                found = self._attend_latents(query, key, value, mask, scaling)
            if found is None:
                key, value = self._dense(query, key, value)
            self.returned_latents, self._cached_positions, self._length = False, None, None
            if found is not None:
                return found.transpose(1, 2).contiguous(), None
        if self._config._attn_implementation != self._implementation:  # masks follow what it was changed to
            self._implementation = self._config._attn_implementation
            self._own_function = own_attention_function(self._attention, self._implementation)
        return self._own_function(
            self._attention, query, key, value, mask, scaling=scaling, dropout=dropout, **arguments
        )

    def _attend_latents(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
    ) -> Tensor | None:
        """Attention that expands nothing to memory; None where the kernel knows not the family's norm, or the mask."""
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
                assert self._norm is not None
                if self._eps is None:
                    self._eps = rms_eps(self._norm, head_dim, query) or 0.0
                if self._eps == 0.0:
                    return None
                norm, eps = rms_weight(self._norm, self._eps, head_dim, query), self._eps
            key, u_k = key[:, 0], self._captured["k"].basis(key)
            if self._recipe.rotation != "none":
                assert self._table is not None
                cos, sin = self._table.cos, self._table.sin
        positions = self._cached_positions
        if mask is not None:
            visible = _visible(mask, query.shape[2], value.shape[2], self._length)
            if visible is None:
                return None
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
            assert self._cached_positions is not None and self._table is not None
            at = self._cached_positions.long()
            # What lies where no token is has no angle; it is masked, which NaN would not let it be.
            cos, sin = (table[at].nan_to_num() for table in (self._table.cos, self._table.sin))
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
                capture.wanted = False
            return
        layer = make_room(cache, self.layer, self)
        for capture in self._captured.values():
            capture.wanted = True
        if self.mode == "latent_v" or self._recipe is None:
            return
        positions, embeddings = kwargs.get("position_ids"), kwargs.get("position_embeddings")
        # Kept by layers that rotate nothing too: theirs may be the ones that the other layers read.
        self._positions = None if positions is None else positions.clamp(min=0)
        if self._recipe.rotation == "none":
            return
        if positions is None or positions.dim() != 2 or embeddings is None:
            raise InputError(
                f'mode "latent": {type(module).__name__} is not given position_ids (B, T) and position_embeddings, '
                'which its keys need; mode "latent_v" can be used'
            )
        cos, sin = (self._recipe.once(each) for each in embeddings)
        # Layers of one kind are rotated alike: gemma3 has two kinds.
        key = getattr(module, "layer_type", None), cos.device, cos.dtype
        if key not in self._tables:
            self._tables[key] = RotaryTable(getattr(self._config, "max_position_embeddings", None))
        self._table = self._tables[key]
        self._table.note(positions, cos, sin, layer.room(positions.shape[1]), source=embeddings[0])


class Capture(ProjectOutput):
    """A forward hook that projects, as mode `hook` does, and keeps the latent c = x U if a cache wants it."""

    def __init__(self, target: Target) -> None:
        super().__init__(target, 0.0, 1.0)
        self.wanted = False
        self._latent: Tensor | None = None

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        activation = self._projection.read(output)
        latent = activation @ self.basis(activation)
        self._latent = latent if self.wanted else None
        return self._projection.write(output, self.expand(latent))

    def expand(self, latent: Tensor) -> Tensor:
        """c Uᵀ, (..., d)."""
        return latent @ self.basis(latent).mT

    def take(self) -> Tensor:
        """The latent, once."""
        latent = self._latent
        assert latent is not None, "the cache is updated after the projections have run"
        self._latent = None
        return latent


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


def own_attention_function(attention: nn.Module, implementation: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function that the attention uses under an implementation's name, such as "sdpa".

    Raises:
        InputError: it does not choose one through transformers' attention interface.
    """
    modeling: Any = sys.modules[type(attention).__module__]
    interface = getattr(modeling, "ALL_ATTENTION_FUNCTIONS", None)
    eager = getattr(modeling, "eager_attention_forward", None)
    if interface is None or eager is None or getattr(attention, "config", None) is None:
        raise InputError(
            f"model: {type(attention).__name__} does not choose its attention through transformers' attention "
            'interface, so no cache can keep latents for it; modes "fold" and "hook" can be used'
        )
    return interface.get_interface(implementation, eager)


def _visible(mask: Tensor, queries: int, tokens: int, length: Tensor | None) -> Tensor | None:
    """(B, tokens) which cached tokens are there, if the mask says no more than that and that no query looks ahead.

    None where it says more (a tree of drafts, a bias), or where finding out would mean waiting for a GPU.
    """
    if mask.dim() == 2:  # of flash attention: padding alone
        return _padded(mask.bool(), tokens)
    if mask.shape[1] != 1:
        return None
    look = mask.device.type == "cpu" and not torch.compiler.is_compiling()
    if mask.is_floating_point():
        if not look:
            return None
        seen = mask == 0.0
        if not bool((seen | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
            return None
        mask = seen
    rows = _padded(mask[:, 0].bool(), tokens)  # (B, Tq, tokens)
    there = rows[:, -1]
    if queries > 1:
        if not look:
            return None
        ends = torch.arange(1 - queries, 1) + (tokens if length is None else length[:, None])
        ahead = torch.arange(tokens) >= ends[..., None]
        if not torch.equal(rows, (there[:, None] & ~ahead).expand_as(rows)):
            return None
    return there


def _padded(seen: Tensor, tokens: int) -> Tensor:
    """A mask that stops at the last token of a static cache, or has room to spare, over `tokens` columns."""
    missing = tokens - seen.shape[-1]
    if missing > 0:
        seen = nn.functional.pad(seen, (0, missing), value=False)
    return seen[..., :tokens]
