"""What a run must leave, whatever happened on the way: each file as an undisturbed run leaves it, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

from spd.files import sha256_of_file

INFORMATIVE = {
    "timings.json": "seconds, different each time",
    "profile.json": "seconds and memory, different each time",
    "report.html": "a view of the other files, with the seconds",
    "environment.json": "machine and versions of every sitting, to which a damaged one adds another",
}
"""Files whose content is no result, and why. They must be there; damage to them may be mended or left."""
INFORMED = "informative"


def results(folder: Path) -> dict[str, str]:
    """Every file by its path in the folder, with the hash of its bytes if they matter."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not path.name.endswith(".lock"):  # a lock file that a killed process left locks nothing
            found[name] = INFORMED if path.name in INFORMATIVE else sha256_of_file(path)
        elif path.is_dir() and not any(path.iterdir()):
            found[name] = "an empty folder"
    return found


def differences(folder: Path, wanted: dict[str, str]) -> list[str]:
    found = results(folder)
    missing = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    foreign = [f"{name} is left over" for name in found.keys() - wanted.keys()]
    other = [f"{name} is another" for name in wanted.keys() & found.keys() if wanted[name] != found[name]]
    return sorted(missing + foreign + other)


def same_value(one: Path, other: Path) -> bool:
    """Whether two JSON files say the same, in whatever bytes."""
    if one.suffix != ".json":
        return False
    try:
        return bool(json.loads(one.read_bytes()) == json.loads(other.read_bytes()))
    except ValueError:
        return False
