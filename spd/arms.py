"""What a model can be compared with: the arms of an experiment, each one line of text.

`base`, `projected`, `self-training`, `ssd` and `spd`. All but the base take options: `spd:rank=16,layers=all`,
`spd:sides=k`, `spd:subspace=random`, `spd:from=mmlu`, `projected:loss=full`, `self-training:rounds=2`, `ssd:lr=1e-4`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from spd.errors import InputError, near
from spd.named import NAMED_LAYERS, check_rank

SubspaceKind = Literal["gradient", "random", "activations", "bottom", "shuffled"]
SUBSPACE_MEANING: dict[str, str] = {
    "gradient": "the top directions of the correctness gradients, as published",
    "random": "a random subspace of the same ranks",
    "activations": "the top principal directions of K and V themselves",
    "bottom": "the last singular directions of the gradients",
    "shuffled": "gradients of examples whose answers were exchanged",
}


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled: temperature first, then the `top_k` likeliest tokens, then `top_p` of their mass."""

    temperature: float
    top_k: int | None
    top_p: float


SSD = Sampling(temperature=1.6, top_k=20, top_p=0.8)
"""Simple self-distillation (arXiv 2604.01193): hot and truncated; the three values are this project's choice."""


@dataclass(frozen=True)
class Projection:
    """The subspace that K and V are projected onto; None and defaults stand for what the run's settings say.

    Args:
        subspace: which directions.
        source: the task whose examples calibrate it, where that is not the capability itself (option `from`).
        sides: which of K and V.
        loss: the loss whose gradients are taken: "full" is that of every token.
        examples: number of calibration examples.
        rank: as in `spd.calibrate`.
        layers: as in `spd.calibrate`; indices are joined by "+".
    """

    subspace: SubspaceKind = "gradient"
    source: str | None = None
    sides: Literal["kv", "k", "v"] | None = None
    loss: Literal["spans", "full"] | None = None
    examples: int | None = None
    rank: int | str | None = None
    layers: str | tuple[int, ...] | None = None

    def options(self) -> dict[str, Any]:
        """What is not at its default, by the names that an arm's text has for it."""
        values = {option: getattr(self, name) for option, name in _FIELD.items()}
        return {option: value for option, value in values.items() if value not in (None, "gradient")}

    @property
    def drawn(self) -> bool:
        """Whether the subspace depends on a seed."""
        return self.subspace in ("random", "shuffled")

    @property
    def slug(self) -> str:
        """The options as a file name; "" for the projection that the run's settings describe."""
        return _slug(",".join(f"{option}={_text(value)}" for option, value in self.options().items()))


@dataclass(frozen=True)
class Arm:
    """One way to treat a capability.

    Args:
        name: its one line of text, options in a fixed order.
        meaning: what it is, in words.
        projection: how K and V are projected while the model writes (untrained arms: while it is tested).
        sampling: in place of the run's settings.
        trained: whether the model is fine-tuned on what it wrote, and tested without a projection.
        rounds: how often: each further round calibrates, writes and trains from where the one before ended.
        learning_rate: in place of the run's settings.
    """

    name: str
    meaning: str
    projection: Projection | None = None
    sampling: Sampling | None = None
    trained: bool = True
    rounds: int = 1
    learning_rate: float | None = None

    @property
    def slug(self) -> str:
        """The name as a file name."""
        return _slug(self.name)


_PLAIN = Projection()
ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("base", "the model as it came", trained=False),
        Arm("projected", "K and V projected while it answers, no training", projection=_PLAIN, trained=False),
        Arm("self-training", "fine-tuned on its own plain completions"),
        Arm("ssd", "fine-tuned on its own completions, sampled hot and truncated (arXiv 2604.01193)", sampling=SSD),
        Arm("spd", "fine-tuned on its own completions under projection", projection=_PLAIN),
    )
}
DEFAULT_ARMS = ("base", "projected", "self-training", "spd")
_FIELD = {"from": "source"} | {each.name: each.name for each in fields(Projection) if each.name != "source"}
TRAINING_OPTIONS = ("rounds", "lr")
OPTIONS = (*_FIELD, *TRAINING_OPTIONS)


