"""Tiny random models of every family, a tokenizer, and labelled examples: enough to run the method in milliseconds."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES, MORE_FAMILIES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import spd

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges, so that a token can be longer than a character."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(
        ["Question: how many apples are there? Answer: there are 1234 apples #### 1234"], trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")


@pytest.fixture(scope="session")
def make_model(tokenizer: PreTrainedTokenizerFast) -> Callable[..., PreTrainedModel]:
    """`make_model(family, **config)`: a random model with weights large enough for its logits to differ."""

    def make(family: str = "qwen3", seed: int = 0, **changes: object) -> PreTrainedModel:
        name, widths = (FAMILIES | MORE_FAMILIES)[family]
        tokens = {"vocab_size": len(tokenizer), "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}
        limit = {"n_positions" if family == "gpt2" else "max_position_embeddings": 512}
        stem = "Gemma3Text" if name == "Gemma3" else name
        config = getattr(transformers, f"{stem}Config")(**(widths | tokens | limit | changes))
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(3.0)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture
def model(make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_model("qwen3")


@pytest.fixture(scope="session")
def examples() -> list[spd.Example]:
    """Word problems of different lengths; S is the number after ####."""
    made = []
    for number in range(3, 23):
        prompt = f"Question: {'very ' * (number % 5)}many apples are {number} and {number}?\nAnswer:"
        completion = f" {number} and {number} are\n#### {2 * number}"
        end = len(prompt) + len(completion)
        made.append(spd.Example(prompt, completion, [(end - len(str(2 * number)), end)]))
    return made


@pytest.fixture(scope="session")
def prompts(examples: list[spd.Example]) -> list[str]:
    return [example.prompt for example in examples]


@pytest.fixture(scope="session")
def subspace_of(
    tokenizer: PreTrainedTokenizerFast, examples: list[spd.Example]
) -> Callable[[PreTrainedModel], spd.Subspace]:
    return lambda model: spd.calibrate(model, tokenizer, examples, progress=False)


@pytest.fixture(scope="session")
def records() -> Path:
    """The folder of public data sets' records, where the machine has it."""
    folder = Path(os.environ.get("SPD_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data set records at {folder}; name their folder in SPD_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def made_records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder in the layout of `--data`, written by this test run."""
    import json

    folder = tmp_path_factory.mktemp("data")
    for split, start, count in (("train", 2, 24), ("test", 60, 6)):
        gsm8k = [
            {
                "question": f"How many are {n} and {n}?",
                "answer": f"{n} + {n} = <<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}",
            }
            for n in range(start, start + count)
        ]
        svamp = [
            {"Body": f"Ann has {n} pens", "Question": "How many pens?", "Equation": f"( {n}.0 )", "Answer": str(n)}
            for n in range(start, start + count)
        ]
        for name, made in (("gsm8k", gsm8k), ("svamp", svamp)):
            path = folder / name / f"{split}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(record) + "\n" for record in made))
    return folder


@pytest.fixture(scope="session")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """A Hugging Face checkpoint folder of a tiny Qwen2-shaped model."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model("qwen2").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
