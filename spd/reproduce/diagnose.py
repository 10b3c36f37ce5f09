"""What an arm does beyond its scores: to the distribution, to text off target, and to the next round's subspace."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from spd.arms import Arm, parse_arm
from spd.diagnostics import distribution_shift, expected_overlap, neutral_nll, neutral_texts, overlap
from spd.errors import InputError
from spd.generation import Generation
from spd.model_state import position_limit
from spd.reproduce.settings import ReproduceSettings
from spd.stages import Stages

DIAGNOSTICS = "diagnostics.json"
TEXTS_SEED = 0


def diagnose(stages: Stages, capability: str, arms: Iterable[str], settings: ReproduceSettings) -> dict[str, Any]:
    """Diagnostics of one capability's trained arms under one seed, as plain data.

    Returns:
        `shift`: by arm of one round with a projection, the KL divergences a token of `spd.diagnostics.Shift`;
        `perplexity`: of the base and every trained arm on neutral text, with each text's NLL; `drift`: by arm of
        several rounds, the overlap of each further round's subspace with the first's; `neutral`: how many neutral
        texts were left out.
    """
    names = sorted(set(arms))
    parsed = [parse_arm(name) for name in names]
    trained = [arm for arm in parsed if arm.trained]
    wanted = settings.diagnostics
    found: dict[str, Any] = {"arms": names, "shift": {}, "perplexity": {}, "drift": {}, "neutral": {}}
    for arm in trained:
        if wanted.completions and arm.projection and arm.rounds == 1:
            generations = stages.generations(capability, arm)[: wanted.completions]
            if len(generations) > 1:  # of one there is no interval
                found["shift"][arm.name] = _shift(stages, capability, arm, generations)
        if arm.projection and arm.rounds > 1:
            found["drift"][arm.name] = _drift(stages, capability, arm)
    if wanted.texts:
        texts, left_out = _fitting(stages, neutral_passages(settings))
        found["neutral"] = {"left_out": left_out}
        if len(texts) < 2:
            return found
        found["perplexity"]["base"] = asdict(neutral_nll(stages.model, stages.tokenizer, texts, progress=False))
        for arm in trained:
            with stages.tuned(capability, arm) as model:
                found["perplexity"][arm.name] = asdict(neutral_nll(model, stages.tokenizer, texts, progress=False))
    return found


def joined(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """The diagnostics of both, of some arms and of others."""
    parts = {name: earlier.get(name, {}) | later[name] for name in ("shift", "perplexity", "drift", "neutral")}
    return {"arms": sorted({*earlier["arms"], *later["arms"]}), **parts}


def neutral_passages(settings: ReproduceSettings) -> list[str]:
    """The neutral texts: the first passages of the settings' file, or the proving ground's filler.

    Raises:
        InputError: the file is missing, is no text, or holds fewer than two passages.
    """
    if settings.neutral is None:
        return neutral_texts(settings.diagnostics.texts, TEXTS_SEED)
    path = Path(settings.neutral)
    if not path.is_file():
        raise InputError(f"neutral: there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"neutral: {path} is not a text file ({error})") from None
    passages = [stripped for passage in text.split("\n\n") if (stripped := passage.strip())]
    if len(passages) < 2:
        raise InputError(f"neutral: expected at least two passages between blank lines in {path}, got {len(passages)}")
    return passages[: settings.diagnostics.texts]


def _shift(stages: Stages, capability: str, arm: Arm, generations: list[Generation]) -> dict[str, Any]:
    assert arm.projection is not None
    intervention = stages.config.intervention
    shift = distribution_shift(
        stages.model,
        stages.tokenizer,
        stages.subspace(capability, arm.projection),
        stages.adapter(capability, arm, 1),
        generations,
        sides=arm.projection.sides or intervention.sides,
        mode=intervention.mode,
        a=intervention.a,
        b=intervention.b,
        progress=False,
    )
    return asdict(shift)


def _drift(stages: Stages, capability: str, arm: Arm) -> list[dict[str, Any]]:
    assert arm.projection is not None
    first = stages.subspace(capability, arm.projection)
    found = []
    for round in range(2, arm.rounds + 1):
        with stages.started(capability, arm, round):
            later = stages.subspace(capability, arm.projection, stages.origin(arm, round))
        sites = overlap(first, later)
        chance = [
            expected_overlap(max(one.rank, other.rank), one.width)  # where ranks differ, the larger over the width
            for one, other in ((first.side(side)[layer], later.side(side)[layer]) for layer, side in sites)
        ]
        found.append(
            {
                "round": round,
                "overlap": {f"layer {layer} {side.upper()}": value for (layer, side), value in sites.items()},
                "by_chance": fmean(chance),
            }
        )
    return found


def _fitting(stages: Stages, texts: list[str]) -> tuple[list[str], int]:
    """The texts that the model can score, and how many are too long for it, or a single token."""
    limit = position_limit(stages.model)
    lengths = [len(tokens) for tokens in stages.tokenizer(texts)["input_ids"]]
    fitting = [text for text, n in zip(texts, lengths, strict=True) if n > 1 and (limit is None or n <= limit)]
    return fitting, len(texts) - len(fitting)
