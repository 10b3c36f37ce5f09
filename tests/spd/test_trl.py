"""The example that trains with TRL: two steps, and its loss beside this package's own."""

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from peft import AutoPeftModelForCausalLM

import spd

pytest.importorskip("trl", reason="trl is not installed (it is no dependency)")


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[2] / "examples" / "trl_sft.py"
    spec = importlib.util.spec_from_file_location("trl_sft", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_trl_takes_the_same_loss(example, checkpoint, prompts, tmp_path):
    """At the first step the adapter does nothing yet, so both losses are the model's own on the same tokens."""
    model, tokenizer = spd.load_model(checkpoint)
    completions = tmp_path / "completions.jsonl"
    made = spd.generate(model, tokenizer, prompts[:4], out=completions, max_new_tokens=12, progress=False)
    assert [json.loads(line) for line in completions.read_text().splitlines()] != []

    exact = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False}
    trainer = example.train(
        str(checkpoint), str(completions), str(tmp_path / "trl"), max_steps=2, logging_steps=1, **exact
    )
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2

    recipe = spd.Recipe(epochs=2, warmup_epochs=0)
    adapter = spd.distill(model, tokenizer, made, out=tmp_path / "own", recipe=recipe, progress=False)
    own = json.loads((adapter / "training.json").read_text())["loss"][0]["loss"]
    assert logged[0] == pytest.approx(own, rel=1e-3), asdict(made[0])

    tuned = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "trl")
    assert any("lora_B" in name and parameter.abs().max() > 0 for name, parameter in tuned.named_parameters())
