"""The command line: help at once, results on standard output, one line and status 2 for bad input."""

import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass

import pytest
import typer
from safetensors import SafetensorError

import spd as package
from spd.cli import app, main
from spd.cli.output import print_scores
from spd.errors import InputError
from spd.evaluation import Answer, Evaluation
from spd.recipe import PRESETS
from spd.run import Score

COMMANDS = [
    *("run", "calibrate", "generate", "distill", "evaluate", "inspect", "plan", "long-context", "demo"),
    *("reproduce", "spans", "export", "verify", "drift"),
]


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
    """Every option is on the screen with its whole help text, and every default that is not None."""
    found = spd(command, "--help")
    assert found.returncode == 0
    shown = " ".join(found.stdout.replace("│", " ").split())
    parameters = [each for each in typer.main.get_command(app).commands[command].params if each.name != "help"]
    assert parameters
    for each in parameters:
        assert each.help and each.help in shown
        assert all(name in shown for name in each.opts if name.startswith("-"))
        if each.show_default is not True:
            assert f"[default: ({each.show_default})]" in shown
        elif each.default not in (None, False) and not callable(each.default):
            assert f"[default: {each.default}" in shown


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


def test_prompts_without_room_are_left_out_and_named(spd, checkpoint, tmp_path):
    prompts = ["1 + 1 =", "~" * 511, "1 + 2 ="]
    (tmp_path / "sums").mkdir()
    records = ({"prompt": prompt, "completion": " 2", "spans": ["2"]} for prompt in prompts)
    (tmp_path / "sums" / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    common = ["-m", checkpoint, "-t", tmp_path / "sums", "--out", tmp_path / "g.jsonl", "--max-new-tokens", "4", "-q"]
    found = spd("generate", *common)
    assert found.returncode == 0, found.stderr
    assert "1 of 3 training prompts of sums are too long for the model and are left out: [1]" in found.stderr
    assert [json.loads(line)["prompt"] for line in (tmp_path / "g.jsonl").open()] == [prompts[0], prompts[2]]


def test_deterministic_reaches_every_stage(spd, monkeypatch, checkpoint, made_records, tmp_path):
    seen = []

    def noted(made):
        def call(*arguments, **settings):
            seen.append(settings["deterministic"])
            return made(*arguments, **settings)

        return call

    for stage in ("calibrate", "generate", "distill", "evaluate"):
        monkeypatch.setattr(package, stage, noted(getattr(package, stage)))
    common = ["--model", checkpoint, "--quiet"]
    task = ["--task", "gsm8k", "--data", made_records]
    generated, answers, short = tmp_path / "g.jsonl", tmp_path / "e.jsonl", ["--max-new-tokens", "4"]
    evaluation = ["evaluate", *common, *task, *short, "--out", answers]
    for arguments in (
        ["calibrate", *common, *task, "--out", tmp_path / "s", "--rank", "4", "--layers", "0"],
        ["generate", *common, *task, *short, "--out", generated, "--prompts", "3"],
        ["distill", *common, "--generations", generated, "--out", tmp_path / "a", "--epochs", "1"],
        evaluation,
    ):
        found = spd(*arguments, "--deterministic")
        assert found.returncode == 0, found.stderr
    assert seen == [True] * 4
    assert spd(*evaluation).returncode == 2, "answers made otherwise are not gone on with"
    assert seen[4:] == [False]


def test_help_names_what_there_is(spd):
    shown = " ".join(spd("distill", "--help").stdout.replace("│", " ").split())
    assert all(f'"{preset}"' in shown for preset in PRESETS)


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
        (["evaluate", "-m", checkpoint, *task, "--dtype", "foo"], "dtype: expected one of auto, float32"),
        (["evaluate", "-m", checkpoint, *task, "--mode", "fold"], "--mode and --sides"),
        (["generate", "-m", checkpoint, *task, *out, "--sides", "x"], "--mode and --sides"),
        (["inspect", tmp_path / "empty", "--plot", "s.gif"], "--plot: expected a file name ending in .png"),
        (["calibrate", "-m", checkpoint, *task, *out, "--examples", "0"], "'--examples'"),
        (["calibrate", "-m", checkpoint, *task, *out, "--batch-size", "0"], "'--batch-size'"),
        (["generate", "-m", checkpoint, *task, *out, "--prompts", "-1"], "'--prompts'"),
        (["generate", "-m", checkpoint, *task, *out, "--max-new-tokens", "0"], "'--max-new-tokens'"),
        (["evaluate", "-m", checkpoint, *task, "--questions", "0"], "'--questions'"),
        (["evaluate", "-m", checkpoint, *task, "--questions", "x"], "'--questions'"),
        (["reproduce", "--miniature", "--config", tmp_path / "typo.toml"], "leave out --model, --data and --config"),
        (["evaluate", *task], "Missing option '--model'"),
        (["run", "--no-such-option"], "No such option: --no-such-option"),
        (["evalute"], "No such command 'evalute'"),
    ):
        found = spd(*arguments)
        assert found.returncode == 2, (arguments, found.stderr)
        assert message in found.stderr
        assert len(found.stderr.strip().splitlines()) == 1, found.stderr
        assert found.stderr.startswith("spd: ")
        assert found.stdout == ""
    assert not (tmp_path / "out").exists()


def test_no_arguments_ask_for_help(spd):
    found = spd()
    assert found.returncode == 0
    assert found.stdout == spd("--help").stdout
    assert all(command in found.stdout for command in COMMANDS)


