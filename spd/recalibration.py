"""Whether a subspace still is where correctness is decided: calibrate again on fresh examples and compare.

Angles and overlap say how far the basis moved, and weigh every direction alike. The decision is by energy: how much of
the fresh gradients the old basis catches. Two yardsticks stand beside each: chance, r/d for both, and the noise of
calibration itself, from halves of the fresh examples, which the very same model sees.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from statistics import fmean
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from spd.calibration import calibrate
from spd.comparison import SiteComparison, compare_bases
from spd.errors import InputError
from spd.example import Example
from spd.progress import bar
from spd.record import example_hashes
from spd.subspace import Basis, Subspace

ABOVE_CHANCE = 0.05
"""Of the way from chance to all energy: what a half must catch of the other before anything can be told."""


@dataclass(frozen=True)
class SiteDrift:
    """One layer and side.

    Args:
        comparison: the old basis with the fresh one, of the same rank: angles, overlap, chance.
        noise: overlap of two fresh bases from halves of the examples, mean over the splits.
        energy: share of the fresh gradients' energy (squared singular values of G) in the old basis.
        repeat: share of one half's energy in the other half's basis, mean over halves and splits.
    """

    comparison: SiteComparison
    noise: float
    energy: float
    repeat: float

    @property
    def overlap(self) -> float:
        return self.comparison.overlap

    @property
    def by_chance(self) -> float:
        """r / d, of overlap and of energy."""
        return self.comparison.by_chance

    @property
    def tells(self) -> bool:
        """Whether something could be lost: not all d directions are kept, and calibration repeats."""
        whole = self.comparison.ranks[0] == self.comparison.width
        return not whole and self.repeat - self.by_chance >= ABOVE_CHANCE * (1 - self.by_chance)

    @property
    def kept(self) -> float | None:
        """(energy - chance) / (repeat - chance): 1 or more as good as a fresh basis, 0 as a random one."""
        return (self.energy - self.by_chance) / (self.repeat - self.by_chance) if self.tells else None

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.comparison.to_dict(),
            "noise": self.noise,
            "energy": self.energy,
            "repeat": self.repeat,
            "kept": self.kept,
        }


_MEASURED = ("energy", "repeat", "by_chance")


@dataclass(frozen=True)
class Drift:
    """What `drift` found.

    Args:
        sites: layer by layer, K before V.
        threshold: see `drift`.
        examples: how many fresh ones.
        seen: how many of them the old calibration had used; None if its provenance does not say.
    """

    sites: tuple[SiteDrift, ...]
    threshold: float
    examples: int
    seen: int | None

    @property
    def kept(self) -> float | None:
        """As of one site, with the sums over those that can tell; None if none can."""
        telling = [site for site in self.sites if site.tells]
        if not telling:
            return None
        lost = sum(site.repeat - site.energy for site in telling)
        return 1 - lost / sum(site.repeat - site.by_chance for site in telling)

    @property
    def recalibrate(self) -> bool | None:
        """Whether to calibrate anew; None where it cannot be told."""
        return None if self.kept is None else self.kept < self.threshold

    @property
    def reason(self) -> str:
        telling = [site for site in self.sites if site.tells] or self.sites
        energy, repeat, chance = (fmean(getattr(site, name) for site in telling) for name in _MEASURED)
        measured = (
            f"the subspace catches {energy:.2f} of the fresh gradients' energy, where one from half of the examples "
            f"catches {repeat:.2f} of the other half's and chance {chance:.2f}"
        )
        if self.kept is None:
            return f"cannot be told, more than {self.examples} examples are needed: {measured}"
        said = "recalibrate" if self.recalibrate else "no need to recalibrate"
        return f"{said}: {measured}; {100 * self.kept:.0f} % kept, threshold {100 * self.threshold:g} %"

    def to_dict(self) -> dict[str, Any]:
        return {
            "recalibrate": self.recalibrate,
            "reason": self.reason,
            "kept": self.kept,
            "threshold": self.threshold,
            "examples": self.examples,
            "seen": self.seen,
            "sites": [site.to_dict() for site in self.sites],
        }


def drift(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    subspace: Subspace,
    examples: Sequence[Example],
    *,
    threshold: float = 0.8,
    splits: int = 3,
    seed: int = 42,
    batch_size: int = 8,
    progress: bool = True,
) -> Drift:
    """Calibrate again on fresh examples, with the subspace's own layers, ranks and settings, and compare.

    It takes `1 + splits` passes over the examples: one for the fresh subspace, one for each split into halves.

    What it cannot tell from a moved model is an unusual example: one whose gradient dwarfs the others' takes the first
    directions of a low rank for itself. With the carried model, which had not moved, and 20 or 50 examples, `kept` was
    0.8 to 1.2 at half the rank and 0.5 to 1.5 at an eighth of it. Given the very examples of the old calibration, there
    is no such noise: all that moved is the model, and the angles say how far.

    Args:
        model: the model as it is now, without an intervention; of the configuration the subspace is tied to.
        tokenizer: its fast tokenizer.
        subspace: an earlier calibration.
        examples: four labelled examples or more, of the kind it was calibrated on, about twice as many.
        threshold: recalibrate if `Drift.kept` is less: 1 catches as much as a fresh basis does, 0 as a random one.
        splits: random splits into halves.
        seed: of the splits.
        batch_size: examples in one forward and backward pass.
        progress: show progress bars.

    Raises:
        InputError: unusable arguments, another model, or a subspace that is not from `spd.calibrate`, or holds all d
            directions at every site.
    """
    _check(subspace, examples, threshold, splits)
    subspace.check_model(model)
    settings = {name: subspace.provenance["settings"][name] for name in ("loss", "center", "max_length")}

    def fresh(some: Sequence[Example]) -> Subspace:
        return calibrate(
            model,
            tokenizer,
            some,
            layers=subspace.layers,
            rank="full",
            batch_size=batch_size,
            progress=False,
            **settings,
        )

    order, rng = list(examples), Random(f"drift/{seed}")
    halves: list[tuple[Subspace, Subspace]] = []
    with bar(total=(1 + splits) * len(examples), label="drift", unit="examples", show=progress) as shown:
        whole = fresh(examples)
        shown.update(len(examples))
        for _ in range(splits):
            rng.shuffle(order)
            middle = len(order) // 2
            with warnings.catch_warnings():  # what they would say of single examples has been said of all
                warnings.simplefilter("ignore")
                halves.append((fresh(order[:middle]), fresh(order[middle:])))
            shown.update(len(examples))

    sites = []
    for layer in subspace.layers:
        for side in "kv":
            old, new = subspace.side(side)[layer], whole.side(side)[layer]
            pairs = [(a.side(side)[layer], b.side(side)[layer]) for a, b in halves]
            cut = [(_cut(a, old.rank), _cut(b, old.rank)) for a, b in pairs]
            caught = [_caught(a, d) + _caught(b, c) for (a, b), (c, d) in zip(cut, pairs, strict=True)]
            sites.append(
                SiteDrift(
                    comparison=compare_bases(layer, side, old, _cut(new, old.rank)),
                    noise=fmean(compare_bases(layer, side, a, b).overlap for a, b in cut),
                    energy=_caught(old, new),
                    repeat=fmean(caught) / 2,
                )
            )
    used = subspace.provenance.get("example_sha256")
    seen = sum(digest in set(used) for digest in example_hashes(examples)) if isinstance(used, list) else None
    return Drift(tuple(sites), threshold, len(examples), seen)


def _cut(basis: Basis, rank: int) -> Basis:
    return Basis(basis.basis[:, :rank], basis.singular_values)


def _caught(basis: Basis, whole: Basis) -> float:
    """||G U||^2 / ||G||^2 of the gradients G that `whole`, with all its d directions, was taken from."""
    squares = whole.singular_values.square()
    shares = (basis.basis.double().T @ whole.basis.double()).square().sum(0)
    return float((shares * squares).sum() / squares.sum())


def _check(subspace: Subspace, examples: Sequence[Example], threshold: object, splits: object) -> None:
    settings = subspace.provenance.get("settings")
    made = subspace.derived or (subspace.provenance.get("control") or {}).get("kind")
    if made or not isinstance(settings, dict) or not {"loss", "center", "max_length"} <= set(settings):
        how = f"was made by {made}" if made else "does not say how it was calibrated"
        raise InputError(f"subspace: expected one from spd.calibrate, to do the same again, but this one {how}")
    if all(basis.rank == basis.width for side in "kv" for basis in subspace.side(side).values()):
        raise InputError("subspace: it holds all d directions, which nothing can move; truncate it first")
    if len(examples) < 4:
        raise InputError(f"examples: expected at least four, for two halves, got {len(examples)}")
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 < threshold <= 1:
        raise InputError(f"threshold: expected a number above 0 and up to 1, got {threshold!r}")
    if isinstance(splits, bool) or not isinstance(splits, int) or splits < 1:
        raise InputError(f"splits: expected a positive integer, got {splits!r}")
