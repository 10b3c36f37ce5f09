"""Training: the published loss and settings, the base model untouched, a killed run that ends as if undisturbed."""

import json
import random
from dataclasses import asdict

import numpy as np
import peft.utils.save_and_load
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

import spd
from spd.recipe import PRESETS
from spd.training import trainer
from spd.training.texts import IGNORED, collate, encode

FAST = spd.Recipe(epochs=6, batch_size=4, learning_rate=2e-2, lora_dropout=0.1)


@pytest.fixture(scope="module")
def generations(prompts):
    return [
        spd.Generation(index, prompt, f" the answer is {index}", [], finished=index % 3 > 0)
        for index, prompt in enumerate(prompts)
    ]


def train(model, tokenizer, generations, out, recipe=FAST):
    return spd.distill(model, tokenizer, generations, out=out, recipe=recipe, progress=False)


def logits(model, tokenizer):
    tokens = tokenizer(["Question: how many apples?"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(tokens).logits


def test_the_preset_is_as_published():
    assert asdict(PRESETS["paper"]) == {
        "lora_rank": 8,
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "learning_rate": 1e-5,
        "weight_decay": 0.01,
        "epochs": 5,
        "warmup_epochs": 0.5,
        "batch_size": 4,
        "max_length": 256,
        "max_grad_norm": 1.0,
        "prompt_loss": True,
        "seed": 42,
    }


@pytest.mark.parametrize("family", ["qwen3", "phi3", "gpt2", "gpt_neox"])
def test_training_learns_and_leaves_the_base_model_alone(family, make_model, tokenizer, generations, tmp_path):
    model = make_model(family)
    base = logits(model, tokenizer)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    out = train(model, tokenizer, generations, tmp_path / "adapter")

    manifest = json.loads((out / "training.json").read_text())
    losses = [entry["loss"] for entry in manifest["loss"]]
    assert losses[-1] < losses[0] - 0.2
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        n: t.shape for n, t in before.items()
    }
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert torch.equal(logits(model, tokenizer), base)
    assert model.config.use_cache
    with spd.adapted(model, out) as tuned:
        assert float((logits(tuned, tokenizer) - base).abs().max()) > 1e-2
    assert torch.equal(logits(model, tokenizer), base)
    assert not (tmp_path / "adapter.checkpoints").exists()


def test_a_composite_configuration_is_left_as_it_was(tokenizer, generations, tmp_path):
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 310, "max_position_embeddings": 256}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    places = {"image_token_index": 301, "boi_token_index": 302, "eoi_token_index": 303}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **places)
    model = Gemma3ForConditionalGeneration(config).eval()
    assert not hasattr(config, "use_cache")
    before = model.config.to_dict()
    out = train(model, tokenizer, generations[:4], tmp_path / "adapter", spd.Recipe(epochs=1))
    assert (out / "training.json").is_file()
    assert model.config.to_dict() == before and not hasattr(model.config, "use_cache")
    model.config.use_cache = True
    train(model, tokenizer, generations[:4], tmp_path / "other", spd.Recipe(epochs=1))
    assert model.config.use_cache is True


