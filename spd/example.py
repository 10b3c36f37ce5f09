"""A labelled calibration example: text, and the characters of it that define correctness."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass, field

from spd.errors import InputError


@dataclass(frozen=True)
class Example:
    """Prompt and reference completion, with the character spans S that define correctness.

    Args:
        prompt: what the model is given.
        completion: the reference answer that follows it, verbatim (no separator is added between the two).
        spans: half-open character intervals `(start, end)` into `prompt + completion`. May be empty, in which case
            the example only serves `loss="full"`.

    Raises:
        InputError: a span is empty, reversed, not a pair of integers, or outside the text, or half of a surrogate pair
            is in the text.
    """

    prompt: str
    completion: str
    spans: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("prompt", "completion"):
            text = getattr(self, name)
            if not isinstance(text, str):
                raise InputError(f"Example.{name}: expected a string, got {type(text).__name__}")
            if not text.isascii() and re.search("[\ud800-\udfff]", text):
                raise InputError(f"Example.{name}: half of a surrogate pair, which is no character, in {text!r:.60}")
        length = len(self.prompt) + len(self.completion)
        object.__setattr__(self, "spans", _pairs(self.spans))
        for start, end in self.spans:
            if not 0 <= start < end <= length:
                raise InputError(
                    f"Example.spans: ({start}, {end}) is not a non-empty interval inside the text, "
                    f"which has {length} characters (prompt {len(self.prompt)} + completion {len(self.completion)})"
                )

    @property
    def text(self) -> str:
        return self.prompt + self.completion


def _pairs(spans: object) -> list[tuple[int, int]]:
    try:
        return [(operator.index(start), operator.index(end)) for start, end in spans]  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise InputError(f"Example.spans: expected a list of pairs (start, end) of integers, got {spans!r}") from None
