"""Names that drive a terminal, and links that lead out of a run's folder: shown as they are, and never followed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import NASTY_TEXT, Tally, check_message, fuzzed
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

import spd
from spd.cli.output import print_evaluation, print_scores, print_spectra
from spd.evaluation import Answer, Evaluation
from spd.files import write_json
from spd.run import owned
from spd.shown import markdown, one_line, visible
from spd.span_preview import preview, print_preview
from spd.stages import Score

HOSTILE = [
    *("[red]x[/red]", "[link=http://x]y[/link]", "[/]", "[bold", ":smile:", "\\[a]", "\x1b[31mx\x1b[0m"),
    *("\x1b]8;;http://x\x07y\x1b]8;;\x07", "\x9b2J", "\x07\x08\x7f", "\u202etxt\u2066", "\0", "a\r\nb"),
]


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Any:
    counted = Tally(request.node.name)
    yield counted
    counted.write()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As wide and as colourful as one can be, so that whatever rich would make of a name shows."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "400")
    yield


def check_printed(printed: str, text: str) -> None:
    own = printed
    for code in ("\x1b[1m", "\x1b[3m", "\x1b[0m", "\x1b[2m", "\x1b[3;", "\x1b[1;", "\x1b["):
        own = own.replace(code, "\x1b[")
    assert "\x1b]" not in printed and "\x9b" not in printed and not set(printed) & set("\x07\x08\0\x7f\r\u202e\u2066")
    assert "\x1b[31mx" not in printed and "\x1b[2J" not in printed
    if text.isprintable():
        assert text in printed


def basis(seed: int) -> spd.Basis:
    u, s, _ = torch.linalg.svd(torch.randn(4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return spd.Basis(u[:, :2].float().contiguous(), s)


@fuzzed
@given(text=st.text() | st.sampled_from(NASTY_TEXT) | st.sampled_from(HOSTILE))
def test_text_to_show(text: str, tally: Tally) -> None:
    for show in (visible, one_line, markdown):
        shown = tally.attempt(show, text)
        shown.encode()
        check_message(f"x{shown.replace(chr(10), ' ').replace(chr(9), ' ')}"[:100])
    assert visible(visible(text)) == visible(text)
    assert "\n" not in one_line(text)
    error = str(spd.InputError(f"name: {text}"))
    check_message(error)
    assert not text.isprintable() or len(text) > 1000 or text.strip() in error


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_what_commands_print(
    text: str, terminal: None, capsys: pytest.CaptureFixture[str], tmp_path: Path, tally: Tally
) -> None:
    evaluation = Evaluation(text, [Answer("p", "r", text, True), Answer("p", "r", text, False)])
    for show in (
        lambda: print_evaluation(evaluation),
        lambda: print_scores([Score(None, "base", evaluation), Score(text, text, evaluation)], tmp_path),
        lambda: print_spectra(text, spd.Subspace({0: basis(0)}, {0: basis(1)}, {"model": text})),
    ):
        tally.attempt(show)
        check_printed(capsys.readouterr().out, text)


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_the_preview_of_spans(
    text: str,
    terminal: None,
    tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
    tally: Tally,
) -> None:
    tally.attempt(print_preview, preview(tokenizer, [spd.Example(f"a{text}", f"{text}b", [(0, 1)])]))
    printed = capsys.readouterr().out
    check_printed(printed, "")
    assert not text.isprintable() or printed.count("smile") == text.count("smile") * 2


def test_commands_refuse_in_one_line_that_is_shown_as_it_is(tmp_path: Path) -> None:
    """Whatever the name stands for: a task, a configuration, a model, a subspace, a run."""
    text = "\x1b[2J\x1b]0;x\x07[red]x\na\u202e"
    folder = tmp_path / text
    folder.mkdir()
    (folder / "train.jsonl").write_text("{")
    (folder / "run.toml").write_text("model = ")
    program = (
        "import sys\nfrom spd.cli import main\n"
        "for arguments in ARGUMENTS:\n"
        "    sys.argv = ['spd', *arguments]\n"
        "    try:\n        main()\n"
        "    except SystemExit as end:\n        print(end.code)\n"
    )
    commands = [
        ["inspect", str(folder)],
        ["verify", str(folder)],
        ["run", str(folder / "run.toml")],
        ["spans", "-m", str(folder), "-t", text],
        ["spans", "-m", "proving-ground", "-t", str(folder)],
        ["inspect", text],
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(spd.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-c", program.replace("ARGUMENTS", repr(commands))],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        cwd=tmp_path,
    )
    assert found.stdout.split() == ["2"] * len(commands), found.stderr
    lines = found.stderr.splitlines()
    assert len(lines) == len(commands), found.stderr
    for line in lines:
        check_message(line)


# Run folders


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    write_json(folder / "config.json", {"model": "m"})
    return folder


def start(folder: Path) -> str:
    with owned(folder, {"model": "m"}):
        return "started"


def test_leftovers_are_removed_and_links_among_them_are_no_way_out(run: Path, tmp_path: Path, tally: Tally) -> None:
    outside = tmp_path / "outside"
    (outside / ".inner.tmp").mkdir(parents=True)
    (outside / "kept").write_text("kept")
    (run / "words" / ".left.tmp").mkdir(parents=True)
    (run / "words" / ".file.tmp").write_text("")
    (run / "words" / ".inside.tmp").symlink_to(run / "words")
    assert tally.attempt(start, run) == "started"
    assert [path.name for path in (run / "words").iterdir()] == []
    for name in (".link.tmp", "words/link", "evaluations"):
        (run / name).symlink_to(outside)
        tally.attempt(start, run)
        assert "leads out of" in tally.said
        assert sorted(path.name for path in outside.iterdir()) == [".inner.tmp", "kept"]
        (run / name).unlink()


@pytest.mark.parametrize("name", [".lock", "config.json", "timings.json", "base"])
@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "loop", "deep"])
def test_what_lies_in_the_place_of_a_file(name: str, kind: str, run: Path, tmp_path: Path, tally: Tally) -> None:
    outside = tmp_path / "outside"
    outside.write_text("kept")
    path = run / name
    path.unlink(missing_ok=True)
    if kind in ("link", "dangling"):
        path.symlink_to(outside if kind == "link" else tmp_path / "nowhere")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        path.write_text("[" * 100_000)
    tally.attempt(start, run)
    assert outside.read_text() == "kept" and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("stored", ["[]", "null", "5", '"x"', '{"model": {"model": "m"}}', "[" * 10**5, "NaN", "\xff"])
def test_the_stored_configuration(stored: str, run: Path, tally: Tally) -> None:
    (run / "config.json").write_text(stored, encoding="latin-1")
    tally.attempt(start, run)
    assert "config.json" in tally.said or "another configuration" in tally.said


def test_names_in_a_manifest_of_completions(tmp_path: Path, tally: Tally) -> None:
    """What is verified is below the folder, whatever a score names."""
    subspace = spd.Subspace({0: basis(0)}, {0: basis(1)}, {"model": "m"})
    subspace.save_pretrained(tmp_path / "run" / "t" / "subspace")
    score = {"capability": "../..", "arm": "base", "n": 1, "correct": 1}
    for name in NASTY_TEXT:
        rows = [score | {"task": name}, score | {"capability": name, "task": name}, score | {"task": f"../{name}"}]
        try:
            write_json(tmp_path / "run" / "metrics.json", json.loads(json.dumps(rows)))
        except ValueError:
            continue
        report = tally.attempt(spd.verify, tmp_path / "run")
        assert not [check for check in report.checks if check.file == "metrics.json" and check.verdict == "agrees"]
        check_message(report.text().replace("\n", " ").replace("\t", " ")[:2000])
