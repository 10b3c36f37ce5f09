"""What is measured, and the two sizes of it that are carried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from spd.errors import InputError
from spd.long_context.decoding import MODES
from spd.long_context.shapes import SHAPES

PARTS = ("decode", "retrieval", "perplexity")
RECALL = "recall"
"""The name of the carried model of 4096 positions."""


@dataclass(frozen=True)
class Settings:
    """One run.

    Args:
        model: checkpoint folder, hub name, "proving-ground", or "recall" for the carried model of 4096 positions.
        shape: in place of a model: random weights of this shape, on which only decoding is measured.
        subspace: folder of a subspace to measure; without one, "retrieval" and "perplexity" calibrate their own, on
            needles of other haystacks, and "decode" takes a random one at all layers.
        parts: out of "decode", "retrieval" and "perplexity".
        contexts: tokens.
        modes: of "decode"; see `spd.long_context.decoding.MODES`.
        decode_rank: rank of "decode".
        batch, rounds, tokens: of "decode": sequences, how often each mode is timed, tokens decoded in a row.
        ranks: of "retrieval" and "perplexity".
        layers: of these two: choices such as "paper", "all" or "1,2".
        haystacks, needles: texts, and facts in each.
        windows: texts that perplexity is taken over; 2 at least.
        text: file whose text perplexity is taken over, in place of the generated text.
        examples: calibration examples.
        dtype, device: as `spd.load_model` takes them.
        seed: of texts and random subspaces.
    """

    model: str | None = RECALL
    shape: str | None = None
    subspace: str | None = None
    parts: Sequence[str] = PARTS
    contexts: Sequence[int] = (512, 1024, 2048, 4096)
    modes: Sequence[str] = MODES
    decode_rank: int = 16
    batch: int = 1
    rounds: int = 7
    tokens: int = 16
    ranks: Sequence[int] = (4, 8, 16, 32, 48)
    layers: Sequence[str] = ("paper", "all")
    haystacks: int = 16
    needles: int = 16
    windows: int = 12
    text: str | None = None
    examples: int = 50
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.model is None) == (self.shape is None):
            raise InputError(f"model, shape: expected one of them, got {self.model!r} and {self.shape!r}")
        if self.shape is not None and (self.shape not in SHAPES or set(self.parts) != {"decode"}):
            raise InputError(
                f'shape: expected one of {", ".join(SHAPES)}, with parts "decode" alone since random weights retrieve '
                f"nothing, got {self.shape!r} with parts {', '.join(self.parts)}"
            )
        for name, known in (("parts", PARTS), ("modes", MODES)):
            given = getattr(self, name)
            if not given or len(set(given)) != len(given) or not set(given) <= set(known):
                raise InputError(
                    f"{name}: expected different ones of {', '.join(known)}, got {', '.join(given) or 'none'}"
                )
        for name in ("contexts", "ranks"):
            values = getattr(self, name)
            if not values or any(value < 1 for value in values) or len(set(values)) != len(values):
                raise InputError(
                    f"{name}: expected different positive numbers, got {', '.join(map(str, values)) or 'none'}"
                )
        if not self.layers:
            raise InputError('layers: expected at least one choice such as "paper" or "all", got none')
        least = {"windows": 2, "seed": 0}
        for name in ("decode_rank", "batch", "rounds", "tokens", "haystacks", "needles", "windows", "examples", "seed"):
            if getattr(self, name) < least.get(name, 1):
                raise InputError(f"{name}: expected at least {least.get(name, 1)}, got {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
