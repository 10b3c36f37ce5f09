"""Files that are either whole or absent: temporary name, fsync, rename."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import tomllib
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from spd.errors import InputError

MOST_LEVELS = 200
"""Of nesting in what is read: no file of ours has so many, and what walks them afterwards stays within its stack."""
MOST_TOML = 1 << 15
"""The time that tomllib takes grows with the square of what a line holds."""
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the name `path` when the block ends without an exception.

    Whatever goes wrong in the block (a full disk, an interrupt), a file that already stood at `path` survives.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _settle(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the name `path` (which must not exist yet) when the block succeeds."""
    path = Path(path)
    if path.exists():
        raise InputError(f"{path}: already exists")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield temporary
        for inside in temporary.rglob("*"):
            _settle(inside)
        _settle(temporary)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(path: str | Path) -> None:
    """Remove what processes that were killed while they wrote `path` left beside it; only for who keeps others off it.

    Nothing else has such a name; a link that has one is left alone.
    """
    path = Path(path)
    name = re.compile(re.escape(f".{path.name}.") + r"[a-z0-9_]{8}\.tmp")  # as tempfile makes it
    for entry in os.scandir(path.parent) if path.parent.is_dir() else ():
        if name.fullmatch(entry.name):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            elif entry.is_file(follow_symlinks=False):
                os.unlink(entry.path)


def _settle(path: Path) -> None:
    """On the disk before it takes its name, so that a power cut cannot empty it; as readable as any other file.

    mkstemp and mkdtemp make what is private, and so does safetensors.
    """
    path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def write_text(path: str | Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_text(value: Any) -> str:
    """As our JSON files have it: equal values have equal text."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json_text(value))


def read_text(path: str | Path) -> str:
    """A whole text file.

    Raises:
        InputError: there is none, it may not be read, it is a folder, a pipe or a device, or it is not UTF-8.
    """
    with regular_file(path) as file:
        try:
            return file.read().removeprefix(BOM_UTF8).decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 ({error})") from None


def read_toml(path: str | Path) -> dict[str, Any]:
    """A TOML file of settings."""
    text = read_text(path)
    if len(text) > MOST_TOML:
        raise InputError(f"{path}: expected settings of at most {MOST_TOML:,} characters, got {len(text):,}")
    try:
        values = tomllib.loads(text)
    except RecursionError:
        raise InputError(f"{path}: not a TOML file (nested too deep)") from None
    except ValueError as error:
        raise InputError(f"{path}: not a TOML file ({error})") from None
    if is_too_deep(values):
        raise InputError(f"{path}: not a TOML file of settings (nested deeper than {MOST_LEVELS})")
    return values


def read_json(path: str | Path) -> Any:
    with regular_file(path) as file:
        return parse_json(f"{path}: not a JSON file", file.read().removeprefix(BOM_UTF8))


def read_object(path: str | Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected an object, got {type(value).__name__}")
    return value


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Records of a JSON Lines file; a line that is not an object is an error that names it."""
    return [record for _, record in numbered_records(path)]


def numbered_records(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Records of a JSON Lines file, each with the number of its line; blank lines hold none."""
    with regular_file(path) as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(BOM_UTF8) if number == 1 else line
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            record = parse_json(f"{where}: not JSON", line)
            if not isinstance(record, dict):
                raise InputError(f"{where}: expected an object, got {type(record).__name__}")
            yield number, record


@contextmanager
def regular_file(path: str | Path) -> Iterator[BufferedReader]:
    """A file, open to be read. A pipe or a device, which could keep the reader for ever, is refused."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise InputError(f"{str(path)!r}: cannot be read (no file can have this name)") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise InputError(f"{path}: expected a file, got a folder, a pipe or a device")
    with os.fdopen(handle, "rb") as file:
        yield file


def is_too_deep(value: Any) -> bool:
    """Whether lists and tables lie more than `MOST_LEVELS` inside one another."""
    level = [value]
    for _ in range(MOST_LEVELS):
        inside = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, (dict, list)))
        level = [each for of_one in inside for each in of_one if isinstance(each, (dict, list))]
        if not level:
            return False
    return True


def parse_json(problem: str, content: bytes) -> Any:
    """JSON, without what json.loads lets through and those who take the value cannot bear.

    Raises:
        InputError: `problem`, and what it is: no JSON in UTF-8, a name twice in an object, an integer of thousands of
            digits, lists or objects too deep inside one another, half of a surrogate pair.
    """
    try:
        text = content.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_distinct)
    except RecursionError:
        raise InputError(f"{problem} (nested too deep)") from None
    except ValueError as error:
        raise InputError(f"{problem} ({error})") from None
    if text.count("[") + text.count("{") > MOST_LEVELS and is_too_deep(value):
        raise InputError(f"{problem} (nested deeper than {MOST_LEVELS})")
    if _HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InputError(f"{problem} (half of a surrogate pair in it is no character)") from None
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it has two of {twice!r:.60}")
    return found


def sha256(content: bytes | str) -> str:
    """Of text, of its UTF-8; a lone surrogate, which has none, counts as it is."""
    return hashlib.sha256(content.encode(errors="surrogatepass") if isinstance(content, str) else content).hexdigest()


def sha256_of_file(path: str | Path) -> str:
    with regular_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
