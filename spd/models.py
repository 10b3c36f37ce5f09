"""Loading a checkpoint and its tokenizer."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from spd import distributed
from spd.errors import InputError

PROVING_GROUND = "proving-ground"
DTYPES = ("auto", "float32", "float16", "bfloat16")


def load_model(
    name: str | Path, *, dtype: str = "auto", device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        name: checkpoint folder, hub name, or "proving-ground" for the model the project carries.
        dtype: of the weights: "auto" (the checkpoint's own on a GPU, float32 on the CPU, whatever the checkpoint's),
            "float32", "float16" or "bfloat16".
        device: "auto" (a GPU where there is one), or a device of torch. Under torchrun "auto" and "cuda" are the GPU of
            the process's number.

    Raises:
        InputError: there is no such checkpoint, dtype or device, or the checkpoint cannot be read.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    own = distributed.take_gpu()
    if distributed.started() > 1 and str(device).startswith("cuda:") and str(device) != f"cuda:{own}":
        raise InputError(f'device: expected "cuda" under torchrun, each process\'s own GPU; got {device!r}')
    name = _checkpoint(name)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        resolved: str | torch.dtype = "auto" if device != "cpu" else torch.float32
    else:
        resolved = getattr(torch, dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=resolved)
        model.to(device)  # type: ignore[arg-type]
    except Exception as error:  # safetensors, JSON, hub and device errors share no base class
        raise InputError(f"model: {name} could not be loaded on {device} ({_reason(error)})") from error
    return model.eval(), tokenizer


def load_tokenizer(name: str | Path) -> tuple[PreTrainedTokenizerBase, int | None]:
    """A checkpoint's tokenizer, and how many positions its model has, without reading the weights.

    Raises:
        InputError: there is no such checkpoint, or its tokenizer or configuration cannot be read.
    """
    name = _checkpoint(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        config = AutoConfig.from_pretrained(name).get_text_config()
    except Exception as error:
        raise InputError(f"model: the tokenizer of {name} could not be loaded ({_reason(error)})") from error
    return tokenizer, getattr(config, "max_position_embeddings", None)


def _checkpoint(name: str | Path) -> str | Path:
    if name == PROVING_GROUND:
        from spd.proving_ground import checkpoint

        return checkpoint()
    if os.path.isdir(name) and not os.path.isfile(Path(name) / "config.json"):
        raise InputError(f"model: the folder {name} holds no checkpoint (config.json is missing)")
    return name


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
