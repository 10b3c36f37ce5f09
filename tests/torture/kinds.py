"""The kinds of harm, as lists of trials."""

from __future__ import annotations

import random
import signal
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from tests.torture.faults import Fault
from tests.torture.trials import Bench, Chain, CommandLine, Damage, Moments, RealDisk, StaleLock, Together, Trial

CHAIN = 20
"""Faults that strike one run in turn: so many resumptions cost little more than one run."""
_SEED = 7
_FEW = {"a file truncated, deleted or another": 3, "a bit flipped": 3}
_WRITES = ("write", "writev", "pwrite", "copy_file_range")


def every_write(journal: list[str]) -> list[tuple[str, int]]:
    """Each change that a run makes to its folder, by name and count, in order; of many alike the first, middle, last.

    Making a folder that is there already changes nothing.
    """
    total, seen, points = Counter(journal), Counter[str](), []
    for line in journal:
        seen[line] += 1
        kept = {1} if line.startswith("mkdir ") else {1, (total[line] + 1) // 2, total[line]}
        if seen[line] in kept:
            points.append((line, seen[line]))
    return points


def chains(kind: str, faults: list[Fault]) -> list[Trial]:
    """Dealt out, so that each run meets faults from its beginning to its end."""
    count = -(-len(faults) // CHAIN)
    return [Chain(kind, tuple(faults[start::count])) for start in range(count)]


def kills(journal: list[str]) -> list[Trial]:
    points = enumerate(every_write(journal))
    torn = lambda line, index: line.split()[0] in _WRITES and index % 2  # noqa: E731
    return chains(
        "SIGKILL at a write",
        [Fault("tear" if torn(line, index) else "kill", line, at) for index, (line, at) in points],
    )


def moments() -> list[Trial]:
    draw = random.Random(_SEED)
    shares = lambda count: tuple(draw.uniform(0.05, 0.9) for _ in range(count))  # noqa: E731
    return [
        *(Moments("SIGKILL at random moments", signal.SIGKILL, shares(6)) for _ in range(4)),
        *(Moments("SIGTERM at random moments", signal.SIGTERM, shares(6)) for _ in range(2)),
        *(Moments("SIGINT at random moments", signal.SIGINT, shares(6)) for _ in range(2)),
    ]


def signals(journal: list[str]) -> list[Trial]:
    points = every_write(journal)
    term, interrupt = (
        [Fault("signal", *point, number) for point in points] for number in (signal.SIGTERM, signal.SIGINT)
    )
    return [*chains("SIGTERM at a write", term[::8]), *chains("SIGINT at a write", interrupt[4::8])]


def full_disks(journal: list[str], bench: Bench) -> list[Trial]:
    needing = [point for point in every_write(journal) if point[0].split()[0] in (*_WRITES, "open", "mkdir", "fsync")]
    used = sum(path.stat().st_size for path in bench.half.rglob("*") if path.is_file())
    sizes = [int(used * share) // 4096 * 4096 for share in (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)]
    return [
        *chains("disk full at a write", [Fault("full", *point) for point in needing[::4]]),
        *(RealDisk("a small disk, then a larger one", size) for size in sizes),
    ]


def damages(bench: Bench) -> list[Trial]:
    """Each file of a finished run, and of a half-finished one those that it still needs."""
    trials: list[Trial] = []
    state: Literal["finished", "half"]
    harms: list[Literal["emptied", "last byte cut", "deleted", "made an empty list"]]
    for state, root in (("finished", bench.finished), ("half", bench.half)):
        for path in sorted(path for path in root.rglob("*") if path.is_file() and not path.name.startswith(".")):
            name = path.relative_to(root).as_posix()
            if state == "half" and not _still_needed(name):
                continue
            whole = path.stat().st_size > 0
            harms = ["deleted", *(["emptied", "last byte cut"] if whole else [])]
            harms += ["made an empty list"] if path.suffix == ".json" else []
            trials += [Damage("a file truncated, deleted or another", state, name, harm) for harm in harms]
            flips = range(1 if whole else 0)
            trials += [Damage("a bit flipped", state, name, "bit flipped", seed) for seed in flips]
    return trials


def _still_needed(name: str) -> bool:
    needed = ("config.json", "generations/projected", "projected.checkpoints", "subspace/", "adapters/plain/")
    return any(name.startswith(part) or f"/{part}" in name for part in needed)


def neighbours() -> list[Trial]:
    return [
        *(Together("two runs on one folder", share) for share in (0.0, 0.1, 0.2, 0.4, 0.6)),
        *(StaleLock("a stale lock", content) for content in (b"", b"\xff\x00", b'{"pid": 1, "host": "here"}')),
    ]


def command_lines() -> list[Trial]:
    return [
        CommandLine("the command in a process of its own", number, file)
        for number, file in (
            (signal.SIGKILL, "words/subspace/subspace.json"),
            (signal.SIGTERM, "words/generations/plain.jsonl"),
            (signal.SIGINT, "words/adapters/plain/training.json"),
        )
    ] + [CommandLine("the command with a profile", signal.SIGKILL, "words/adapters/plain/training.json", profile=True)]


def few(trials: Iterable[Trial]) -> list[Trial]:
    """From the middle of each kind, one or two, and of long ones a part: for a test of the tests."""
    by_kind: dict[str, list[Trial]] = {}
    for trial in trials:
        by_kind.setdefault(trial.kind, []).append(_shortened(trial))
    return [each for kind in by_kind.values() for each in kind[len(kind) // 2 :][: _FEW.get(kind[0].kind, 1)]]


def _shortened(trial: Trial) -> Trial:
    if isinstance(trial, Chain):
        return replace(trial, faults=trial.faults[::3])
    if isinstance(trial, Moments):
        return replace(trial, shares=tuple(sorted(trial.shares)[:2]))  # early: another run may be quicker
    return trial


def read_journal(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()
