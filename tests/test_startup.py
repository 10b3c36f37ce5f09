"""What a command imports before it has anything to do with a model: help and refusals come at once."""

import subprocess
import sys
from pathlib import Path

import pytest

from spd.cli import app

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "triton", "peft", "datasets", "accelerate", "matplotlib", "numpy"}
COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands]


def imported(*arguments: str) -> tuple[set[str], subprocess.CompletedProcess[str]]:
    """The modules that a fresh process imports, and how it ended."""
    ran = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )
    lines = [line for line in ran.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}, ran


def test_the_list_of_imports_is_seen():
    assert "torch" in imported("-c", "import spd_kernels")[0]
    assert len(COMMANDS) > 10


@pytest.mark.parametrize("command", [(), *((command,) for command in COMMANDS)], ids=" ".join)
def test_help_imports_nothing_heavy(command):
    modules, ran = imported("-m", "spd", *command, "--help")
    assert ran.returncode == 0
    assert "Usage" in ran.stdout
    assert not modules & HEAVY


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nocommand"], "No such command"),
        (["evaluate", "--nosuch"], "No such option"),
        (["run", "missing.toml"], "no file missing.toml"),
        (["run", "bad.toml"], "there is no 'sdp'"),
        (["calibrate", "-m", "proving-ground", "-t", "wrods", "--out", "never"], "did you mean 'words'"),
        (["evaluate", "-m", "proving-ground", "-t", "wrods"], "did you mean 'words'"),
    ],
)
def test_refusals_import_nothing_heavy(arguments, message, tmp_path):
    bad = tmp_path / "bad.toml"
    bad.write_text('model = "proving-ground"\ntasks = ["words"]\narms = ["sdp"]\n')
    modules, ran = imported("-m", "spd", *(str(bad) if each == "bad.toml" else each for each in arguments))
    assert ran.returncode == 2
    assert message in ran.stderr
    assert not modules & HEAVY


def test_the_kernels_import_torch_alone():
    """Beside torch nothing but this package: no Triton before a kernel runs, and none of the method's libraries."""
    beyond = imported("-c", "import torch, spd_kernels")[0] - imported("-c", "import torch")[0]
    assert any(name.startswith("spd_kernels.") for name in beyond)
    assert not {name.partition(".")[0] for name in beyond} & (HEAVY | {"spd"})
