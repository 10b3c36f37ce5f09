"""A checkpoint folder: which files hold its weights, how it names the model's tensors, and a changed copy of it."""

from __future__ import annotations

import fnmatch
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from spd.errors import InputError
from spd.export.shards import Change, Shard, copy_file, read_shard, rewrite
from spd.files import atomic_folder, read_json, read_object, write_json
from spd.models import PROVING_GROUND
from spd.provenance import versions
from spd.sites import find_sites

RECORD = "spd_export.json"
"""What an export came from. Engines look files up by name or by suffix of weights, and pass it over."""

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx*")
_UNRELATED = (".git", ".cache")


@dataclass(frozen=True)
class Checkpoint:
    """A folder in the format of transformers, with safetensors weights.

    Args:
        name: what the user called it: a folder or a hub name.
        folder: where it lies.
        shards: its weights, by file name.
        model: its model, without weights.
    """

    name: str
    folder: Path
    shards: Mapping[str, Shard]
    model: nn.Module

    def fingerprint(self) -> str:
        """Hash of every tensor's name, dtype, shape and some bytes: cheap, and tells one training from another."""
        digest = hashlib.sha256()
        for _, shard in sorted(self.shards.items()):
            for name, entry, samples in shard.samples():
                digest.update(f"{name} {entry.dtype} {entry.shape} ".encode() + samples)
        return digest.hexdigest()


def open_checkpoint(name: str | Path) -> Checkpoint:
    """A checkpoint folder, or a hub name, whose files are fetched if they are not there.

    Raises:
        InputError: it is none, cannot be read, is quantised, or has no safetensors weights.
    """
    folder = _folder(name)
    if not os.path.isfile(folder / "config.json"):
        raise InputError(f"model: the folder {folder} holds no checkpoint (config.json is missing)")
    settings = read_object(folder / "config.json")
    for key in ("quantization_config", "compression_config"):
        if how := settings.get(key):
            method = how.get("quant_method", "unnamed") if isinstance(how, dict) else how
            raise InputError(
                f"model: {name} is quantised ({key}, {method}); projections and adapters go into the floating-point "
                "checkpoint it was made from"
            )
    shards = {path.name: read_shard(path) for path in _weight_files(folder)}
    _check_index(folder, shards)
    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # an unknown architecture, or a configuration of the wrong form: no common class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"model: {name} is no causal language model that transformers knows ({reason})") from error
    return Checkpoint(str(name), folder, shards, model)


