"""The plain method comes to what the pipeline comes to, and the benchmark that compares their times runs."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

import spd
from benchmarks import pipeline, plain
from benchmarks.contenders import ARMS, Setting, qwen2, without_adapter_afterwards
from benchmarks.pipeline import OURS, PLAIN, QUICK, STAGES, TARGETS

WIDTHS = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TINY = partial(qwen2, **WIDTHS)


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    model, tokenizer = TINY("cpu")
    with torch.no_grad():  # weights large enough for the logits to differ
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    return model, tokenizer


@pytest.fixture
def ours(tiny: tuple[Any, Any]) -> tuple[Any, Any]:
    return copy.deepcopy(tiny[0]), tiny[1]


@pytest.fixture
def theirs(tiny: tuple[Any, Any]) -> tuple[Any, Any]:
    return copy.deepcopy(tiny[0]), copy.deepcopy(tiny[1])


@pytest.mark.parametrize("freeze", [False, True])
def test_the_subspace_is_the_same(ours: tuple[Any, Any], theirs: tuple[Any, Any], freeze: bool) -> None:
    examples = spd.load_task("words").calibration()[:6]
    subspace = spd.calibrate(*ours, examples, progress=False)
    bases = plain.calibrate(*theirs, examples, freeze=freeze)
    assert {layer for layer, _ in bases} == set(subspace.layers) == {1, 2}
    for (layer, side), u in bases.items():
        basis = subspace.side(side)[layer].basis
        assert u.shape == basis.shape == (24, 12)
        assert float((u.T @ basis).square().sum()) / 12 == pytest.approx(1.0, abs=1e-4)


def test_the_projection_and_the_greedy_answers_are_the_same(ours: tuple[Any, Any], theirs: tuple[Any, Any]) -> None:
    task = spd.load_task("words")
    bases = plain.calibrate(*theirs, task.calibration()[:6])
    subspace = spd.calibrate(*ours, task.calibration()[:6], progress=False)
    bare, _ = plain.evaluate(*theirs, task, limit=5, max_new_tokens=12)
    with plain.projected(theirs[0], bases):
        projected, accuracy = plain.evaluate(*theirs, task, limit=5, max_new_tokens=12)
    assert bare != projected
    assert bare == [a.completion for a in spd.evaluate(*ours, task, limit=5, max_new_tokens=12, progress=False).answers]
    with spd.attach(ours[0], subspace):
        found = spd.evaluate(*ours, task, limit=5, max_new_tokens=12, progress=False)
    assert projected == [answer.completion for answer in found.answers]
    assert accuracy == found.accuracy


def test_the_first_step_has_the_same_loss(ours: tuple[Any, Any], theirs: tuple[Any, Any], tmp_path: Path) -> None:
    prompts = spd.load_task("words").training_prompts()[:4]
    completions = plain.generate(*theirs, prompts, max_new_tokens=10)
    assert all(1 <= len(tokens) <= 10 for tokens in completions)
    generations = [
        spd.Generation(index, prompt, ours[1].decode(tokens), tokens, finished=False)
        for index, (prompt, tokens) in enumerate(zip(prompts, completions, strict=True))
    ]
    recipe = spd.Recipe(epochs=1, lora_dropout=0.0)
    adapter = spd.distill(*ours, generations, out=tmp_path / "adapter", recipe=recipe, progress=False)
    first = json.loads((adapter / "training.json").read_text())["loss"][0]["loss"]
    before = {name: value.clone() for name, value in theirs[0].state_dict().items()}
    with without_adapter_afterwards(theirs[0]):
        _, losses = plain.train(*theirs, prompts, completions, epochs=1, lora_dropout=0.0)
    assert losses == [pytest.approx(first, abs=1e-5)]
    after = theirs[0].state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())


def test_the_whole_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(QUICK, "qwen2-100m", Setting(TINY, examples=4, prompts=4, questions=2, epochs=1, new_tokens=6))
    app = Typer()
    app.command()(pipeline.main)
    result = CliRunner().invoke(app, ["--quick", "--model", "qwen2-100m", "--device", "cpu", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert all(word in result.output for word in (*TARGETS, "times as fast", "generate at batch 8", "met"))
    figures = json.loads((tmp_path / "cpu.json").read_text())
    assert figures["quick"] and figures["machine"]["device"]
    model = figures["models"]["qwen2-100m"]
    assert set(model["stages"]) == {*STAGES, "whole run"}
    for name, row in model["stages"].items():
        assert row["target"] == TARGETS[name] and row["met"] == (row["ratio"]["median"] >= row["target"])
        assert len(row["seconds"][PLAIN]) == len(row["seconds"][OURS]) == len(row["ratios"]) == 1
    seconds = {stage: row["seconds"] for stage, row in model["stages"].items()}
    rest = [stage for stage in STAGES if stage != "generation"]
    by_token = model["stages"]["generation"]["ratios"][0] * seconds["generation"][OURS][0]  # plain's, for our tokens
    for who, generation in ((PLAIN, by_token), (OURS, seconds["generation"][OURS][0])):
        assert seconds["whole run"][who][0] == pytest.approx(generation + sum(seconds[s][who][0] for s in rest))
        assert len(model["tokens_per_second"][f"{who}, unprojected"]) == 1
    table = (tmp_path / "table.md").read_text()
    assert "times as fast [least, most of 1]" in table and "p90" in table  # the taps' rounds are many
    assert figures["machine"]["device"] in table and figures["machine"]["versions"]["torch"] in table
    assert all(f"| {name}" in table for name in TARGETS) and "rounds: 1" in table
    assert all(check["met"] for check in model["checks"].values())
    assert model["checks"]["greedy answers"]["of"] == 2 * len(ARMS)
    assert matplotlib.image.imread(tmp_path / "cpu.png").std() > 0.01


def test_few_rounds_are_shown_by_their_ends() -> None:
    assert pipeline.spread([4.5, 4.9, 4.4]) == "4.50 [4.40, 4.90]"
    assert pipeline.percentiles({"median": 1.0, "p10": 0.9, "p90": 1.1}) == "1.00 [0.90, 1.10]"


def test_a_task_whose_answers_stop_is_refused(theirs: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    task = spd.load_task("words")
    monkeypatch.setattr(task, "stop", ("\n",), raising=False)
    with pytest.raises(AssertionError, match="would not end"):
        plain.evaluate(*theirs, task, limit=1, max_new_tokens=2)


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    app = Typer()
    app.command()(pipeline.main)
    result = CliRunner().invoke(app, ["--model", "gpt", "--out", str(tmp_path)])
    assert result.exit_code == 2 and "proving-ground" in result.output and not list(tmp_path.iterdir())
