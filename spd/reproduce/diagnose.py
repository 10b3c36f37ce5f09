"""What an arm does beyond its scores: to the distribution, to text off target, and to the next round's subspace."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spd.arms import Arm, parse_arm
from spd.diagnostics import distribution_shift, expected_overlap, neutral_nll, neutral_texts, overlap
from spd.errors import InputError
from spd.reproduce.settings import ReproduceSettings
from spd.stages import Stages

DIAGNOSTICS = "diagnostics.json"
TEXTS_SEED = 0


def diagnose(stages: Stages, capability: str, arms: Iterable[str], settings: ReproduceSettings) -> dict[str, Any]:
    """Diagnostics of one capability's trained arms under one seed, as plain data.

    Returns:
        `shift`: by arm of one round with a projection, the KL divergences a token of `spd.diagnostics.Shift`;
        `perplexity`: of the base and every trained arm on neutral text, with each text's NLL; `drift`: by arm of
        several rounds, the overlap of each further round's subspace with the first's.
    """
    names = sorted(set(arms))
    parsed = [parse_arm(name) for name in names]
    trained = [arm for arm in parsed if arm.trained]
    wanted = settings.diagnostics
    found: dict[str, Any] = {"arms": names, "shift": {}, "perplexity": {}, "drift": {}}
    for arm in trained:
        if wanted.completions and arm.projection and arm.rounds == 1:
            found["shift"][arm.name] = _shift(stages, capability, arm, wanted.completions)
        if arm.projection and arm.rounds > 1:
            found["drift"][arm.name] = _drift(stages, capability, arm)
    if wanted.texts:
        texts = _texts(settings)
        found["perplexity"]["base"] = asdict(neutral_nll(stages.model, stages.tokenizer, texts, progress=False))
        for arm in trained:
            with stages.tuned(capability, arm) as model:
                found["perplexity"][arm.name] = asdict(neutral_nll(model, stages.tokenizer, texts, progress=False))
    return found


def joined(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """The diagnostics of both, of some arms and of others."""
    parts = {name: earlier[name] | later[name] for name in ("shift", "perplexity", "drift")}
    return {"arms": sorted({*earlier["arms"], *later["arms"]}), **parts}


def _shift(stages: Stages, capability: str, arm: Arm, completions: int) -> dict[str, Any]:
    assert arm.projection is not None
    intervention = stages.config.intervention
    shift = distribution_shift(
        stages.model,
        stages.tokenizer,
        stages.subspace(capability, arm.projection),
        stages.adapter(capability, arm, 1),
        stages.generations(capability, arm)[:completions],
        sides=arm.projection.sides or intervention.sides,
        mode=intervention.mode,
        progress=False,
    )
    return asdict(shift)


def _drift(stages: Stages, capability: str, arm: Arm) -> list[dict[str, Any]]:
    assert arm.projection is not None
    first = stages.subspace(capability, arm.projection)
    basis = first.k[first.layers[0]]
    found = []
    for round in range(2, arm.rounds + 1):
        with stages.started(capability, arm, round):
            sites = overlap(first, stages.subspace(capability, arm.projection, stages.origin(arm, round)))
        found.append(
            {
                "round": round,
                "overlap": {f"layer {layer} {side.upper()}": value for (layer, side), value in sites.items()},
                "by_chance": expected_overlap(basis.rank, basis.width),
            }
        )
    return found


def _texts(settings: ReproduceSettings) -> list[str]:
    if settings.neutral is None:
        return neutral_texts(settings.diagnostics.texts, TEXTS_SEED)
    path = Path(settings.neutral)
    if not path.is_file():
        raise InputError(f"neutral: there is no file {path}")
    passages = [passage.strip() for passage in path.read_text(encoding="utf-8").split("\n\n")]
    return [passage for passage in passages if passage][: settings.diagnostics.texts]
