"""LoRA adapters: on a model for training, off it again, and a finished one inside a block."""

from __future__ import annotations

import json
import os
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from spd.errors import InputError
from spd.files import read_json, read_object, sha256, sha256_of_file, write_json
from spd.intervention import refuse_if_attached
from spd.model_state import preserved
from spd.provenance import config_hash, model_name
from spd.recipe import Recipe
from spd.sites import find_sites
from spd.tensor_file import read_header

MANIFEST = "training.json"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_ANY_VALUE = {
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "fan_in_fan_out"),
    *("layers_to_transform", "layers_pattern", "peft_type", "task_type", "auto_mapping", "inference_mode"),
    *("base_model_name_or_path", "revision", "peft_version"),
}
"""Settings of peft that change nothing beyond W + alpha / r B A. Any other must have its default."""
_ATTENTION_LINEARS = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj"),
    *("qkv_proj", "c_attn", "c_proj", "query_key_value", "dense"),  # the fused families' names for them
)


@contextmanager
def adapted(model: nn.Module, adapter: str | Path) -> Iterator[nn.Module]:
    """The model with a trained adapter inside the block; the model as it was afterwards.

    Raises:
        InputError: the folder holds no whole adapter, or one of another base model.
    """
    from peft import PeftModel

    check_original(model, "adapted")
    adapter = Path(adapter)
    if not os.path.isfile(adapter / MANIFEST):
        raise InputError(f"{adapter}: no adapter there ({MANIFEST} is missing)")
    manifest = whole_manifest(adapter)
    if manifest.get("config_sha256") != config_hash(model):
        raise InputError(f"{adapter}: trained on {manifest.get('model')!r}, but the model is {model_name(model)!r}")
    lora = _claimed(model, adapter)
    with (
        preserved(model),
        unloaded_at_the_end(model, PeftModel.from_pretrained(model, str(adapter), config=lora)) as tuned,
    ):
        yield tuned


def check_mergeable(model: nn.Module) -> None:
    """Refuse weights in half precision, in which most of an adapter's small update would vanish."""
    coarse = {str(p.dtype).removeprefix("torch.") for p in model.parameters()} & {"float16", "bfloat16"}
    if coarse:
        raise InputError(
            f"model: its weights are {coarse.pop()}, in which an adapter's small updates vanish when they are merged; "
            "for further rounds load it with dtype float32"
        )


@contextmanager
def merged(model: nn.Module, adapter: str | Path) -> Iterator[nn.Module]:
    """The model with an adapter in its weights inside the block; the very same weights as before afterwards.

    Unlike `adapted` it yields the model itself, which can be calibrated, projected and trained: the start of a further
    round of self-distillation.

    Raises:
        InputError: as `adapted`, or as `check_mergeable`.
    """
    check_mergeable(model)
    originals: list[tuple[nn.Parameter, torch.Tensor]] = []
    try:
        with adapted(model, adapter) as opened:
            tuned: Any = opened
            weights = [layer.get_base_layer().weight for layer in tuned.modules() if hasattr(layer, "get_base_layer")]
            originals += [(weight, weight.detach().clone()) for weight in weights]
            tuned.merge_adapter()
        yield model
    finally:
        with torch.no_grad():
            for weight, original in originals:
                weight.copy_(original)


def with_lora(model: nn.Module, recipe: Recipe) -> Any:
    """A peft model around this one, with a fresh adapter; torch's random numbers make its initial weights."""
    from peft import get_peft_model

    lora = _settings(model, _attention_linears(model), recipe.lora_rank, recipe.lora_alpha, recipe.lora_dropout)
    tuned: Any = get_peft_model(model, lora)
    lora.target_modules = sorted(lora.target_modules or ())  # peft keeps a set, whose order is another in each process
    # embeddings are not trained; otherwise peft asks the hub at every save whether they have another size there
    tuned.save_pretrained = partial(tuned.save_pretrained, save_embedding_layers=False)
    tuned.create_or_update_model_card = lambda folder: None  # a form that nobody fills in, with the machine's paths
    return tuned


@contextmanager
def unloaded_at_the_end(model: nn.Module, tuned: Any) -> Iterator[Any]:
    """The peft model inside the block; its layers out of `model` afterwards, with the traces that peft leaves there."""
    try:
        yield tuned
    finally:
        tuned.unload()
        for name in ("peft_config", "active_adapter"):
            if name in vars(model):
                delattr(model, name)


def save(tuned: Any, folder: Path, manifest: dict[str, Any]) -> None:
    """The adapter in peft's format, and `training.json`, which names the hash of every file and its own."""
    tuned.save_pretrained(folder)
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    files = {path.name: sha256_of_file(path) for path in sorted(folder.iterdir())}
    manifest = manifest | {"weights_sha256": files[WEIGHTS], "files_sha256": files}
    write_json(folder / MANIFEST, manifest | {"manifest_sha256": _hash_of(manifest)})
    for name in files:
        (folder / name).chmod((folder / MANIFEST).stat().st_mode)  # safetensors makes its files private


