"""A calibrated subspace: for each layer the bases U_K and U_V, their spectra, and where they came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from spd.errors import InputError
from spd.files import atomic_file, read_json, sha256, sha256_of_file, write_json
from spd.provenance import config_hash, model_name

FORMAT = 1
MANIFEST = "subspace.json"


@dataclass(frozen=True, eq=False)
class Basis:
    """The top right singular vectors of one centred gradient matrix G.

    Args:
        basis: U, (d, r) float32, orthonormal columns in descending order of singular value.
        singular_values: (d,) float64, all singular values of G, descending.
    """

    basis: Tensor
    singular_values: Tensor

    @property
    def rank(self) -> int:
        return self.basis.shape[1]

    @property
    def width(self) -> int:
        return self.basis.shape[0]

    def energy(self, rank: int | None = None) -> float:
        """Share of the squared singular values in the first `rank` (default: this basis's rank)."""
        squares = self.singular_values.double().square()
        return float(squares[: self.rank if rank is None else rank].sum() / squares.sum())


@dataclass(frozen=True, eq=False)
class Subspace:
    """Bases of K and V by layer index, and a provenance of plain JSON values.

    `provenance` carries at least `model` (name) and `config_sha256` when it comes from `spd.calibrate`; these are
    what loading and attaching check.
    """

    k: Mapping[int, Basis]
    v: Mapping[int, Basis]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.k or set(self.k) != set(self.v):
            raise InputError(
                f"Subspace: expected the same layers on both sides, got k {list(self.k)}, v {list(self.v)}"
            )
        for side, bases in (("k", self.k), ("v", self.v)):
            for layer, basis in bases.items():
                _check(f"Subspace.{side}[{layer}]", basis)

    @property
    def layers(self) -> list[int]:
        return sorted(self.k)

    def side(self, side: Literal["k", "v"] | str) -> Mapping[int, Basis]:
        return self.k if side == "k" else self.v

    def truncate(self, rank: Literal["half"] | str | int) -> Self:
        """The leading directions only, as many as `spd.calibrate(rank=rank)` would have kept.

        Raises:
            InputError: this subspace does not hold so many.
        """

        def cut(basis: Basis) -> Basis:
            r = choose_rank(rank, basis.singular_values)
            if r > basis.rank:
                raise InputError(f"rank: {rank!r} asks for {r} directions, of which only {basis.rank} were kept")
            return Basis(basis.basis[:, :r].contiguous(), basis.singular_values)

        settings = {**self.provenance.get("settings", {}), "rank": rank}
        return type(self)(
            {layer: cut(basis) for layer, basis in self.k.items()},
            {layer: cut(basis) for layer, basis in self.v.items()},
            self.provenance | {"settings": settings},
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `subspace-HASH.safetensors` and then `subspace.json`, which names it.

        An earlier subspace in the folder holds until the manifest is in place, whatever happens before.
        """
        from safetensors.torch import save

        folder = Path(folder)
        tensors = {}
        for side in ("k", "v"):
            for layer, basis in self.side(side).items():
                tensors[f"{side}.{layer}.basis"] = basis.basis.clone(memory_format=torch.contiguous_format)
                tensors[f"{side}.{layer}.singular_values"] = basis.singular_values.clone()
        data = save(tensors)
        digest = sha256(data)
        name = f"subspace-{digest[:12]}.safetensors"
        with atomic_file(folder / name) as temporary:
            temporary.write_bytes(data)
        content = {"format": FORMAT, "layers": self.layers, "tensors": name, "tensors_sha256": digest}
        write_json(folder / MANIFEST, content | {"provenance": self.provenance})
        for path in folder.glob("subspace-*.safetensors"):
            if path.name != name:
                path.unlink()

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: nn.Module | None = None) -> Self:
        """Read what `save_pretrained` wrote.

        Args:
            folder: the folder.
            model: if given, the model the subspace is meant for.

        Raises:
            InputError: a file is missing, truncated or altered, or the subspace belongs to another model.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise InputError(f"{folder}: not a subspace folder, {MANIFEST} is missing")
        manifest = read_json(folder / MANIFEST)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
            raise InputError(f"{folder / MANIFEST}: expected a subspace manifest of format {FORMAT}, got {found!r}")
        name = str(manifest.get("tensors"))
        path = folder / Path(name).name  # a manifest does not lead out of its folder
        if not path.is_file():
            raise InputError(f"{folder}: {name}, which {MANIFEST} names, is missing")
        if sha256_of_file(path) != manifest.get("tensors_sha256"):
            raise InputError(f"{path}: truncated or altered, its hash is not the one in {MANIFEST}")
        try:
            tensors = load_file(path)
            sides = {
                side: {
                    int(layer): Basis(tensors[f"{side}.{layer}.basis"], tensors[f"{side}.{layer}.singular_values"])
                    for layer in manifest["layers"]
                }
                for side in ("k", "v")
            }
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{folder}: the two files do not belong together ({error})") from None
        subspace = cls(sides["k"], sides["v"], manifest.get("provenance") or {})
        if model is not None:
            subspace.check_model(model)
        return subspace

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model of another configuration than the one this subspace was calibrated on."""
        expected = self.provenance.get("config_sha256")
        if expected is not None and expected != config_hash(model):
            raise InputError(
                f"subspace: calibrated on {self.provenance.get('model', 'an unnamed model')!r}, "
                f"but the model is {model_name(model)!r}, whose configuration differs"
            )


def choose_rank(rank: Literal["half", "full"] | str | int, singular_values: Tensor) -> int:
    """Resolve "half" (d // 2), "full" (d), "energy:p" (smallest r with p of the squared singular values), or a rank."""
    check_rank(rank)
    d = singular_values.numel()
    if rank == "full":
        return d
    if rank == "half":
        return max(1, d // 2)
    if isinstance(rank, str):
        share = float(rank.removeprefix("energy:"))
        energy = singular_values.double().square().cumsum(0)
        return min(d, 1 + int((energy < share * energy[-1]).sum()))
    if rank > d:
        raise InputError(f"rank: expected at most d = {d}, got {rank}")
    return rank


def check_rank(rank: object) -> None:
    """Raise InputError unless `rank` is "half", "full", "energy:p" with 0 < p <= 1, or a positive integer."""
    if rank in ("half", "full") or (isinstance(rank, int) and not isinstance(rank, bool) and rank > 0):
        return
    if isinstance(rank, str) and rank.startswith("energy:"):
        try:
            if 0.0 < float(rank.removeprefix("energy:")) <= 1.0:
                return
        except ValueError:
            pass
    raise InputError(f'rank: expected "half", "full", "energy:p" with 0 < p <= 1, or a positive integer, got {rank!r}')


def _check(name: str, basis: Basis) -> None:
    u, singular_values = basis.basis, basis.singular_values
    if u.ndim != 2 or not 1 <= u.shape[1] <= u.shape[0]:
        raise InputError(f"{name}.basis: expected (d, r) with 1 <= r <= d, got {tuple(u.shape)}")
    if singular_values.shape != (u.shape[0],):
        raise InputError(f"{name}.singular_values: expected shape ({u.shape[0]},), got {tuple(singular_values.shape)}")
    if not (u.is_floating_point() and torch.isfinite(u).all() and torch.isfinite(singular_values).all()):
        raise InputError(f"{name}: expected finite floating-point tensors")
    defect = float((u.T.double() @ u.double() - torch.eye(u.shape[1], dtype=torch.float64)).abs().max())
    if defect > 1e-3:
        raise InputError(f"{name}.basis: columns are not orthonormal (largest defect {defect:.1e})")
