"""Random-weight models of real shapes: what a cache costs depends on shapes alone, and these need no download."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

from spd.errors import InputError
from spd.sites import find_sites
from spd.subspace import Basis, Subspace

# Shapes as the models' own configurations give them.
_LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_QWEN_7B: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
}
# The heads of an 8B model on a body that two cores can carry.
_SMALL: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
}
_TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 131072,
}
SHAPES = {
    "llama-3.1-8b": (LlamaConfig, _LLAMA_8B),
    "qwen2.5-7b": (Qwen2Config, _QWEN_7B),
    "small": (LlamaConfig, _SMALL),
    "tiny": (LlamaConfig, _TINY),
}


def make_model(
    shape: str, *, context: int, batch: int = 1, device: str = "auto", dtype: str = "auto"
) -> PreTrainedModel:
    """A model of that shape with random weights, made on the device: bfloat16 on a GPU, float32 on the CPU.

    Raises:
        InputError: there is no such shape, or no memory for its weights and a dense cache of `context` tokens.
    """
    if shape not in SHAPES:
        raise InputError(f"shape: expected one of {', '.join(SHAPES)}, got {shape!r}")
    kind, widths = SHAPES[shape]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.device(device)
    resolved = getattr(torch, dtype if dtype != "auto" else "bfloat16" if where.type == "cuda" else "float32")
    config = kind(**widths, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, dtype=resolved)
    _check_memory(shape, config, context * batch, where, resolved.itemsize)
    torch.manual_seed(0)
    with where:
        return AutoModelForCausalLM.from_config(config, dtype=resolved).eval()


def random_subspace(model: nn.Module, rank: int, layers: Sequence[int] | None = None, seed: int = 0) -> Subspace:
    """Random orthonormal bases of that rank, at all layers unless some are named.

    Raises:
        InputError: `rank` is more than the width of K and V.
    """
    sites = find_sites(model)
    chosen = list(sites) if layers is None else list(layers)
    generator = torch.Generator().manual_seed(seed)

    def basis(d: int) -> Basis:
        if not 1 <= rank <= d:
            raise InputError(f"rank: expected 1 to d = {d}, got {rank}")
        u = torch.linalg.qr(torch.randn(d, rank, generator=generator)).Q
        return Basis(u.contiguous(), torch.ones(d, dtype=torch.float64))

    k, v = ({layer: basis(sites[layer].width) for layer in chosen} for _ in range(2))
    return Subspace(k, v)


def _check_memory(shape: str, config: Any, tokens: int, device: torch.device, itemsize: int) -> None:
    """Refuse what would fill the machine; two dense caches, since a growing one is copied."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    width = config.num_key_value_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    weights, cache = parameters * itemsize, 2 * tokens * width * config.num_hidden_layers * itemsize
    available = _available(device)
    if available is not None and weights + 2 * cache > available:
        instead = "" if device.type == "cuda" else '; on a CPU, shape "tiny" or "small" is for trying'
        raise InputError(
            f"shape: {shape} needs {weights / 2**30:.1f} GiB for its weights and twice {cache / 2**30:.1f} GiB for a "
            f"dense cache of {tokens} tokens, but {device} has {available / 2**30:.1f} GiB left{instead}"
        )


def _available(device: torch.device) -> int | None:
    """Bytes that can be taken; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