def whole_manifest(adapter: Path) -> dict[str, Any]:
    """`training.json`, when it and the adapter beside it are as they were written.

    Raises:
        InputError: a file is missing, truncated or altered.
    """
    manifest = read_object(adapter / MANIFEST)
    if "manifest_sha256" in manifest and manifest.pop("manifest_sha256") != _hash_of(manifest):
        raise InputError(f"{adapter / MANIFEST}: altered, its hash is not the one that it names")
    expected = {WEIGHTS: manifest.get("weights_sha256")}
    if isinstance(manifest.get("files_sha256"), dict):
        expected[CONFIG] = manifest["files_sha256"].get(CONFIG)
    for name, digest in expected.items():
        if not os.path.isfile(adapter / name) or sha256_of_file(adapter / name) != digest:
            raise InputError(f"{adapter / name}: missing, truncated or altered")
    return manifest


def read_config(adapter: Path) -> dict[str, Any]:
    """The settings of a plain LoRA."""
    from peft import LoraConfig

    if not os.path.isfile(adapter / CONFIG):
        raise InputError(f"adapter: {adapter} holds none ({CONFIG} is missing)")
    config = read_json(adapter / CONFIG)
    if (adapter / CONFIG).read_bytes().startswith(BOM_UTF8):
        raise InputError(f"{adapter / CONFIG}: begins with a byte order mark, which peft cannot read")
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise InputError(f"adapter: expected one of kind LORA in {adapter}, got {kind!r}")
    defaults = json.loads(json.dumps(LoraConfig().to_dict(), default=str))
    for key, value in config.items():
        absent = value is None or value is False or (isinstance(value, (list, dict)) and not value)  # 0.0 is not
        default = defaults.get(key)
        plain = key in _ANY_VALUE or absent or (type(value) is type(default) and value == default)
        if not plain and (key, value) != ("init_lora_weights", "gaussian"):
            raise InputError(f"adapter: {adapter} is more than plain LoRA: {key} is {value!r}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    real = isinstance(alpha, (int, float)) and not isinstance(alpha, bool) and abs(alpha) < 2**31
    if type(rank) is not int or not 1 <= rank < 2**31 or not real:
        raise InputError(f"{adapter / CONFIG}: expected a rank r and a lora_alpha, got {rank!r} and {alpha!r}")
    return config


def check_original(model: nn.Module, caller: str) -> None:
    refuse_if_attached(model, caller)
    if hasattr(model, "peft_config"):
        raise InputError(f"{caller}: the model carries a peft adapter already; use the original model")


def _claimed(model: nn.Module, adapter: Path) -> Any:
    """The settings for peft; what does not fit is refused before peft makes room for it or changes the model."""
    config, header = read_config(adapter), read_header(adapter / WEIGHTS)
    targets, rank = config.get("target_modules"), config["r"]
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise InputError(f"{adapter / CONFIG}: target_modules: expected a list of names, got {targets!r:.60}")
    expected = {}
    for path, module in model.named_modules():
        if not any(path == target or path.endswith(f".{target}") for target in targets):
            continue
        names = ("nf", "nx") if isinstance(module, Conv1D) else ("out_features", "in_features")
        features, inputs = (getattr(module, name, None) for name in names)
        expected[f"base_model.model.{path}.lora_A.weight"] = (rank, inputs)
        expected[f"base_model.model.{path}.lora_B.weight"] = (features, rank)
    if not expected or {name: entry.shape for name, entry in header.items()} != expected:
        raise InputError(f"{adapter}: its weights are not those of rank {rank} at its target_modules in this model")
    return _settings(model, targets, rank, config["lora_alpha"])


def _settings(model: nn.Module, targets: list[str], rank: int, alpha: float, dropout: float = 0.0) -> Any:
    """A plain LoRA of this model, in peft's terms."""
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(site.k.module, Conv1D) for site in find_sites(model).values()),
        task_type="CAUSAL_LM",
    )


def _hash_of(manifest: dict[str, Any]) -> str:
    return sha256(json.dumps(manifest, sort_keys=True))


def _attention_linears(model: nn.Module) -> list[str]:
    """Dotted names of the q, k, v and o projections, or of their fused forms, at every attention layer."""
    paths = [site.k.path.rpartition(".")[0] for site in find_sites(model).values()]
    return [
        f"{path}.{name}"
        for path in paths
        for name in _ATTENTION_LINEARS
        if isinstance(getattr(model.get_submodule(path), name, None), nn.Module)
    ]
