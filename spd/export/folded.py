"""The projection in the weights of a checkpoint: W <- a W + b U Uᵀ W, bias alike, in k_proj and v_proj alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spd.errors import InputError
from spd.export.checkpoint import TensorNames, open_checkpoint, write_changed
from spd.export.shards import Change
from spd.intervention.fold import fold_into
from spd.intervention.target import Target, find_targets
from spd.sites import find_sites
from spd.subspace import Subspace


def export_folded(
    checkpoint: str | Path,
    subspace: Subspace | str | Path,
    out: str | Path,
    *,
    sides: Literal["kv", "k", "v"] | str = "kv",
    a: float = 0.0,
    b: float = 1.0,
) -> Path:
    """Write a checkpoint that is projected wherever it is loaded: transformers, vLLM, SGLang, TGI.

    The K and V tensors of the subspace's layers change, computed in float64 and cast once to their own dtype. All
    other tensors, the headers, the index and every other file are the original's, byte for byte; `spd_export.json` is
    added and says where it came from. Other copies of the weights (.bin, .gguf, ...) are left out and named there.

    Args:
        checkpoint: folder, or name on the hub, of a checkpoint with safetensors weights.
        subspace: a subspace, or its folder, calibrated on a model of the same configuration.
        out: a folder that does not exist yet.
        sides: which of K and V.
        a: weight of the unprojected activation, as for `spd.attach`.
        b: weight of the projection.

    Returns:
        `out`.

    Raises:
        InputError: the checkpoint is quantised, torn, pickled or of another model, the subspace is damaged, or `out`
            exists.
    """
    if sides not in ("kv", "k", "v"):
        raise InputError(f'sides: expected "kv", "k" or "v", got {sides!r}')
    for name, value in (("a", a), ("b", b)):
        if not math.isfinite(value):
            raise InputError(f"{name}: expected a finite number, got {value!r}")
    if not isinstance(subspace, Subspace):
        subspace = Subspace.from_pretrained(subspace)
    opened = open_checkpoint(checkpoint)
    subspace.check_model(opened.model)
    names = TensorNames(opened)
    by_tensor: dict[str, list[Target]] = defaultdict(list)
    for target in find_targets(find_sites(opened.model), subspace, sides):
        module = target.projection.module
        if type(module) not in (nn.Linear, Conv1D):
            raise InputError(f"model: {target.projection.path} is a {type(module).__name__}, which cannot be folded")
        for parameter, _ in module.named_parameters(recurse=False):
            by_tensor[names.of(f"{target.projection.path}.{parameter}")].append(target)
    record = {
        "kind": "folded",
        "model": opened.name,
        "sides": sides,
        "a": a,
        "b": b,
        "layers": subspace.layers,
        "subspace_sha256": subspace.sha256,
        "subspace_provenance": subspace.provenance,
    }
    return write_changed(opened, out, {name: _fold(each, a, b) for name, each in by_tensor.items()}, record)


def _fold(targets: Sequence[Target], a: float, b: float) -> Change:
    """K and V of one tensor: of one linear layer, or of both where they are fused."""

    def change(tensor: Tensor) -> Tensor:
        new = tensor.double()
        for target in targets:
            fold_into(new, target.projection, target.basis, a, b)
        return new

    return change
