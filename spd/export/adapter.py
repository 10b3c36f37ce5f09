"""A LoRA adapter for others to use: as peft takes it, or multiplied into the weights of a checkpoint."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spd.adapters import CONFIG, MANIFEST, WEIGHTS, read_config
from spd.errors import InputError
from spd.export.checkpoint import TensorNames, open_checkpoint, write_changed
from spd.export.shards import FLOATS, Change
from spd.files import atomic_folder, read_object, sha256_of_file, write_json
from spd.provenance import config_hash
from spd.tensor_file import read_header

_PREFIX = "base_model.model."


def export_merged(checkpoint: str | Path, adapter: str | Path, out: str | Path) -> Path:
    """Write a checkpoint with a LoRA adapter in its weights: W <- W + alpha / r B A.

    The adapted tensors change, computed in float64 and cast once to their own dtype; the rest of the checkpoint is
    copied as by `spd.export_folded`.

    Args:
        checkpoint: folder, or name on the hub, of the checkpoint the adapter was trained on.
        adapter: folder that `spd.distill`, or peft, wrote.
        out: a folder that does not exist yet.

    Returns:
        `out`.

    Raises:
        InputError: as `spd.export_folded`; or the adapter is damaged, of another model, or more than plain LoRA.
    """
    adapter = Path(adapter)
    config = read_config(adapter)
    tensors = _read_weights(adapter)
    opened = open_checkpoint(checkpoint)
    trained_on = _manifest(adapter).get("config_sha256")
    if trained_on is not None and trained_on != config_hash(opened.model):
        raise InputError(f"adapter: {adapter} was trained on another model than {opened.name}")
    names = TensorNames(opened)
    changes: dict[str, Change] = {}
    for path, (lora_a, lora_b) in _pairs(adapter, tensors, config["r"]).items():
        try:
            module = opened.model.get_submodule(path)
        except AttributeError:
            raise InputError(f"adapter: {adapter} changes {path}, which {opened.name} does not have") from None
        if type(module) not in (nn.Linear, Conv1D):
            raise InputError(f"adapter: {path} is a {type(module).__name__}, which cannot be merged")
        features_first = isinstance(module, nn.Linear)
        update = _update(lora_a, lora_b, config["lora_alpha"] / config["r"], features_first)
        weight: Any = module.weight
        outer = lora_b.shape[0], lora_a.shape[1]
        if outer != tuple(weight.shape if features_first else weight.T.shape):
            raise InputError(
                f"adapter: {path} is {tuple(weight.shape)} in {opened.name}, but {adapter} has B "
                f"{tuple(lora_b.shape)} and A {tuple(lora_a.shape)}"
            )
        changes[names.of(f"{path}.weight")] = update
    record = {"kind": "merged", "model": opened.name, "adapter_sha256": sha256_of_file(adapter / WEIGHTS)}
    return write_changed(opened, out, changes, record | {"adapter_config": config})


def export_adapter(adapter: str | Path, out: str | Path, *, base: str | None = None) -> Path:
    """Write the adapter as peft and engines that serve LoRA take it: its configuration and its weights, no more.

    Args:
        adapter: folder that `spd.distill` wrote.
        out: a folder that does not exist yet.
        base: what to name as the base model, such as its name on the hub; None: what the adapter names.

    Returns:
        `out`.

    Raises:
        InputError: the adapter is damaged or no LoRA, or `out` exists.
    """
    adapter, out = Path(adapter), Path(out)
    config = read_config(adapter)
    _read_weights(adapter)
    with atomic_folder(out) as temporary:
        shutil.copyfile(adapter / WEIGHTS, temporary / WEIGHTS)
        if base is None:
            shutil.copyfile(adapter / CONFIG, temporary / CONFIG)
        else:
            write_json(temporary / CONFIG, config | {"base_model_name_or_path": base})
    return out


def _read_weights(adapter: Path) -> dict[str, Tensor]:
    path = adapter / WEIGHTS
    if not os.path.isfile(path):
        raise InputError(f"adapter: {path} is missing")
    expected = _manifest(adapter).get("weights_sha256")
    if expected is not None and expected != sha256_of_file(path):
        raise InputError(f"{path}: truncated or altered, its hash is not the one in {MANIFEST}")
    for name, entry in read_header(path).items():
        if entry.dtype not in FLOATS:
            raise InputError(f"{path}: {name}: expected floating-point numbers, got {entry.dtype}")
    return load_file(path)


def _manifest(adapter: Path) -> dict[str, Any]:
    """What `spd.distill` left beside the adapter; nothing if peft wrote it."""
    return read_object(adapter / MANIFEST) if os.path.isfile(adapter / MANIFEST) else {}


def _pairs(adapter: Path, tensors: dict[str, Tensor], rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """A (r, inputs) and B (features, r) by the path of the module they change."""
    stems = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    expected = {f"{stem}.lora_{side}.weight" for stem in stems for side in "AB"}
    odd = sorted(expected ^ set(tensors)) or [stem for stem in stems if not stem.startswith(_PREFIX)]
    if odd or not stems:
        raise InputError(
            f"{adapter / WEIGHTS}: expected lora_A.weight and lora_B.weight of each module below {_PREFIX}"
            + (f", not {odd[0]}" if odd else "")
        )
    pairs = {}
    for stem in stems:
        a, b = (tensors[f"{stem}.lora_{side}.weight"] for side in "AB")
        if a.ndim != 2 or b.ndim != 2 or (a.shape[0], b.shape[1]) != (rank, rank):
            raise InputError(
                f"{adapter / WEIGHTS}: {stem}: expected matrices of rank {rank}, got A {tuple(a.shape)} and "
                f"B {tuple(b.shape)}"
            )
        pairs[stem.removeprefix(_PREFIX)] = a, b
    return pairs


def _update(lora_a: Tensor, lora_b: Tensor, scale: float, features_first: bool) -> Change:
    def change(tensor: Tensor) -> Tensor:
        product = scale * (lora_b.double() @ lora_a.double())
        return tensor.double() + (product if features_first else product.T)

    return change
