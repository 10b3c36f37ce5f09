"""The command line: help at once, results on standard output, one line and status 2 for bad input."""

import re
import subprocess
import sys
import warnings
from dataclasses import dataclass

import pytest

from spd.cli import main

COMMANDS = ["run", "calibrate", "generate", "distill", "evaluate", "inspect", "demo"]


@dataclass
class Finished:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def spd(monkeypatch, capsys):
    """The command line in this process, so that only one test pays for imports."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["spd", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        return Finished(stopped.value.code or 0, *capsys.readouterr())

    return call


def test_help_names_every_command():
    found = subprocess.run([sys.executable, "-m", "spd", "--help"], capture_output=True, text=True, check=True)
    assert all(re.search(rf"\b{command}\b", found.stdout) for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, spd):
    found = spd(command, "--help")
    assert found.returncode == 0
    assert len(found.stdout) > 200


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from spd.cli import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'peft', 'matplotlib', 'datasets', 'triton'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.rstrip().endswith("[]")


def test_the_method_by_hand(spd, checkpoint, made_records, tmp_path):
    common = ["--model", checkpoint, "--quiet"]
    task = ["--task", "gsm8k", "--data", made_records]
    found = spd("calibrate", *common, *task, "--out", tmp_path / "s", "--rank", "4", "--layers", "0,3")
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == str(tmp_path / "s")

    found = spd("inspect", tmp_path / "s", "--plot", tmp_path / "s.png")
    assert found.returncode == 0, found.stderr
    assert "layer 3 V" in found.stdout and '"examples_sha256"' in found.stdout
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")

    projected = ["--subspace", tmp_path / "s", "--max-new-tokens", "8"]
    found = spd("generate", *common, *task, *projected, "--out", tmp_path / "g.jsonl", "--prompts", "5")
    assert found.returncode == 0, found.stderr
    assert len((tmp_path / "g.jsonl").read_text().splitlines()) == 5

    found = spd("distill", *common, "--generations", tmp_path / "g.jsonl", "--out", tmp_path / "a", "--epochs", "1")
    assert found.returncode == 0, found.stderr

    for tested in (["--adapter", tmp_path / "a"], ["--subspace", tmp_path / "s"], []):
        found = spd("evaluate", *common, *task, *tested, "--max-new-tokens", "4")
        assert found.returncode == 0, found.stderr
        assert re.fullmatch(r"gsm8k: [\d.]+ % \(\d of 6\), 95 % interval [\d.]+ to [\d.]+\n", found.stdout)


def test_bad_input_is_one_line_and_status_2(spd, checkpoint, made_records, tmp_path):
    (tmp_path / "typo.toml").write_text('model = "m"\ntasks = ["gsm8k"]\nsede = 1\n')
    (tmp_path / "empty").mkdir()
    task = ["--task", "gsm8k", "--data", made_records]
    out = ["--out", tmp_path / "out"]
    for arguments, message in (
        (["run", tmp_path / "none.toml"], "there is no file"),
        (["run", tmp_path / "typo.toml"], "unknown key 'sede'; did you mean 'seed'"),
        (["calibrate", "-m", tmp_path / "empty", *task, *out], "config.json is missing"),
        (["calibrate", "-m", checkpoint, "-t", "gsm9k", *out], "did you mean 'gsm8k'"),
        (["calibrate", "-m", checkpoint, *task, *out, "--layers", "9"], "layer 9"),
        (["calibrate", "-m", checkpoint, *task, *out, "--layers", "x"], "--layers"),
        (["inspect", tmp_path / "empty"], "not a subspace folder"),
        (["evaluate", "-m", checkpoint, *task, "--adapter", tmp_path / "empty"], "no adapter there"),
        (["distill", "-m", checkpoint, "--generations", tmp_path / "no.jsonl", *out], "there is no file"),
    ):
        found = spd(*arguments)
        assert found.returncode == 2, (arguments, found.stderr)
        assert message in found.stderr
        assert len(found.stderr.strip().splitlines()) == 1, found.stderr
        assert found.stderr.startswith("spd: ")
        assert found.stdout == ""
    assert not (tmp_path / "out").exists()


def test_an_unknown_option_is_status_2(spd):
    assert spd("run", "--no-such-option").returncode == 2
