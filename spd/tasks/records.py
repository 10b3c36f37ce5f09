"""Records of a data set: from a folder of JSON Lines, or from the hub by name; checked one by one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, TypeVar

from spd.errors import InputError
from spd.files import read_jsonl

Record = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Records:
    """Where a data set lies, and what each of its records carries. Further fields are let through.

    Args:
        folder: its folder below the data folder.
        hub: repository and configuration on the hub.
        fields: what a record must carry, and the types it may have.
        may_be_empty: fields that may hold an empty text.
        aliases: other names that fields go by, and the name they get here.
        key: a field that no two records of a split share; a record may lack it.
        hub_split: the split on the hub, where local files are not named after splits.
    """

    folder: str
    hub: tuple[str, str | None]
    fields: Mapping[str, tuple[type, ...]]
    may_be_empty: Sequence[str] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    key: str | None = None
    hub_split: str | None = None

    def load(
        self, split: str, data: str | Path | None, *, complaint: Callable[[Record], str | None] | None = None
    ) -> list[Record]:
        """All records of one split.

        Args:
            split: name of the split and of its local file.
            data: folder with `FOLDER/SPLIT.jsonl`; None loads from the hub.
            complaint: says what else is wrong with a record, or None.

        Raises:
            InputError: no such file, no record in it, or a record that does not hold what it should; the message
                names the file and the record's number.
        """
        if data is not None:
            path = self._path(split, data)
            if not os.path.isfile(path):
                raise InputError(f"data: {path} is missing (expected NAME/SPLIT.jsonl below the data folder)")
            records, source = read_jsonl(path), str(path)
        else:
            on_hub = self.hub_split or split
            records, source = _from_hub(self.hub, on_hub), "/".join(filter(None, (*self.hub, on_hub)))
        if not records:
            raise InputError(f"{source}: holds no record")
        numbered = [(f"{source}, record {number}", record) for number, record in enumerate(records, start=1)]
        records = [self._renamed(where, record) for where, record in numbered]
        for (where, _), record in zip(numbered, records, strict=True):
            problem = self._problem(record) or (complaint(record) if complaint else None)
            if problem:
                raise InputError(f"{where}: {problem}")
        self._check_key(source, records)
        return records

    def exists(self, split: str, data: str | Path | None) -> bool:
        """Whether a split is there; the hub is taken to have every split."""
        return data is None or os.path.isfile(self._path(split, data))

    def _path(self, split: str, data: str | Path) -> Path:
        return Path(data) / self.folder / f"{split}.jsonl"

    def _renamed(self, where: str, record: Record) -> Record:
        for alias, name in self.aliases.items():
            if alias in record and record.get(name, record[alias]) != record[alias]:
                raise InputError(f"{where}: {alias} and {name} mean the same field but differ")
        return {self.aliases.get(name, name): value for name, value in record.items()}

    def _problem(self, record: Record) -> str | None:
        missing = [name for name in self.fields if name not in record]
        if missing:
            return f"{', '.join(missing)} missing; it has {', '.join(record)}"
        for name, types in self.fields.items():
            value = record[name]
            if type(value) not in types:
                expected = " or ".join(each.__name__ for each in types)
                return f"{name}: expected {expected}, got {value!r:.60}"
            if isinstance(value, str) and not value.strip() and name not in self.may_be_empty:
                return f"{name}: is empty"
        return None

    def _check_key(self, source: str, records: list[Record]) -> None:
        seen: dict[str, int] = {}
        for number, record in enumerate(records, start=1):
            if self.key in record and (first := seen.setdefault(str(record[self.key]), number)) != number:
                raise InputError(f"{source}, record {number}: {self.key} {record[self.key]!r} is record {first}'s too")


def round_robin(groups: Iterable[Sequence[T]]) -> list[T]:
    """The first of every group, then the second of every group, and so on; shorter groups run out."""
    end = object()
    return [each for each in chain.from_iterable(zip_longest(*groups, fillvalue=end)) if each is not end]  # type: ignore[misc]


def _from_hub(hub: tuple[str, str | None], split: str) -> list[Record]:
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
