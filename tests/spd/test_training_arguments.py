"""What the machine and the environment would have transformers choose, and what is ours whatever they say."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import spd
from spd.training.trainer import _Arguments


@pytest.fixture(autouse=True)
def state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name", ["cpu", "meta"])
def test_training_is_on_the_models_device(name, tmp_path):
    """meta stands for a device that transformers would not choose here."""
    device = torch.device(name)
    arguments = _Arguments(device, scaled=False, output_dir=str(tmp_path), report_to="none")
    assert arguments.device == device
    assert arguments.n_gpu == 1
    assert Accelerator(mixed_precision=arguments.mixed_precision).device == device, "it moves the model there"


@pytest.mark.parametrize("said", ["bf16", "fp16"])
def test_the_environment_does_not_choose_the_precision(said, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", said)
    arguments = _Arguments(torch.device("cpu"), scaled=False, output_dir=str(tmp_path), report_to="none")
    assert arguments.mixed_precision == "no"
    assert Accelerator(mixed_precision=arguments.mixed_precision).mixed_precision == "no"


def test_the_loss_is_scaled_where_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    arguments = _Arguments(torch.device("meta"), scaled=True, output_dir=str(tmp_path), report_to="none")
    assert arguments.mixed_precision == "fp16"


def test_accelerate_launch_with_a_precision_changes_no_bit(model, tokenizer, prompts, tmp_path, monkeypatch):
    given = [spd.Generation(i, prompt, " an answer", [], finished=True) for i, prompt in enumerate(prompts[:8])]
    recipe = spd.Recipe(epochs=1, learning_rate=1e-2)
    found = []
    for said in ("no", "bf16"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", said)
        out = spd.distill(model, tokenizer, given, out=tmp_path / said, recipe=recipe, progress=False)
        found.append(load_file(out / "adapter_model.safetensors"))
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