def test_saving_does_not_ask_the_hub(model, tokenizer, generations, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(peft.utils.save_and_load, "check_file_exists_on_hf_hub", lambda *names: asked.append(names))
    monkeypatch.setattr(trainer, "CHECKPOINT_STEPS", 1)
    model.name_or_path = model.config._name_or_path = "somebody/something"
    train(model, tokenizer, generations[:8], tmp_path / "adapter", spd.Recipe(epochs=1))
    assert asked == []


def test_the_adapter_is_a_plain_peft_adapter(model, make_model, tokenizer, generations, tmp_path):
    out = train(model, tokenizer, generations, tmp_path / "adapter")
    with spd.adapted(model, out) as tuned:
        expected = logits(tuned, tokenizer)
    assert torch.equal(logits(PeftModel.from_pretrained(make_model("qwen3"), out), tokenizer), expected)
    names = {name.rsplit(".", 3)[1] for name in load_file(out / "adapter_model.safetensors")}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_the_loss_is_on_prompt_and_completion_and_never_on_padding(tokenizer):
    long = spd.Generation(0, "Question: how many?\nAnswer:", " there are 12", [], finished=True)
    short = spd.Generation(1, "Q:", " 1", [], finished=False)
    rows = [encode(tokenizer, generation, spd.Recipe()) for generation in (long, short)]
    assert rows[0].tokens == tokenizer(long.prompt + long.completion)["input_ids"] + [tokenizer.eos_token_id]
    assert rows[1].tokens == tokenizer("Q: 1")["input_ids"], "no end where the model did not end"
    batch = collate(rows)
    real = batch["attention_mask"].bool()
    assert real.sum(1).tolist() == [len(row.tokens) for row in rows]
    assert torch.equal(batch["labels"][real], batch["input_ids"][real])
    assert (batch["labels"][~real] == IGNORED).all()


def test_the_loss_can_be_on_the_completion_only(tokenizer):
    generation = spd.Generation(0, "Question:", " there are 12", [], finished=True)
    row = encode(tokenizer, generation, spd.Recipe(prompt_loss=False))
    prompt_length = len(tokenizer("Question:")["input_ids"])
    assert row.labels == [IGNORED] * prompt_length + row.tokens[prompt_length:]
    assert row.targets == len(row.tokens) - prompt_length


def test_long_sequences_are_cut(tokenizer):
    generation = spd.Generation(0, "z" * 50, "y" * 50, [], finished=True)
    for prompt_loss in (True, False):
        row = encode(tokenizer, generation, spd.Recipe(max_length=16, prompt_loss=prompt_loss))
        assert len(row.tokens) == len(row.labels) == 16 and row.cut


def test_what_is_trained_is_what_was_sampled(tokenizer):
    """Text does not always lead back to its tokens, and a model may have several end tokens."""
    prompt, sampled = tokenizer("Question:")["input_ids"], [40, 41, 42, 7]
    generation = spd.Generation(0, "Question:", tokenizer.decode(sampled[:-1]), sampled, finished=True)
    assert encode(tokenizer, generation, spd.Recipe()).tokens == prompt + sampled


def test_completions_without_a_token_to_train_on_are_refused(model, tokenizer, tmp_path):
    cut = [spd.Generation(0, "z" * 50, "y" * 50, [], finished=True)]
    with pytest.raises(spd.InputError, match="with a token to train on"):
        train(model, tokenizer, cut, tmp_path / "adapter", spd.Recipe(max_length=16, prompt_loss=False))


def test_what_is_not_ours_is_not_deleted(model, tokenizer, generations, tmp_path):
    work = tmp_path / "adapter.checkpoints"
    (work / "checkpoint-500").mkdir(parents=True)
    (work / "notes.txt").write_text("mine")
    with pytest.raises(spd.InputError, match="holds something else"):
        train(model, tokenizer, generations, tmp_path / "adapter")
    assert (work / "notes.txt").read_text() == "mine"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(spd.InputError, match="holds no finished adapter"):
        train(model, tokenizer, generations, tmp_path / "full")


def test_an_empty_folder_will_do(model, tokenizer, generations, tmp_path):
    (tmp_path / "adapter").mkdir()
    train(model, tokenizer, generations[:4], tmp_path / "adapter", spd.Recipe(epochs=1))
    assert (tmp_path / "adapter" / "training.json").is_file()


def test_the_callers_random_numbers_go_on(model, tokenizer, generations, tmp_path):
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    draw()
    expected = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    draw()
    train(model, tokenizer, generations[:4], tmp_path / "adapter", spd.Recipe(epochs=1))
    assert draw() == expected


def test_generating_with_an_adapter_leaves_the_generation_settings(model, tokenizer, generations, tmp_path):
    out = train(model, tokenizer, generations[:4], tmp_path / "adapter", spd.Recipe(epochs=1))
    model.generation_config.repetition_penalty = 1.3
    with spd.adapted(model, out) as tuned:
        spd.generate(tuned, tokenizer, ["Question:"], max_new_tokens=2, progress=False)
        with pytest.raises(spd.InputError, match="adapter already"), spd.adapted(tuned, out):
            pass
    assert model.generation_config.repetition_penalty == 1.3


def test_an_adapter_of_another_model_is_refused(model, make_model, tokenizer, generations, tmp_path):
    out = train(model, tokenizer, generations, tmp_path / "adapter")
    with pytest.raises(spd.InputError, match="trained on"), spd.adapted(make_model("llama"), out):
        pass
    with pytest.raises(spd.InputError, match="no adapter there"), spd.adapted(model, tmp_path):
        pass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"epochs": -1}, "epochs"),
        ({"lora_rank": 0}, "lora_rank"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"weight_decay": float("nan")}, "weight_decay"),
        ({"batch_size": 2.5}, "batch_size: expected an integer"),
        ({"prompt_loss": "false"}, "prompt_loss"),
    ],
)
def test_bad_recipes_are_refused(changes, message):
    with pytest.raises(spd.InputError, match=message):
        spd.Recipe(**changes)


def test_bad_input_is_refused(model, tokenizer, generations, tmp_path):
    with pytest.raises(spd.InputError, match="at least one"):
        train(model, tokenizer, [], tmp_path / "adapter")
    with pytest.raises(spd.InputError, match="'published'"):
        train(model, tokenizer, generations, tmp_path / "adapter", "published")
    assert list(tmp_path.iterdir()) == []


def test_what_is_cut_is_counted(model, tokenizer, generations, tmp_path):
    recipe = spd.Recipe(epochs=1, max_length=40)
    long = sum(len(tokenizer(g.prompt + g.completion)["input_ids"]) + g.finished > 40 for g in generations)
    assert long
    with pytest.warns(
        UserWarning, match=rf"distill: {long} of {len(generations)} texts are longer than max_length = 40"
    ):
        out = train(model, tokenizer, generations, tmp_path / "a", recipe)
    assert json.loads((out / "training.json").read_text())["cut"] == long