@pytest.mark.parametrize(
    ("command", "resumable"),
    [
        ("run c.toml", True),
        ("demo", True),
        ("generate -m m -t gsm8k --out o", True),
        ("distill -m m --generations g --out o", True),
        ("evaluate -m m -t gsm8k --out=o", True),
        ("evaluate -m m -t gsm8k", False),
        ("calibrate -m m -t gsm8k --out o", False),
        ("inspect s", False),
    ],
)
def test_an_interrupt_is_one_line_and_status_130(command, resumable, spd, monkeypatch):
    for name in (
        *("spd.config.load_config", "spd.load_task", "spd.generation.read_generations"),
        "spd.subspace.Subspace.from_pretrained",
    ):
        monkeypatch.setattr(name, raises(KeyboardInterrupt()))
    found = spd(*command.split())
    promise = "; the same command goes on where it stopped" if resumable else ""
    assert (found.returncode, found.stdout, found.stderr) == (130, "", f"spd: interrupted{promise}\n")


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("StorageFull:\nno space left")]
)
def test_a_failing_disk_is_one_line_and_status_1(error, spd, monkeypatch):
    monkeypatch.setattr("spd.config.load_config", raises(error))
    found = spd("run", "c.toml")
    assert (found.returncode, found.stdout) == (1, "")
    said = " ".join(str(error).split())
    assert found.stderr == f"spd: the disk is full or fails: {said}; the same command goes on where it stopped\n"


def raises(error):
    def function(*arguments, **settings):
        raise error

    return function


def test_data_sets_show_no_bars_either(spd, monkeypatch):
    monkeypatch.delenv("HF_DATASETS_DISABLE_PROGRESS_BARS", raising=False)
    spd("--help")
    assert os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] == "1"


def scores_on(tests):
    answers = [Answer("q", "r", "c", number < 37) for number in range(200)]
    arms = [(None, "base"), *((name, arm) for name in tests[:3] for arm in ("projected", "self-training", "spd"))]
    return [Score(owner, arm, Evaluation(test, answers)) for owner, arm in arms for test in tests]


TESTS = ["words", "choice", "code", "words-ood", "choice-ood", "code-ood"]


@pytest.mark.parametrize("count", [1, 3, 6])
@pytest.mark.parametrize(("terminal", "tables"), [(False, {1: 1, 3: 1, 6: 1}), (True, {1: 1, 3: 1, 6: 2})])
def test_no_score_is_cut_off(count, terminal, tables, tmp_path, monkeypatch, capsys):
    """Eighty columns: a terminal gets as many tables as it needs, a pipe one table that is as wide as it needs."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR" if terminal else "NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb" if not terminal else "xterm")
    scores = scores_on(TESTS[:count])
    print_scores(scores, tmp_path)
    shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    table, _, report = shown.rpartition("report: ")
    assert report.strip() == str(tmp_path / "report.html")
    assert "…" not in table
    assert table.count("trained for") == tables[count]
    assert table.count("18.5 [14, 24]") == len(scores)
    assert all(re.search(rf"\b{test} ", table) for test in TESTS[:count])
    assert table.count("n = 200") == count
    assert max(map(len, table.splitlines())) <= 80 or not terminal


def test_a_subspace_is_verified_and_its_drift_told(checkpoint, made_records, tmp_path, spd):
    task = ["-t", "gsm8k", "--data", made_records]
    folder = tmp_path / "subspace"
    assert spd("calibrate", "-m", checkpoint, *task, "--examples", 8, "--out", folder, "-q").returncode == 0
    shown = spd("verify", folder, "-m", checkpoint, *task, "--whole")
    assert (shown.returncode, "0 differ" in shown.stdout) == (0, True)
    assert "unchecked" not in shown.stdout
    shown = spd("drift", folder, "-m", checkpoint, *task, "-q")
    assert shown.returncode == 0
    assert " K │" in shown.stdout
    assert "of the fresh gradients' energy" in shown.stdout
    manifest = folder / "subspace.json"
    manifest.write_text(manifest.read_text().replace('"rank": "half"', '"rank": "full"'))
    shown = spd("verify", folder)
    assert (shown.returncode, "DIFFERS" in shown.stdout) == (1, True)
    shown = spd("drift", folder, "-m", checkpoint, *task)
    assert (shown.returncode, "altered" in shown.stderr) == (2, True)


def test_spans_are_shown_without_the_weights(made_records, checkpoint, tmp_path, spd):
    arguments = ["spans", "-m", checkpoint, "-t", "gsm8k", "--data", made_records]
    shown = spd(*arguments, "--preview", "--show", 1)
    assert shown.returncode == 0
    assert "24 examples" in shown.stdout
    assert spd(*arguments, "--rule", "regex:= (\\d+)").returncode == 0
    assert spd(*arguments, "--html", tmp_path / "spans.html").returncode == 0
    assert "<script" not in (tmp_path / "spans.html").read_text()
    shown = spd(*arguments, "--rule", "anser")
    assert (shown.returncode, "did you mean 'answer'" in shown.stderr) == (2, True)


def test_the_demo_finds_its_configuration(spd, monkeypatch, tmp_path):
    seen = []

    def stop(settings, out, **_):
        seen.append(settings)
        raise InputError("seen")

    monkeypatch.setattr("spd.run.run", stop)
    assert spd("demo", "--out", tmp_path).returncode == 2
    assert seen[0].model == "proving-ground"
