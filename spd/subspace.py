"""A subspace: for each layer the bases U_K and U_V, their spectra, and where they came from.

It is calibrated, or made of calibrated ones by union, intersection and complement.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from spd import algebra
from spd.comparison import Comparison, compare_bases
from spd.errors import InputError
from spd.files import atomic_file, read_json, sha256, sha256_of_file, write_json
from spd.named import check_rank
from spd.provenance import config_hash, model_name, versions

FORMAT = 1
MANIFEST = "subspace.json"
FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of numbers in a tensors file, as safetensors names them."""


@dataclass(frozen=True, eq=False)
class Basis:
    """The top right singular vectors of one centred gradient matrix G.

    Args:
        basis: U, (d, r) float32, orthonormal columns in descending order of singular value.
        singular_values: (d,) float64, all singular values of G, descending. Of a derived subspace they are not known:
            one for each direction that is kept, zero for the others.
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


@dataclass(frozen=True)
class Energy:
    """Share of the squared singular values that is kept, by layer and side ("k" or "v")."""

    sites: dict[tuple[int, str], float]

    @property
    def mean(self) -> float:
        return fmean(self.sites.values())

    def to_dict(self) -> dict[str, Any]:
        by_site = {f"layer {layer} {side.upper()}": share for (layer, side), share in self.sites.items()}
        return {"mean": self.mean, "sites": by_site}


@dataclass(frozen=True, eq=False)
class Subspace:
    """Bases of K and V by layer index, and a provenance of plain JSON values.

    `provenance` carries at least `model` (name) and `config_sha256` when it comes from `spd.calibrate`; these are
    what loading and attaching check. That of a derived subspace says under `derived` by which operation it was made and
    of what: the hash and the whole provenance of each parent.
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

    @property
    def derived(self) -> str | None:
        """Which operation made this of other subspaces, if one did. Then its spectra are not known."""
        derived = self.provenance.get("derived")
        return str(derived.get("operation")) if isinstance(derived, dict) else None

    @property
    def sha256(self) -> str:
        """Hash of all bases and spectra: that of the tensors file which `save_pretrained` writes."""
        return sha256(self._tensors())

    def energy(self, rank: Literal["half"] | str | int | None = None) -> Energy:
        """Share of the squared singular values in the leading directions of each site.

        Args:
            rank: how many directions, as for `spd.calibrate`, up to d; None: those that are kept.

        Raises:
            InputError: a rank beyond d, or a derived subspace, whose singular values are not known.
        """
        self._refuse_if_derived("energy")
        return Energy(
            {
                (layer, side): basis.energy(None if rank is None else choose_rank(rank, basis.singular_values))
                for layer, side, basis in self._sites()
            }
        )

    def compare(self, other: Subspace) -> Comparison:
        """Principal angles, distance and overlap at every layer that both have.

        Raises:
            InputError: another model, other widths, or no common layer.
        """
        sites = (
            compare_bases(layer, side, self.side(side)[layer], other.side(side)[layer])
            for layer in self._common_layers(other)
            for side in "kv"
        )
        return Comparison(tuple(sites))

    def union(self, other: Subspace) -> Self:
        """The span of both, what they share first; at a layer that only one has, its basis.

        A site has r_1 + r_2 directions, less those that both hold within `spd.algebra.SAME` degrees.

        Raises:
            InputError: another model, or other widths.
        """
        self._check_same_model(other)

        def join(layer: int, side: str) -> Tensor:
            one, two = self.side(side).get(layer), other.side(side).get(layer)
            if one is None or two is None:
                return (one or two).basis  # type: ignore[union-attr]
            return algebra.union(one.basis, two.basis)

        return self._derive("union", sorted({*self.layers, *other.layers}), join, other, same=algebra.SAME)

    def intersect(self, other: Subspace, angle: float) -> Self:
        """What both hold, at the layers that both have: directions half-way between those that lie within `angle`.

        Args:
            other: another subspace of the same model.
            angle: how many degrees apart two principal directions may be and count as one, above 0 and up to 90.
                Calibrations on different examples never agree exactly; `compare` tells the angles there are.

        Raises:
            InputError: another model, other widths, no common layer, or a site with no direction in common (all such
                are named, with the least angle there).
        """
        if isinstance(angle, bool) or not isinstance(angle, (int, float)) or not 0 < angle <= 90:
            raise InputError(f"angle: expected degrees above 0 and up to 90, got {angle!r}")
        layers = self._common_layers(other)
        apart = [site for site in self.compare(other).sites if site.angles[0] > angle]
        if apart:
            least = ", ".join(f"{site.site} ({site.angles[0]:.3g})" for site in apart)
            raise InputError(
                f"angle: no directions of the two subspaces are within {angle:g} degrees at {least}; in brackets the "
                "least angle there"
            )

        def meet(layer: int, side: str) -> Tensor:
            return algebra.intersection(self.side(side)[layer].basis, other.side(side)[layer].basis, angle)

        return self._derive("intersect", layers, meet, other, angle=angle)

    def complement(self) -> Self:
        """The d - r directions that this subspace leaves out, in no particular order.

        Projecting on it is `spd.attach` with this one, a = 1 and b = -1.

        Raises:
            InputError: a site that holds all d directions leaves none.
        """
        full = [f"layer {layer} {side.upper()}" for layer, side, basis in self._sites() if basis.rank == basis.width]
        if full:
            raise InputError(f"complement: nothing is left of {', '.join(full)}, which holds all d directions")
        return self._derive("complement", self.layers, lambda at, side: algebra.complement(self.side(side)[at].basis))

    def truncate(self, rank: Literal["half"] | str | int) -> Self:
        """The leading directions only, as many as `spd.calibrate(rank=rank)` would have kept.

        Raises:
            InputError: this subspace does not hold so many, or is derived and has no energy to choose by.
        """
        if isinstance(rank, str) and rank.startswith("energy:"):
            self._refuse_if_derived("rank")

        def cut(basis: Basis) -> Basis:
            r = choose_rank(rank, basis.singular_values)
            if r > basis.rank:
                raise InputError(f"rank: {rank!r} asks for {r} directions, of which only {basis.rank} were kept")
            return Basis(basis.basis[:, :r].contiguous(), basis.singular_values)

        settings = self.provenance.get("settings")
        settings = (settings if isinstance(settings, dict) else {}) | {"rank": rank}
        return type(self)(
            {layer: cut(basis) for layer, basis in self.k.items()},
            {layer: cut(basis) for layer, basis in self.v.items()},
            self.provenance | {"settings": settings},
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `subspace-HASH.safetensors` and then `subspace.json`, which names it.

        An earlier subspace in the folder holds until the manifest is in place, whatever happens before. The same
        subspace gives the same bytes.
        """
        folder = Path(folder)
        data = self._tensors()
        digest = sha256(data)
        name = f"subspace-{digest[:12]}.safetensors"
        with atomic_file(folder / name) as temporary:
            temporary.write_bytes(data)
        content = {"format": FORMAT, "layers": self.layers, "tensors": name, "tensors_sha256": digest}
        content |= {"provenance_sha256": provenance_hash(self.provenance), "provenance": self.provenance}
        write_json(folder / MANIFEST, content)
        for path in folder.glob("subspace-*.safetensors"):
            if path.name != name:
                path.unlink()

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: nn.Module | None = None) -> Self:
        """Read what `save_pretrained` wrote.

        Args:
            folder: the folder; or, where there is none of this name, "user/name" on the hub.
            model: if given, the model the subspace is meant for.

        Raises:
            InputError: a file is missing, truncated or altered, claims what is no subspace, or the subspace belongs to
                another model.
        """
        if not os.path.exists(folder):
            from spd.hub import fetch, is_repo_id

            folder = fetch(str(folder)) if is_repo_id(str(folder)) else folder
        folder = Path(folder)
        if not os.path.isfile(folder / MANIFEST):
            raise InputError(f"{folder}: not a subspace folder, {MANIFEST} is missing")
        manifest = read_json(folder / MANIFEST)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
            raise InputError(f"{folder / MANIFEST}: expected a subspace manifest of format {FORMAT}, got {found!r}")
        name = str(manifest.get("tensors"))
        path = folder / Path(name).name  # a manifest does not lead out of its folder
        if not os.path.isfile(path):
            raise InputError(f"{folder}: {name}, which {MANIFEST} names, is missing")
        if sha256_of_file(path) != manifest.get("tensors_sha256"):
            raise InputError(f"{path}: truncated or altered, its hash is not the one in {MANIFEST}")
        provenance = manifest.get("provenance") or {}
        if not isinstance(provenance, dict):
            raise InputError(f"{folder / MANIFEST}: expected a provenance of names and values, got {provenance!r:.60}")
        if provenance_hash(provenance) != manifest.get("provenance_sha256", provenance_hash(provenance)):
            raise InputError(f"{folder / MANIFEST}: altered, the hash of its provenance is not the one it names")
        k, v = _read_bases(folder, path, manifest.get("layers"))
        try:
            subspace = cls(k, v, provenance)
        except InputError as error:
            raise InputError(f"{folder}: {error}") from None
        if model is not None:
            subspace.check_model(model)
        return subspace

    def push_to_hub(self, repo_id: str, **settings: Any) -> str:
        """Upload to "user/name" on the hub, with a model card; see `spd.hub.push_to_hub`. Returns the address."""
        from spd.hub import push_to_hub

        return push_to_hub(self, repo_id, **settings)

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model of another configuration than the one this subspace was calibrated on."""
        expected = self.provenance.get("config_sha256")
        if expected is not None and expected != config_hash(model):
            raise InputError(
                f"subspace: calibrated on {self.provenance.get('model', 'an unnamed model')!r}, "
                f"but the model is {model_name(model)!r}, whose configuration differs"
            )

    def _sites(self) -> list[tuple[int, str, Basis]]:
        return [(layer, side, self.side(side)[layer]) for layer in self.layers for side in "kv"]

    def _tensors(self) -> bytes:
        from safetensors.torch import save

        tensors = {}
        for side in ("k", "v"):
            for layer, basis in self.side(side).items():
                tensors[f"{side}.{layer}.basis"] = basis.basis.clone(memory_format=torch.contiguous_format)
                tensors[f"{side}.{layer}.singular_values"] = basis.singular_values.clone()
        return save(tensors)

    def _check_same_model(self, other: Subspace) -> None:
        one, two = self.provenance.get("config_sha256"), other.provenance.get("config_sha256")
        if one is not None and two is not None and one != two:
            raise InputError(
                f"other: expected a subspace of {self.provenance.get('model', 'the same model')!r}, got one of "
                f"{other.provenance.get('model', 'another')!r}, whose configuration differs"
            )
        for layer in sorted({*self.layers} & {*other.layers}):
            for side in "kv":
                d, found = self.side(side)[layer].width, other.side(side)[layer].width
                if d != found:
                    raise InputError(f"other: expected d = {d} at {side.upper()} of layer {layer}, got {found}")

    def _common_layers(self, other: Subspace) -> list[int]:
        self._check_same_model(other)
        layers = sorted({*self.layers} & {*other.layers})
        if not layers:
            raise InputError(f"other: expected a layer in common with {self.layers}, got {other.layers}")
        return layers

    def _refuse_if_derived(self, name: str) -> None:
        if self.derived:
            raise InputError(
                f"{name}: the singular values of this subspace are not known, since it was made by {self.derived}; "
                "ask its parents, or give a number of directions"
            )

    def _derive(
        self, operation: str, layers: list[int], make: Callable[[int, str], Tensor], *others: Subspace, **settings: Any
    ) -> Self:
        """A subspace of what `make` gives at each site, and a provenance that names the operation and its parents."""

        def basis(layer: int, side: str) -> Basis:
            u = make(layer, side).detach().float().cpu().contiguous()
            kept = torch.arange(u.shape[0]) < u.shape[1]
            return Basis(u, kept.double())

        parents: list[Subspace] = [self, *others]
        identity = {
            key: next(each.provenance[key] for each in parents if key in each.provenance)
            for key in ("model", "model_class", "config_sha256")
            if any(key in each.provenance for each in parents)
        }
        named = [{"tensors_sha256": each.sha256, "provenance": each.provenance} for each in parents]
        provenance = identity | {
            "derived": {"operation": operation, **settings, "parents": named},
            "versions": versions(),
        }
        k, v = ({layer: basis(layer, side) for layer in layers} for side in "kv")
        return type(self)(k, v, provenance)


def _read_bases(folder: Path, path: Path, layers: object) -> list[dict[int, Basis]]:
    """Those of K and those of V, once the header says that they are there, of a form that bases can have."""
    from safetensors.torch import load_file

    from spd.tensor_file import read_header

    if not isinstance(layers, list) or not all(type(layer) is int and layer >= 0 for layer in layers):
        raise InputError(f"{folder / MANIFEST}: layers: expected a list of their indices, got {layers!r:.60}")
    header = read_header(path)
    names = {f"{side}.{layer}.{part}" for side in "kv" for layer in layers for part in ("basis", "singular_values")}
    if differing := sorted(header.keys() ^ names):
        missing = "is missing" if differing[0] in names else "is of no layer"
        raise InputError(f"{folder}: the two files do not belong together ({differing[0]!r:.60} {missing})")
    for name, entry in header.items():
        if entry.dtype not in FLOATS or 0 in entry.shape:
            raise InputError(f"{path}: {name}: expected floating-point numbers, got {entry.dtype} {entry.shape}")
    tensors = load_file(path)
    return [
        {layer: Basis(tensors[f"{side}.{layer}.basis"], tensors[f"{side}.{layer}.singular_values"]) for layer in layers}
        for side in "kv"
    ]


def provenance_hash(provenance: Mapping[str, Any]) -> str:
    """Hash of a provenance, whatever the order of its keys."""
    return sha256(json.dumps(provenance, sort_keys=True, ensure_ascii=False))


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


def _check(name: str, basis: Basis) -> None:
    u, singular_values = basis.basis, basis.singular_values
    if u.ndim != 2 or not 1 <= u.shape[1] <= u.shape[0]:
        raise InputError(f"{name}.basis: expected (d, r) with 1 <= r <= d, got {tuple(u.shape)}")
    if singular_values.shape != (u.shape[0],):
        raise InputError(f"{name}.singular_values: expected shape ({u.shape[0]},), got {tuple(singular_values.shape)}")
    if not (u.is_floating_point() and torch.isfinite(u).all() and torch.isfinite(singular_values).all()):
        raise InputError(f"{name}: expected finite floating-point tensors")
    squares = float(singular_values.double().square().sum())
    if (singular_values < 0).any() or not 0 < squares < float("inf"):
        raise InputError(
            f"{name}.singular_values: expected numbers of at least 0, with a sum of squares above it, got "
            f"{float(singular_values.min()):.3g} to {float(singular_values.max()):.3g}"
        )
    defect = float((u.T.double() @ u.double() - torch.eye(u.shape[1], dtype=torch.float64)).abs().max())
    if defect > 1e-3:
        raise InputError(f"{name}.basis: columns are not orthonormal (largest defect {defect:.1e})")