def parse_arm(text: str) -> Arm:
    """An arm from its one line.

    Raises:
        InputError: no such arm or option (the near one is suggested), or a value that the option does not take.
    """
    kind, _, tail = text.partition(":")
    if kind not in ARMS:
        raise InputError(f"arm: there is no {kind!r}, only {', '.join(ARMS)}{near(kind, ARMS)}")
    arm = ARMS[kind]
    if not tail and ":" not in text:
        return arm
    options: dict[str, Any] = {}
    for part in tail.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key not in OPTIONS:
            raise InputError(f"arm: {text!r}: no option {key!r}, only {', '.join(OPTIONS)}{near(key, OPTIONS)}")
        if not equals or not value:
            raise InputError(f"arm: {text!r}: expected OPTION=VALUE, got {part!r}")
        if key in options:
            raise InputError(f"arm: {text!r}: {key} is given twice")
        options[key] = _VALUES[key](text, value)
    for key in options:
        if (key in TRAINING_OPTIONS and not arm.trained) or (key in _FIELD and arm.projection is None):
            raise InputError(f"arm: {text!r}: {kind} has no {'training' if key in TRAINING_OPTIONS else 'projection'}")
    return _with_options(arm, options)


def without(arm: Arm, option: str) -> Arm:
    """The same arm with one option left at its default."""
    kind, _, tail = arm.name.partition(":")
    rest = [part for part in tail.split(",") if part and not part.startswith(f"{option}=")]
    return parse_arm(f"{kind}:{','.join(rest)}" if rest else kind)


def parse_arms(texts: list[str] | tuple[str, ...]) -> list[Arm]:
    """Several, each once; `base` always among them and first, since everything is compared with it."""
    arms = {arm.name: arm for arm in (ARMS["base"], *map(parse_arm, texts))}
    return list(arms.values())


def _with_options(arm: Arm, options: dict[str, Any]) -> Arm:
    rounds, learning_rate = options.pop("rounds", 1), options.pop("lr", None)
    projection = arm.projection
    if projection:
        projection = replace(projection, **{_FIELD[key]: value for key, value in options.items()})
    changed = projection.options() if projection else {}
    changed |= {"rounds": rounds} if rounds > 1 else {}
    changed |= {"lr": learning_rate} if learning_rate else {}
    if not changed:
        return arm
    name = f"{arm.name}:" + ",".join(f"{option}={_text(value)}" for option, value in changed.items())
    meaning = f"{arm.meaning}; {_meaning(changed)}"
    return Arm(name, meaning, projection, arm.sampling, arm.trained, rounds, learning_rate)


def _meaning(options: Mapping[str, Any]) -> str:
    words = {
        "subspace": lambda value: SUBSPACE_MEANING[value],
        "from": lambda value: f"calibrated on {value}",
        "sides": lambda value: f"{value.upper()} only" if value != "kv" else "K and V",
        "loss": lambda value: "gradients of the loss on " + ("every token" if value == "full" else "the spans"),
        "examples": lambda value: f"{value} calibration examples",
        "rank": lambda value: f"rank {value}",
        "layers": lambda value: f"layers {_text(value)}",
        "rounds": lambda value: f"{value} rounds",
        "lr": lambda value: f"learning rate {value:g}",
    }
    return ", ".join(words[option](value) for option, value in options.items())


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _slug(text: str) -> str:
    return re.sub(r"[^\w=,.+]+", "-", text)


def _choice(*known: str) -> Any:
    def read(text: str, value: str) -> str:
        if value not in known:
            raise InputError(f"arm: {text!r}: expected one of {', '.join(known)}, got {value!r}{near(value, known)}")
        return value

    return read


def _count(text: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise InputError(f"arm: {text!r}: expected a positive number, got {value!r}")
    return int(value)


def _rank(text: str, value: str) -> int | str:
    rank = int(value) if value.isdecimal() else value
    try:
        check_rank(rank)
    except InputError as error:
        raise InputError(f"arm: {text!r}: {error}") from None
    return rank


def _rate(text: str, value: str) -> float:
    try:
        rate = float(value)
    except ValueError:
        rate = float("nan")
    if not 0 < rate < float("inf"):
        raise InputError(f"arm: {text!r}: lr: expected a positive number, got {value!r}")
    return rate


def _layers(text: str, value: str) -> str | tuple[int, ...]:
    if value in NAMED_LAYERS:
        return value
    parts = value.split("+")
    if not all(part.isdecimal() for part in parts):
        names = ", ".join(NAMED_LAYERS)
        raise InputError(f"arm: {text!r}: layers: expected one of {names}, or indices such as 3+7, got {value!r}")
    return tuple(int(part) for part in parts)


_VALUES: dict[str, Any] = {
    "subspace": _choice(*SUBSPACE_MEANING),
    "from": lambda text, value: value,
    "sides": _choice("kv", "k", "v"),
    "loss": _choice("spans", "full"),
    "examples": _count,
    "rank": _rank,
    "layers": _layers,
    "rounds": _count,
    "lr": _rate,
}
