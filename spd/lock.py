"""One process at a time on whatever can be resumed: a run folder, a file of completions, an adapter."""

from __future__ import annotations

import errno
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from spd.errors import InputError, InUse

INSIDE = ".lock"
"""The lock of a run folder, which lies in it."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


@contextmanager
def locked(path: str | Path, what: str) -> Iterator[None]:
    """Hold `path` for this process alone inside the block, whether there is anything at `path` yet or not.

    The lock is the kernel's (flock): it ends with the process that holds it, however that ends, so the file that a
    killed process left locks nothing. The file is `.NAME.lock` beside `path` (`.lock` inside it for a run folder, when
    `path` ends so), says who holds it, and is gone when the block ends.

    Args:
        path: what is to be held.
        what: what the user knows it as, for the message.

    Raises:
        InputError: another process, or another thread of this one, holds it, or no lock file can be made there.
    """
    path = Path(path)
    lock, held = (path, path.parent) if path.name == INSIDE else (path.with_name(f".{path.name}.lock"), path)
    if lock.is_symlink() or (lock.exists() and not lock.is_file()):
        raise InputError(f"{what}: {held} cannot be locked, {lock} is a link, a folder or a pipe")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        holder = _read_holder(lock)
        # Not the marker that filelock would fall back to: a killed process leaves it, and it locks for ever.
        acquired = FileLock(lock, timeout=0, fallback_to_soft=False).acquire()
    except Timeout:
        raise InUse(f"{what}: {held} is in use by another run{holder or _read_holder(lock)}") from None
    except OSError as error:
        if error.errno in _FULL:
            raise
        if error.errno in _NO_LOCKS:
            lock.unlink(missing_ok=True)
            raise InputError(
                f"{what}: {held} cannot be locked, its file system has no file locks (flock; Lustre needs -o flock); "
                "choose a folder on another"
            ) from None
        raise InputError(f"{what}: {held} cannot be locked, {lock}: {error.strerror}") from None
    with acquired:
        try:
            _write_holder(lock)
            yield
        finally:
            lock.unlink(missing_ok=True)  # while it is held, so that whoever comes now makes a new one


def _write_holder(lock: Path) -> None:
    """In place: the file is the lock, so no other may take its name."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200]
    lock.write_text(
        json.dumps({"host": platform.node(), "pid": os.getpid(), "started": started, "command": command}),
        encoding="utf-8",
    )


def _read_holder(lock: Path) -> str:
    """Who holds it, for a message: only as good as what the file says, which may be nothing or garbage."""
    try:
        with open(lock, "rb") as file:
            found = json.loads(file.read(10_000))
        return f" ({found['command']!r:.80}, process {found['pid']:d} on {found['host']}, since {found['started']})"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
