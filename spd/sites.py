"""Where K and V leave a model: the sites that calibration taps and that an intervention changes.

K and V are meant as the linear layer returns them: bias included, before any key norm and before the rotary
embedding, all key-value heads flattened into one axis of width d = num_key_value_heads * head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spd.errors import InputError
from spd.named import NAMED_LAYERS

Columns = slice | Tensor


@dataclass(frozen=True, eq=False)
class Projection:
    """K or V of one layer: the module that computes it, and which of the module's output features it is.

    Args:
        path: the module's dotted name in the model.
        module: the module; its output's last axis holds K or V, among other things if it is fused.
        columns: output features that are K or V, in order: a slice, or an index tensor where heads are interleaved.
        width: d, how many there are.
        fused: whether the module returns anything else.
    """

    path: str
    module: nn.Module
    columns: Columns
    width: int
    fused: bool

    def read(self, output: Tensor) -> Tensor:
        """(..., features) -> (..., d)."""
        return output[..., self._columns_on(output.device)] if self.fused else output

    def write(self, output: Tensor, value: Tensor) -> Tensor:
        """A copy of `output` in which K or V is `value`; `output` itself stays as it is."""
        if not self.fused:
            return value
        output = output.clone()
        output[..., self._columns_on(output.device)] = value
        return output

    @property
    def weight(self) -> nn.Parameter:
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def features_first(self) -> bool:
        """Whether the weight is (features, inputs) as in `nn.Linear`, or transposed as in GPT-2's `Conv1D`."""
        return isinstance(self.module, nn.Linear)

    def _columns_on(self, device: torch.device) -> Columns:
        return self.columns if isinstance(self.columns, slice) else self.columns.to(device)


@dataclass(frozen=True, eq=False)
class Site:
    """One layer's K and V, and the attention module that they belong to."""

    layer: int
    k: Projection
    v: Projection
    attention: nn.Module

    @property
    def width(self) -> int:
        return self.k.width

    def side(self, side: str) -> Projection:
        return self.k if side == "k" else self.v


def find_sites(model: nn.Module) -> dict[int, Site]:
    """Every self-attention layer of the text decoder whose K and V can be reached, by layer index.

    Raises:
        InputError: there is none, or what there is cannot be told apart; names the attention class.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"model: {type(model).__name__} is an encoder-decoder; SPD is defined on causal decoders")
    sites: dict[int, Site] = {}
    refused: set[str] = set()
    for path, module in _text_decoder(model):
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int) or getattr(module, "is_cross_attention", False) or "cross" in path.lower():
            continue
        site = _site(path, module, layer)
        if site is None:
            if _looks_like_attention(module):
                refused.add(type(module).__name__)
        elif layer in sites:
            raise InputError(
                f"model: layer {layer} has two attention modules ({sites[layer].k.path}, {site.k.path}); "
                f"{type(module).__name__} is not supported"
            )
        else:
            sites[layer] = site
    if not sites:
        seen = f"; its attention is {', '.join(sorted(refused))}" if refused else ""
        raise InputError(
            f"model: {type(model).__name__} has no layer whose K and V can be reached: expected attention modules with "
            f"k_proj and v_proj, or the fused ones of {', '.join(sorted(_FUSED))}{seen}"
        )
    return dict(sorted(sites.items()))


def depth(model: nn.Module) -> int:
    """n, the number of layers of the text decoder."""
    return int(model.config.get_text_config().num_hidden_layers)  # type: ignore[union-attr, operator]


def choose_layers(
    sites: dict[int, Site], layers: Literal["paper", "middle", "last", "all"] | str | Sequence[int], n: int
) -> list[int]:
    """Resolve "paper" (n // 2 and n - 1), either of the two, "all" that can be reached, or a list of indices."""
    if isinstance(layers, str):
        if layers == "all":
            return list(sites)
        if layers not in NAMED_LAYERS:
            raise InputError(f"layers: expected one of {', '.join(NAMED_LAYERS)} or a list of indices, got {layers!r}")
        layers = sorted({"middle": {n // 2}, "last": {n - 1}, "paper": {n // 2, n - 1}}[layers])
    chosen = list(layers)
    if not chosen:
        raise InputError("layers: expected at least one layer, got an empty list")
    for layer in chosen:
        if not isinstance(layer, int) or isinstance(layer, bool):
            raise InputError(f"layers: expected integers, got {layer!r}")
        if layer not in sites:
            raise InputError(f"layers: the model has no K and V to reach at layer {layer}; there are {list(sites)}")
    if len(set(chosen)) != len(chosen):
        raise InputError(f"layers: {chosen} names a layer twice")
    return sorted(chosen)


def _text_decoder(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules of the text decoder with their names in `model` (a vision tower has attention too, but no cache)."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    inside = {id(module) for module in (decoder if isinstance(decoder, nn.Module) else model).modules()}
    return [(path, module) for path, module in model.named_modules() if id(module) in inside]


def _site(path: str, module: nn.Module, layer: int) -> Site | None:
    k_proj, v_proj = getattr(module, "k_proj", None), getattr(module, "v_proj", None)
    if isinstance(k_proj, nn.Module) and isinstance(v_proj, nn.Module):
        width = getattr(k_proj, "out_features", None)
        if not isinstance(width, int) or getattr(v_proj, "out_features", None) != width or k_proj is v_proj:
            return None
        whole = slice(0, width)
        return Site(
            layer,
            Projection(f"{path}.k_proj", k_proj, whole, width, fused=False),
            Projection(f"{path}.v_proj", v_proj, whole, width, fused=False),
            module,
        )
    layout = _FUSED.get(type(module).__name__)
    return layout(path, module, layer) if layout else None


def _phi3(path: str, module: Any, layer: int) -> Site:
    """Rows are [q | k | v]."""
    width = module.num_key_value_heads * module.head_dim
    return _contiguous(f"{path}.qkv_proj", module, module.qkv_proj, layer, width, total=module.qkv_proj.out_features)


def _gpt2(path: str, module: Any, layer: int) -> Site:
    """The last axis is [q | k | v]; the module is a Conv1D, its weight (inputs, features)."""
    return _contiguous(f"{path}.c_attn", module, module.c_attn, layer, module.embed_dim, total=3 * module.embed_dim)


def _gpt_neox(path: str, module: Any, layer: int) -> Site:
    """Features are [q | k | v] within each head, so K of all heads is a comb."""
    linear = module.query_key_value
    features = torch.arange(linear.out_features).view(-1, 3, module.head_size)
    name = f"{path}.query_key_value"
    k, v = features[:, 1].flatten(), features[:, 2].flatten()
    return Site(
        layer,
        Projection(name, linear, k, k.numel(), fused=True),
        Projection(name, linear, v, v.numel(), fused=True),
        module,
    )


def _contiguous(path: str, module: nn.Module, linear: nn.Module, layer: int, width: int, total: int) -> Site:
    k, v = slice(total - 2 * width, total - width), slice(total - width, total)
    return Site(
        layer,
        Projection(path, linear, k, width, fused=True),
        Projection(path, linear, v, width, fused=True),
        module,
    )


_FUSED = {"Phi3Attention": _phi3, "GPT2Attention": _gpt2, "GPTNeoXAttention": _gpt_neox}


def _looks_like_attention(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower()
