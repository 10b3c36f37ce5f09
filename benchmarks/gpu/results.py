"""The results file: every stage replaces its own part as soon as it has something, and never half of it."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import processor
from spd.files import read_json, write_json
from spd.provenance import versions
from spd_kernels.roofline import Machine

FILE = "results.json"
_TYPES = (torch.bfloat16, torch.float16, torch.float32)


class Results:
    """results.json of one folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.data: dict[str, Any] = read_json(self.path) if self.path.exists() else {}

    @classmethod
    def begin(cls, folder: Path, *, rehearsal: bool) -> Results:
        """What the folder holds if it comes from the same device and code, else nothing."""
        results = cls(folder)
        found = environment(rehearsal=rehearsal)
        same = ("rehearsal", "device", "driver", "versions", "commit")
        if any(results.data.get(key) != found[key] for key in same):
            results.data = {}
        results.data |= found
        results.save()
        return results

    def __setitem__(self, part: str, value: Any) -> None:
        self.data[part] = value
        self.save()

    def put_case(self, row: dict[str, Any]) -> None:
        """Adds a row, or replaces that of the same case."""
        rows: list[dict[str, Any]] = self.data.setdefault("cases", [])
        key = (row["operation"], row["case"])
        places = [number for number, other in enumerate(rows) if (other["operation"], other["case"]) == key]
        if places:
            rows[places[0]] = row
        else:
            rows.append(row)
        self.save()

    def save(self) -> None:
        write_json(self.path, self.data)

    @property
    def machine(self) -> Machine | None:
        found = self.data.get("machine")
        if found is None:
            return None
        rates = {
            dtype: found["flops_per_second"][str(dtype)] for dtype in _TYPES if str(dtype) in found["flops_per_second"]
        }
        return Machine(found["name"], found["bytes_per_second"], rates)

    @machine.setter
    def machine(self, machine: Machine) -> None:
        rates = {str(dtype): rate for dtype, rate in machine.flops_per_second.items()}
        self["machine"] = {
            "name": machine.name,
            "bytes_per_second": machine.bytes_per_second,
            "flops_per_second": rates,
        }


def element_type(name: str) -> torch.dtype:
    """The torch.dtype of this name, as `str` writes it."""
    return next(dtype for dtype in _TYPES if str(dtype) == name)


def environment(*, rehearsal: bool) -> dict[str, Any]:
    """Device, driver, versions, commit: what a figure has to be read with."""
    found: dict[str, Any] = {"rehearsal": rehearsal, "driver": None, "versions": _versions(), "commit": _commit()}
    found["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    found["host"] = {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()}
    if rehearsal:
        return found | {"device": {"name": f"{platform.machine()} CPU, Triton's interpreter"}}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found["device"] = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
    }
    return found


def _versions() -> Mapping[str, str]:
    return versions() | {"cuda": str(torch.version.cuda), "matplotlib": _matplotlib()}


def _matplotlib() -> str:
    import matplotlib

    return matplotlib.__version__


def _commit() -> str | None:
    """The commit of the working tree, with a plus sign if it holds anything else; None without git."""
    commit = _output("git", "rev-parse", "HEAD")
    return commit and commit + "+" * bool(_output("git", "status", "--porcelain", "--untracked-files=no"))


def _output(*command: str) -> str | None:
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return found.splitlines()[0] if found else None
