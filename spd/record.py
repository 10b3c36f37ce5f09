"""Who made a subspace, when, and from which examples, one by one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from spd.errors import InputError
from spd.example import Example
from spd.files import sha256
from spd.subspace import Subspace


def examples_hash(examples: Sequence[Example]) -> str:
    """Hash of all examples in their order, as a subspace's provenance has it."""
    return sha256(json.dumps([[each.prompt, each.completion, each.spans] for each in examples]))


def example_hashes(examples: Sequence[Example]) -> list[str]:
    """A hash for each example: which ones were used can be checked later without keeping their text."""
    return [sha256(json.dumps([each.prompt, each.completion, each.spans])) for each in examples]


def signed(subspace: Subspace, *, author: str | None = None, created: datetime | None = None) -> Subspace:
    """The same subspace, with who answers for it and when it was made in its provenance.

    Nothing is read off a clock, so that the same settings give the same bytes; pass `datetime.now(UTC)` to have it.

    Raises:
        InputError: an empty author, or a time without a time zone.
    """
    said: dict[str, Any] = {}
    if author is not None:
        if not isinstance(author, str) or not author.strip():
            raise InputError(f"author: expected a name, got {author!r}")
        said["author"] = author
    if created is not None:
        if created.tzinfo is None:
            raise InputError(f"created: expected a time with a time zone, got {created!r}")
        said["created"] = created.astimezone(UTC).isoformat(timespec="seconds")
    return replace(subspace, provenance=subspace.provenance | said)


def without_hash_lists(provenance: Any) -> Any:
    """A provenance to print: hundreds of hashes of single examples give way to their number, parents' included."""
    if isinstance(provenance, dict):
        return {
            name: f"{len(value)} hashes"
            if name == "example_sha256" and isinstance(value, list)
            else without_hash_lists(value)
            for name, value in provenance.items()
        }
    return [without_hash_lists(value) for value in provenance] if isinstance(provenance, list) else provenance
