"""Records of a data set: from a folder of JSON Lines, or from the hub by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spd.errors import InputError
from spd.files import read_jsonl


def load_records(
    name: str,
    split: str,
    fields: Mapping[str, tuple[type, ...]],
    *,
    data: str | Path | None,
    hub: tuple[str, str | None],
) -> list[dict[str, Any]]:
    """All records of one split.

    Args:
        name: the data set's folder below `data`.
        split: "train" or "test".
        fields: what every record must carry, and the types it may have.
        data: folder with `NAME/SPLIT.jsonl`; None loads from the hub.
        hub: repository and configuration on the hub.

    Raises:
        InputError: no such file, no record in it, or a record without one of the fields or with another type there.
    """
    if data is not None:
        path = Path(data) / name / f"{split}.jsonl"
        if not path.is_file():
            raise InputError(f"data: {path} is missing (expected NAME/SPLIT.jsonl below the data folder)")
        records, source = read_jsonl(path), str(path)
    else:
        records, source = _from_hub(hub, split), "/".join(filter(None, (*hub, split)))
    if not records:
        raise InputError(f"{source}: holds no record")
    for number, record in enumerate(records, start=1):
        missing = [field for field in fields if field not in record]
        if missing:
            raise InputError(f"{source}, record {number}: {', '.join(missing)} missing; it has {', '.join(record)}")
        for field, types in fields.items():
            if type(record[field]) not in types:
                expected = " or ".join(each.__name__ for each in types)
                raise InputError(f"{source}, record {number}: {field}: expected {expected}, got {record[field]!r:.60}")
    return records


def _from_hub(hub: tuple[str, str | None], split: str) -> list[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(
            f"data: {hub[0]} would be loaded from the hub, which needs the package `datasets`; "
            "install it, or name a folder of local records"
        ) from None
    try:
        return [dict(record) for record in load_dataset(*hub, split=split)]
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"data: {hub[0]} could not be loaded from the hub ({reason})") from None
