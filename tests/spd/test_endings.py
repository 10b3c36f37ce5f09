"""How the command ends when it cannot go on: one line and a status, for a signal, a full disk, no memory, no reader."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from spd.cli import main

CLEANING = """
import os, signal, sys, time
from pathlib import Path
import spd.cli.app, spd.cli
import spd.config

def load_config(path):
    try:
        print("busy", flush=True)
        time.sleep(60)
    finally:
        print("unwound", flush=True)
        time.sleep(float(path.stem))

spd.config.load_config = load_config
spd.cli.main()
"""
GOES_ON = "the same command goes on where it stopped"


def start(cleaning_takes: float = 0.0, ignoring: bool = False) -> subprocess.Popen:
    """Whatever the tests themselves were started with: a shell starts jobs in the background with SIGINT ignored."""

    def own_signals() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN if ignoring else signal.SIG_DFL)

    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CLEANING, "run", f"{cleaning_takes}.toml"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=own_signals
    )


@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_unwinds_and_a_second_ends_at_once(number, status, word):
    patient = start()
    assert patient.stdout.readline() == "busy\n"
    patient.send_signal(number)
    shown = patient.communicate(timeout=30)
    assert (patient.returncode, *shown) == (status, "unwound\n", f"spd: {word}; {GOES_ON}\n")

    hurried = start(cleaning_takes=60.5)
    assert [hurried.stdout.readline(), hurried.send_signal(number)] == ["busy\n", None]
    assert hurried.stdout.readline() == "unwound\n"
    begin = time.monotonic()
    hurried.send_signal(signal.SIGTERM)
    shown = hurried.communicate(timeout=30)
    assert (hurried.returncode, *shown) == (status, "", f"spd: {word}; {GOES_ON}\n")
    assert time.monotonic() - begin < 10


def test_a_signal_that_is_ignored_stays_so():
    """As nohup, or a shell that starts a job in the background, sets it."""
    process = start(ignoring=True)
    assert process.stdout.readline() == "busy\n"
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[1] == f"spd: terminated; {GOES_ON}\n"


@pytest.fixture
def ending(monkeypatch, capsys):
    """Status and standard error of `spd run`, whose first step raises an error."""

    def end(error: BaseException, before: BaseException | None = None) -> tuple[int, str]:
        def load_config(path):
            if before is None:
                raise error
            try:
                raise before
            finally:
                raise error

        monkeypatch.setattr("spd.config.load_config", load_config)
        monkeypatch.setattr(sys, "argv", ["spd", "run", "c.toml"])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, capsys.readouterr().err

    return end


def test_a_full_disk_is_told_from_what_libraries_make_of_it(ending):
    full = OSError(28, "No space left on device", "x.pt")
    line = f"spd: the disk is full or fails: [Errno 28] No space left on device: 'x.pt'; {GOES_ON}\n"
    assert ending(full) == (1, line)
    assert ending(RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), full) == (1, line)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_under_torch_save(ending):
    with pytest.raises(RuntimeError) as full:
        torch.save({"weights": torch.zeros(1_000_000)}, "/dev/full")
    status, line = ending(full.value)
    assert (status, line.count("\n")) == (1, 1)
    assert line.startswith("spd: the disk is full or fails: ")


def test_too_little_memory(ending):
    assert ending(MemoryError()) == (1, "spd: out of memory: an allocation failed; smaller batches need less\n")
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**56, dtype=torch.uint8)
    status, line = ending(refused.value)
    assert (status, line.count("\n")) == (1, 1)
    assert line.startswith("spd: out of memory: ")


def test_a_bug_is_no_line_but_a_traceback(ending):
    with pytest.raises(ZeroDivisionError):
        ending(ZeroDivisionError())


def test_a_reader_that_leaves_is_no_error():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    code = (
        "import sys, typer, spd.cli as cli\n"
        "sys.modules['spd.cli.app'].app = lambda *_, **__: typer.echo('x' * 100_000)\n"
        "cli.main()"
    )
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=30) == 1
