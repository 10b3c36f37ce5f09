"""`python -m benchmarks.gpu`: its whole flow on the CPU, its predictions, and what it says to bad arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest

from benchmarks.gpu.__main__ import BUDGETS, main, parser
from benchmarks.operations import tiny_cases

ROOT = Path(__file__).parents[2]


def command(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        timeout=900,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one rehearsal leaves behind."""
    out = tmp_path_factory.mktemp("rehearsal") / "out"
    # The usual time is for an idle machine.
    result = command("--rehearse", "--out", str(out), "--seconds", "1800")
    assert result.returncode == 0, result.stdout + result.stderr
    assert all(f" {stage}," in result.stdout for stage in BUDGETS)
    return out


@pytest.mark.slow
def test_every_file_is_there_and_no_other(folder: Path) -> None:
    expected = {"results.json", "results.md", "tuning.json", "roofline.png", "shares.png", "tests.txt"}
    assert {path.name for path in folder.iterdir()} == expected


@pytest.mark.slow
def test_every_case_has_a_row(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    assert results["tests"]["green"] and results["tests"]["passed"] and results["sanitize"]["clean"]
    assert {stage["status"] for stage in results["stages"].values()} == {"done"}
    rows = {(row["operation"], row["case"]): row for row in results["cases"]}
    cases = tiny_cases()
    assert set(rows) == {(case.operation, case.label) for case in cases}
    for case in cases:
        row = rows[case.operation, case.label]
        assert row["notes"].keys() <= {"compiled, graph"}
        assert row["error"] <= row["allowed_error"] and row["bytes"] > 0 and row["flops"] > 0
        timed = set(case.contenders) | ({"compiled"} if case.compiled else set())
        assert set(row["seconds"]["calls"]) == timed
        assert set(row["seconds"].get("graph", ())) == (set(case.contenders) if case.decode else set())
        for timing in row["seconds"]["calls"].values():
            assert 0 < timing["p10"] <= timing["median"] <= timing["p90"]


@pytest.mark.slow
def test_every_tuned_case_tried_its_frozen_choice(folder: Path) -> None:
    tuning = json.loads((folder / "tuning.json").read_text())
    tuned = [case for case in tiny_cases() if case.tuning is not None]
    assert {(row["operation"], row["case"]) for row in tuning["cases"]} == {(c.operation, c.label) for c in tuned}
    assert tuning["not_tuned"] == []
    for row in tuning["cases"]:
        assert [entry["frozen"] for entry in row["tried"]].count(True) == 1
        assert "seconds" in row["tried"][0] and row["tried"][0]["frozen"], row["tried"][0]


@pytest.mark.slow
def test_the_tables_say_that_their_times_mean_nothing(folder: Path) -> None:
    text = (folder / "results.md").read_text()
    assert "Rehearsal on a CPU: times mean nothing" in text
    assert "No figure below may be quoted" not in text
    assert all(f"\n## {case.operation}\n" in text for case in tiny_cases())
    blocks = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) >= 2 + len({case.operation for case in tiny_cases()})
    for block in blocks:
        assert len({line.replace("\\|", "").count("|") for line in block.splitlines()}) == 1, block


@pytest.mark.slow
def test_the_figures_are_images(folder: Path) -> None:
    for name in ("roofline.png", "shares.png"):
        pixels = matplotlib.image.imread(folder / name)
        assert pixels.shape[0] > 200 and pixels.shape[1] > 800 and pixels.std() > 0.01


@pytest.mark.slow
def test_plotting_again_needs_no_device(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "shares.png").unlink()
    assert main(["--stages", "plot", "--out", str(folder)]) == 0
    assert (folder / "shares.png").exists()
    assert main(["--stages", "plot", "--out", str(folder / "nowhere")]) == 2
    assert "expected a folder with results.json" in capsys.readouterr().err


def test_without_a_device(tmp_path: Path) -> None:
    result = command("--out", str(tmp_path / "out"))
    assert result.returncode == 2 and "No CUDA device" in result.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--out: expected a folder"),
        (["--out", "x", "--stages", "test,rest"], "expected some of test, sanitize, tune, time, plot; got rest"),
        (["--out", "x", "--seconds", "0"], "--seconds: expected a positive number; got 0"),
        (["--out", __file__], "--out: expected a folder, got the file"),
    ],
    ids=["no folder", "stage", "seconds", "file"],
)
def test_bad_arguments(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(options)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_the_help_explains_every_stage_and_file() -> None:
    text = parser().format_help()
    for word in (*BUDGETS, "results.md", "results.json", "tuning.json", "roofline.png", "shares.png", "Exit status"):
        assert word in text
    assert sum(BUDGETS.values()) < 480


def test_predictions_are_those_of_the_cases(capsys: pytest.CaptureFixture[str]) -> None:
    """Rewrite with `python -m benchmarks.gpu --predict > csrc_notes/predictions.md`."""
    assert main(["--predict"]) == 0
    assert (ROOT / "csrc_notes" / "predictions.md").read_text() == capsys.readouterr().out


def test_it_imports_without_data_sets_or_an_installed_package() -> None:
    code = """
import sys
sys.modules["datasets"] = None
sys.modules["peft"] = None
import benchmarks.gpu.__main__, benchmarks.gpu.child, benchmarks.gpu.plots
print("triton" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "False"
