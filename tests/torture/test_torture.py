"""A few of the faults that `make torture` has; so the harness itself cannot rot."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest

from . import faults, trials
from .results import differences, results
from .sittings import Ending
from .trials import Bench, Chain, Damage, RealDisk

_ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(faults.why_not() is not None, reason=str(faults.why_not()))
def test_nothing_is_lost(tmp_path):
    out = tmp_path / "table.json"
    found = torture("--out", str(out)).communicate()
    assert out.exists(), found
    table = json.loads(out.read_text())
    rows = {row["kind"]: row for row in table["rows"]}
    assert rows.keys() >= {"SIGKILL at a write", "disk full at a write", "a bit flipped"}
    for row in rows.values():
        assert row["tried"] == row["resumed"] + row["refused"] > 0, row
    assert ("a small disk, then a larger one" in rows) == (RealDisk.why_not() is None) == (not table["left_out"])
    assert not list(tmp_path.glob("torture-*"))


@pytest.mark.skipif(faults.why_not() is not None, reason=str(faults.why_not()))
def test_a_terminated_harness_leaves_nothing(tmp_path):
    process = torture("--only", "random moments", folder=tmp_path)
    while not list(tmp_path.glob("torture-*/torture-*/run/config.json")):  # of the first trial
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "SIGKILL at random moments" in said[0] and "SIGTERM, so these are not all trials" in said[1]
    assert list(tmp_path.iterdir()) == []


def torture(*more: str, folder: Path | None = None) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "COLUMNS": "120"} | ({"TMPDIR": str(folder)} if folder else {})
    command = [sys.executable, "-m", "tests.torture", "--quick", "--workers", "1", *more]
    return subprocess.Popen(
        command, cwd=_ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_damage_is_seen(tmp_path):
    """A harness that compares nothing would lose nothing."""
    for name, content in (
        ("metrics.json", '{"n": 1}'),
        ("a/plain.jsonl", '{"x": 1}\n{"x": 2}\n'),
        ("timings.json", "1"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    wanted = results(tmp_path)
    (tmp_path / "timings.json").write_text("2")
    assert differences(tmp_path, wanted) == []
    (tmp_path / "a" / "plain.jsonl").write_text('{"x": 2}\n{"x": 1}\n')  # in another order
    (tmp_path / "metrics.json").write_text('{\n"n": 1}')
    assert differences(tmp_path, wanted) == ["a/plain.jsonl is another", "metrics.json is another"]
    (tmp_path / ".left.tmp").touch()
    (tmp_path / "metrics.json").unlink()
    assert differences(tmp_path, wanted) == [
        ".left.tmp is left over",
        "a/plain.jsonl is another",
        "metrics.json is missing",
    ]


@dataclass(frozen=True)
class Scripted(Bench):
    """Sittings that end as they are told to, and leave what they are told to."""

    script: tuple[tuple[str, Ending], ...]
    begun: list[None]

    def sit(self, folder, fault=faults.NONE, **more):
        content, ending = self.script[len(self.begun)]
        self.begun.append(None)
        folder.mkdir(exist_ok=True)
        if content:
            (folder / "metrics.json").write_text(content)
        return ending


def scripted(tmp_path: Path, *script: tuple[str, Ending]) -> Scripted:
    finished = tmp_path / "finished"
    finished.mkdir()
    (finished / "metrics.json").write_text('{"n": 1}')
    return Scripted(tmp_path, results(finished), finished, finished, 1.0, script, [])


_ENDED, _KILLED = Ending(0, "", 0.0), Ending(-signal.SIGKILL, "", 0.0)


def test_a_run_that_ends_wrong_before_the_last_fault_is_lost(tmp_path):
    killed = tuple(faults.Fault("kill", "write metrics.json", at) for at in (1, 2))
    bench = scripted(tmp_path, ("", _KILLED), ('{"n": 2}', _ENDED), ("", _KILLED), ('{"n": 1}', _ENDED))
    tally = Chain("kill", killed).run(bench)
    assert (tally.tried, tally.resumed, tally.lost) == (2, 1, 1), tally.details


@pytest.mark.parametrize(("named", "lost"), [("metrics.json", 0), ("elsewhere.json", 1), ("", 1)])
def test_a_refusal_names_what_is_to_be_deleted(named, lost, tmp_path, monkeypatch):
    where = tmp_path / "scratch"
    monkeypatch.setattr(trials, "scratch", lambda: nullcontext(where))
    where.mkdir()
    refused = Ending(2, f"spd: {where / 'run' / named}: damaged", 0.0)
    bench = scripted(tmp_path, ("", refused), ('{"n": 1}', _ENDED))
    tally = Damage("damage", "finished", "metrics.json", "emptied").run(bench)
    assert (tally.resumed, tally.lost, tally.refused) == (0, lost, 1 - lost), tally.details