class TensorNames:
    """From parameters of the model to tensors of the checkpoint.

    Checkpoints name the layers of the text decoder as the model does, but for what comes before: `h.0` for
    `transformer.h.0`, `language_model.model.layers.0` for `model.language_model.layers.0`. The one beginning is taken
    under which all attention layers are found, with their shapes.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._model = checkpoint.model
        self._shapes = {
            name: each.shape for shard in checkpoint.shards.values() for name, each in shard.tensors.items()
        }
        sites = find_sites(self._model)
        parameters = dict(self._model.named_parameters())
        attention = [site.k.path.rpartition(".")[0] for site in sites.values()]
        self._own = _beginning(attention[0])
        needed = {
            name.removeprefix(self._own): tuple(parameter.shape)
            for name, parameter in parameters.items()
            if any(name.startswith(f"{path}.") for path in attention)
        }
        first = next(iter(needed))
        candidates = [key.removesuffix(first) for key in self._shapes if key.endswith(first)]
        fitting = [
            start
            for start in candidates
            if (not start or start.endswith("."))
            and all(self._shapes.get(start + rest) == shape for rest, shape in needed.items())
        ]
        if self._own in fitting:
            fitting = [self._own]
        if len(fitting) != 1:
            found = "none" if not fitting else ", ".join(f"{start}{first}" for start in fitting)
            raise InputError(
                f"model: {checkpoint.name}: expected its weights to hold all attention layers under one name each, "
                f"as {self._own}{first}; found {found}"
            )
        self._theirs = fitting[0]

    def of(self, parameter: str) -> str:
        """The tensor of a parameter of the decoder's layers.

        Raises:
            InputError: the checkpoint has none of that name and shape.
        """
        name = self._theirs + parameter.removeprefix(self._own)
        shape = tuple(self._model.get_parameter(parameter).shape)
        if not parameter.startswith(self._own) or self._shapes.get(name) != shape:
            raise InputError(f"model: the checkpoint has no tensor of shape {shape} for {parameter}")
        return name


def write_changed(
    checkpoint: Checkpoint, out: str | Path, changes: Mapping[str, Change], record: Mapping[str, Any]
) -> Path:
    """A copy of the checkpoint with some tensors changed; every other byte of its files is the same.

    Files that hold the weights once more in another form are left out: they would still hold the old ones.

    Args:
        checkpoint: what to copy.
        out: a folder that does not exist yet; it appears when it is whole.
        changes: tensor name -> what makes its new values.
        record: what to say in `spd_export.json`, beside the files' hashes.
    """
    out, source = Path(out), checkpoint.folder.resolve()
    if out.resolve().is_relative_to(source):
        raise InputError(f"out: {out} lies in the checkpoint's own folder")
    files = _files(source)
    left_out = [
        str(path) for path in files if str(path) not in checkpoint.shards and _matches(path.name, _OTHER_WEIGHTS)
    ]
    hashes: dict[str, dict[str, str]] = {}
    with atomic_folder(out) as temporary:
        for path in files:
            name = str(path)
            if name in left_out or name == RECORD:
                continue
            (temporary / path).parent.mkdir(parents=True, exist_ok=True)
            shard = checkpoint.shards.get(name)
            own = {tensor: change for tensor, change in changes.items() if shard and tensor in shard.tensors}
            if shard and own:
                before, after = rewrite(shard, temporary / path, own)
                hashes[name] = {"base_sha256": before, "sha256": after}
            else:
                digest = copy_file(source / path, temporary / path)
                hashes[name] = {"base_sha256": digest, "sha256": digest}
        earlier = {"base_export": read_json(source / RECORD)} if (source / RECORD).is_file() else {}
        written = {"changed": sorted(changes), "left_out": left_out, "files": hashes, "versions": versions()}
        write_json(temporary / RECORD, {**record, **written, **earlier})
    return out


def _folder(name: str | Path) -> Path:
    if name == PROVING_GROUND:
        from spd.proving_ground import checkpoint

        return Path(checkpoint())
    if os.path.isdir(name):
        return Path(name)
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(str(name), ignore_patterns=[*_OTHER_WEIGHTS[1:], "consolidated*"])
        )
    except (OSError, ValueError) as error:  # no network, no such repository, no valid name
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"model: {name} is no folder, and could not be had from the hub ({reason})") from None


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        if (folder / WEIGHTS).is_file():
            raise InputError(
                f"model: {folder} holds {WEIGHTS} and {INDEX}, which are read by different engines; keep one"
            )
        index = read_json(folder / INDEX)
        named = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(named, dict) or not named:
            raise InputError(f"{folder / INDEX}: expected a weight_map")
        files = [folder / Path(str(name)).name for name in sorted(set(named.values()))]
    else:
        files = [folder / WEIGHTS]
    missing = [path.name for path in files if not os.path.isfile(path)]
    if not missing:
        return files
    if any(folder.glob("*.bin")):
        raise InputError(
            f"model: {folder} holds pickled weights (.bin), which are not read; load it with transformers and "
            "save_pretrained it once, which writes safetensors"
        )
    raise InputError(f"model: {folder} lacks {', '.join(missing)}")


def _check_index(folder: Path, shards: Mapping[str, Shard]) -> None:
    """What the index says is in a file, is in it."""
    if not (folder / INDEX).is_file():
        return
    for tensor, name in read_json(folder / INDEX)["weight_map"].items():
        if tensor not in shards[Path(str(name)).name].tensors:
            raise InputError(f"{folder / name}: holds no {tensor}, which {INDEX} says it does")


def _files(folder: Path) -> list[Path]:
    """Every file below, relative, sorted; links are followed, as the hub's cache is made of them."""
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in paths if path.parts[0] not in _UNRELATED]


def _beginning(path: str) -> str:
    """What comes before the list of layers: `model.` of `model.layers.3.self_attn`."""
    parts = path.split(".")
    layers = next(position for position, part in enumerate(parts) if part.isdecimal()) - 1
    return "".join(f"{part}." for part in parts[:layers])


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
