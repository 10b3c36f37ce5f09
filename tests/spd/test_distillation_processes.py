"""Training by several processes: the same batches, the same losses and, but for rounding, the same adapter."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import spd


@pytest.fixture(scope="module")
def folder(checkpoint, prompts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    made = [
        spd.Generation(index, prompt, f" the answer is {index}", [], finished=index % 3 > 0)
        for index, prompt in enumerate(prompts[:18])
    ]
    (folder / "generations.json").write_text(json.dumps([astuple(each) for each in made]))
    script = Path(__file__).with_name("training_processes.py")
    environment = os.environ | {"PYTHONPATH": str(Path(spd.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(folder)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def said(folder, job, size):
    return [json.loads((folder / f"{job}-{size}-{number}.json").read_text()) for number in range(size)]


def assert_same_training(folder, one, other):
    a, b = (load_file(folder / name / "adapter_model.safetensors") for name in (one, other))
    assert a.keys() == b.keys()
    furthest = max(float((a[name] - b[name]).abs().max()) for name in a)
    assert furthest < 1e-4 * max(float(tensor.abs().max()) for tensor in a.values())
    losses = [json.loads((folder / name / "training.json").read_text())["loss"] for name in (one, other)]
    assert [entry["step"] for entry in losses[0]] == [entry["step"] for entry in losses[1]]
    for key in ("loss", "learning_rate"):
        assert [entry[key] for entry in losses[0]] == pytest.approx([entry[key] for entry in losses[1]], rel=1e-5)


@pytest.mark.parametrize("size", [2, 3])
def test_the_adapter_does_not_depend_on_the_number_of_processes(folder, size):
    assert said(folder, "plain", size) == [f"plain-{size}"] * size
    assert_same_training(folder, "plain-1", f"plain-{size}")


def test_a_process_without_a_text_of_a_batch(folder):
    assert said(folder, "one_text_a_step", 3) == ["small-3"] * 3
    assert_same_training(folder, "small-1", "small-3")


def test_a_training_goes_on_with_another_number_of_processes(folder):
    assert said(folder, "moved", 3) == ["ValueError: pulled"] * 3
    assert said(folder, "moved", 2) == ["ValueError: pulled"] * 2
    assert said(folder, "moved", 1) == ["moved"]
    assert_same_training(folder, "plain-1", "moved")


def test_dropout_is_the_same_again_after_a_pause(folder):
    assert said(folder, "with_dropout", 2) == ["dropout"] * 2
    assert said(folder, "with_dropout_and_a_pause", 2) == ["paused"] * 2
    plain, dropout, paused = (
        load_file(folder / name / "adapter_model.safetensors") for name in ("plain-2", "dropout", "paused")
    )
    assert all(torch.equal(tensor, paused[name]) for name, tensor in dropout.items())
    assert not any(torch.equal(tensor, plain[name]) for name, tensor in dropout.items())


def test_processes_that_disagree_refuse_together(folder):
    assert all("expected the same in all 2 processes" in words for words in said(folder, "other_texts", 2))
    assert all("at least one with a token to train on" in words for words in said(folder, "no_texts_in_one", 2))
    assert not (folder / "refused").exists()
    assert not (folder / "refused.checkpoints").exists()
    assert not list(folder.glob(".*.lock"))


def test_a_process_that_fails_in_a_step_ends_all(folder):
    waiting, failing = said(folder, "one_without_memory", 2)
    assert failing.startswith("InputError: distill: not even one of the texts fits in memory")
    assert waiting == "InputError: distill: step 3: another process failed in its share of the batch, and says why"
    assert not (folder / "without").exists()
