"""Checkpoints of a training: sealed when whole, and found again only if they are still as they were sealed."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from pathlib import Path

from spd.errors import InputError
from spd.files import read_object, sha256_of_file, write_json

SEAL = "complete"


def seal(checkpoint: Path) -> None:
    """Bring a checkpoint's files to the disk, then write down the hash of each."""
    for path in _files(checkpoint):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    write_json(checkpoint / SEAL, _hashes(checkpoint))


def last_whole(work: Path) -> Path | None:
    """The newest checkpoint that is as it was sealed; newer ones are removed, and named if they had been sealed."""
    numbered = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in work.iterdir() if path.is_dir()]
    for _, path in sorted(((int(match[1]), path) for match, path in numbered if match), reverse=True):
        if not (path / SEAL).is_file():  # torn by a kill while it was written
            shutil.rmtree(path)
        elif _is_whole(path):
            return path
        else:
            warnings.warn(f"distill: {path} is damaged and removed; going on from before it", stacklevel=2)
            shutil.rmtree(path)
    return None


def _is_whole(checkpoint: Path) -> bool:
    try:
        return read_object(checkpoint / SEAL) == _hashes(checkpoint)
    except InputError:
        return False


def _hashes(checkpoint: Path) -> dict[str, str]:
    return {str(path.relative_to(checkpoint)): sha256_of_file(path) for path in _files(checkpoint)}


def _files(checkpoint: Path) -> list[Path]:
    own = (path for path in sorted(checkpoint.rglob("*")) if path.is_file())
    return [path for path in own if path != checkpoint / SEAL]
