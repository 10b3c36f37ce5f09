"""Safetensors files by their header: a file is copied as a stream, and chosen tensors are replaced on the way.

Header and layout stay, so whatever is not replaced keeps its bytes and its place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from spd.errors import InputError
from spd.provenance import spread
from spd.tensor_file import Entry, read_header

Change = Callable[[Tensor], Tensor]

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Shard:
    """A safetensors file and what its header says."""

    path: Path
    tensors: Mapping[str, Entry]

    def samples(self) -> Iterator[tuple[str, Entry, bytes]]:
        """Every tensor's name, entry and some of its bytes, from all over it."""
        with open(self.path, "rb") as file:
            for name, entry in sorted(self.tensors.items()):
                found = b""
                for position in spread(entry.end - entry.start):
                    file.seek(entry.start + position)
                    found += file.read(min(4, entry.end - entry.start - position))
                yield name, entry, found


def read_shard(path: Path) -> Shard:
    """The header of a safetensors file, without its tensors.

    Raises:
        InputError: as `read_header`.
    """
    return Shard(path, read_header(path))


def copy_file(source: Path, out: Path) -> str:
    """Copy, and return the sha256 of the bytes."""
    whole = hashlib.sha256()
    with open(source, "rb") as reader, open(out, "xb") as writer:
        for chunk in _chunks(reader, None):
            whole.update(chunk)
            writer.write(chunk)
    return whole.hexdigest()


def rewrite(shard: Shard, out: Path, changes: Mapping[str, Change]) -> tuple[str, str]:
    """Copy a file to `out` with some tensors replaced. One tensor at a time is in memory.

    Args:
        shard: the file.
        out: a file that does not exist yet.
        changes: tensor name -> what makes the new values, of the same shape; they are cast to the tensor's dtype.

    Returns:
        The sha256 of the old file and that of the new one, which is read again for it.

    Raises:
        InputError: a tensor to be changed is not of a floating-point dtype, or has no finite values afterwards.
        OSError: what was written is not what is read back outside the changed tensors.
    """
    changed = sorted(((shard.tensors[name], name) for name in changes), key=lambda each: each[0].start)
    before, kept = hashlib.sha256(), hashlib.sha256()
    with open(shard.path, "rb") as reader, open(out, "xb") as writer:
        for entry, name in changed:
            for chunk in _chunks(reader, entry.start):
                before.update(chunk)
                kept.update(chunk)
                writer.write(chunk)
            old = reader.read(entry.end - entry.start)
            before.update(old)
            writer.write(_changed(f"{shard.path}: {name}", entry, old, changes[name]))
        for chunk in _chunks(reader, None):
            before.update(chunk)
            kept.update(chunk)
            writer.write(chunk)

    after, found = hashlib.sha256(), hashlib.sha256()
    with open(out, "rb") as reader:
        for entry, _ in changed:
            for chunk in _chunks(reader, entry.start):
                after.update(chunk)
                found.update(chunk)
            after.update(reader.read(entry.end - entry.start))
        for chunk in _chunks(reader, None):
            after.update(chunk)
            found.update(chunk)
    if found.digest() != kept.digest():
        raise OSError(f"{out}: what is read back differs from {shard.path} beside the changed tensors")
    return before.hexdigest(), after.hexdigest()


def _changed(where: str, entry: Entry, content: bytes, change: Change) -> bytes:
    dtype = FLOATS.get(entry.dtype)
    if dtype is None:
        raise InputError(f"{where} is {entry.dtype}: expected F64, F32, F16 or BF16, quantised weights are not changed")
    old = torch.frombuffer(bytearray(content), dtype=dtype).view(entry.shape)
    new = change(old).to(dtype).contiguous()
    assert new.shape == old.shape
    if not torch.isfinite(new).all():
        raise InputError(f"{where}: not finite any more, in {entry.dtype}, after the change")
    return new.flatten().view(torch.uint8).numpy().tobytes()


def _chunks(file: BinaryIO, end: int | None) -> Iterator[bytes]:
    """From where the file stands to byte `end`, or to its end."""
    while True:
        chunk = file.read(_CHUNK if end is None else min(_CHUNK, end - file.tell()))
        if not chunk:
            return
        yield chunk
