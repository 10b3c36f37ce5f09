"""What a result came from: model identity and library versions, as plain data."""

from __future__ import annotations

import hashlib
import json
import platform
from functools import cache
from importlib import metadata
from typing import Any

from torch import Tensor, nn

from spd.files import sha256

_NOT_ARCHITECTURE = {
    "_name_or_path",
    "_attn_implementation",
    "architectures",
    "attn_implementation",
    "dtype",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def model_name(model: nn.Module) -> str:
    """The checkpoint's name or folder as transformers recorded it, else the class name."""
    return getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__


def config_hash(model: nn.Module) -> str:
    """Hash of the configuration, without the keys that say how a checkpoint is loaded rather than what it is.

    Keys at their default are left out as well, so that a default added by another version of transformers is no change.
    """
    config = model.config.to_diff_dict()  # type: ignore[union-attr, operator]
    return sha256(json.dumps(_architecture(config), sort_keys=True, default=str))


def weights_fingerprint(model: nn.Module) -> str:
    """Hash of every parameter's name, type, shape and some elements (`spread`): cheap, and tells trainings apart.

    The same wherever the parameters are: offloaded by accelerate, or dealt over processes, which all must call this.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        value = _offloaded(model, name) if parameter.is_meta else parameter.detach()
        if value is None:
            continue
        if hasattr(value, "full_tensor"):  # a DTensor
            value = value.full_tensor()
        digest.update(value.flatten()[spread(value.numel())].double().cpu().numpy().tobytes())
    return digest.hexdigest()


def spread(size: int) -> list[int]:
    """Up to 127 of `size` positions, evenly apart.

    As 127 is prime, they fall into all rows and columns of a matrix alike: into each part of a packed projection of
    Q, K and V, whichever way it is packed.
    """
    return sorted({index * size // 127 for index in range(127)}) if size else []


def _offloaded(model: nn.Module, name: str) -> Tensor | None:
    """The parameter as accelerate keeps it while it is not needed, on the CPU or on disk."""
    path, _, last = name.rpartition(".")
    hook = getattr(model.get_submodule(path), "_hf_hook", None)
    for each in getattr(hook, "hooks", [hook]):
        weights = getattr(each, "weights_map", None)
        if weights is not None:
            return weights[last]
    return None


def _architecture(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            str(key): _architecture(item)
            for key, item in value.items()
            if key not in _NOT_ARCHITECTURE and not str(key).endswith("_token_id")
        }
    if isinstance(value, (list, tuple)):
        return [_architecture(item) for item in value]
    return value


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries a result depends on (absent ones left out)."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("spd", "torch", "triton", "transformers", "peft", "accelerate", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
