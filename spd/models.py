"""Loading a checkpoint and its tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

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
        device: "auto" (a GPU where there is one), or a device of torch.

    Raises:
        InputError: there is no such checkpoint, dtype or device, or the checkpoint cannot be read.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if name == PROVING_GROUND:
        from spd.proving_ground import checkpoint

        name = checkpoint()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        resolved: str | torch.dtype = "auto" if device != "cpu" else torch.float32
    else:
        resolved = getattr(torch, dtype)
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise InputError(f"model: the folder {name} holds no checkpoint (config.json is missing)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=resolved)
        model.to(device)  # type: ignore[arg-type]
    except Exception as error:  # safetensors, JSON, hub and device errors share no base class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"model: {name} could not be loaded on {device} ({reason})") from error
    return model.eval(), tokenizer
