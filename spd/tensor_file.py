"""The header of a safetensors file: what is in it and where, told before any of it is read.

The format: 8 bytes with the header's length n, little-endian; n bytes of JSON, tensor name -> dtype, shape and offsets;
then the tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from spd.errors import InputError
from spd.files import parse_json, regular_file


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its dtype as the format names it, and the bytes of the file that hold it."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of a file. What the header claims is what the file has room for: no more than it is ever allocated.

    Raises:
        InputError: it is torn, of a form that the installed safetensors does not know, or names a tensor twice.
    """
    problem = f"{path}: not a whole safetensors file"
    with regular_file(path) as file:
        try:
            with safe_open(path, "pt"):  # the library's own checks: sizes, dtypes, no gap and no overlap
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(f"{problem} ({error})") from None
        length = int.from_bytes(file.read(8), "little")
        header = parse_json(problem, file.read(length))
    tensors = {}
    for name, each in header.items():
        if name != "__metadata__":
            start, end = each["data_offsets"]
            tensors[name] = Entry(each["dtype"], tuple(each["shape"]), 8 + length + start, 8 + length + end)
    return tensors
