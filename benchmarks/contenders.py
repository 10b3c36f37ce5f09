"""The whole method by `plain` and by `spd`, stage by stage, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

import spd
from benchmarks import plain
from spd.files import read_json
from spd.tasks.base import Task

ARMS = (("base", "words"), ("projected", "words"), ("spd", "words"), ("spd", "words-ood"))
"""What is evaluated: an arm, and the task that it is tested on."""


@dataclass(frozen=True)
class Setting:
    """A model, and how much of the method it goes through. `new_tokens` limits completions and answers alike."""

    make: Callable[[str], tuple[Any, Any]]
    examples: int
    prompts: int
    questions: int
    epochs: int
    new_tokens: int = 48
    learning_rate: float = 3e-3

    @property
    def recipe(self) -> spd.Recipe:
        return spd.Recipe(epochs=self.epochs, learning_rate=self.learning_rate)


def proving_ground(device: str) -> tuple[Any, Any]:
    return spd.load_model("proving-ground", device=device)


def qwen2(device: str, **widths: int) -> tuple[Any, Any]:
    """A Qwen2 of 12 layers with random weights; vocabulary and tokenizer are the proving ground's."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    own, tokenizer = proving_ground("cpu")
    shape: dict[str, Any] = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    }
    config = Qwen2Config(
        **(shape | widths),
        vocab_size=own.config.vocab_size,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=own.config.eos_token_id,
        pad_token_id=own.config.pad_token_id,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config).to(device).eval(), tokenizer  # type: ignore[arg-type]


@dataclass(frozen=True)
class Inputs:
    """What the stages are given."""

    examples: list[spd.Example]
    prompts: list[str]
    tests: dict[str, Task]
    subspace: spd.Subspace
    completions: list[spd.Generation]
    adapter: Path

    @property
    def bases(self) -> plain.Bases:
        return {(layer, side): self.subspace.side(side)[layer].basis for layer in self.subspace.layers for side in "kv"}


class Plain:
    """The stages as `plain` has them."""

    def __init__(self, setting: Setting, inputs: Inputs, device: str) -> None:
        self.setting, self.inputs = setting, inputs
        self.model, self.tokenizer = setting.make(device)

    def calibration(self, *, freeze: bool = False) -> plain.Bases:
        return plain.calibrate(self.model, self.tokenizer, self.inputs.examples, freeze=freeze)

    def generation(self, *, project: bool = True) -> int:
        """How many tokens were sampled."""
        with plain.projected(self.model, self.inputs.bases) if project else nullcontext():
            sampled = plain.generate(
                self.model, self.tokenizer, self.inputs.prompts, max_new_tokens=self.setting.new_tokens
            )
        return sum(map(len, sampled))

    def training(self, *, texts: int | None = None, **changes: Any) -> list[float]:
        """The loss of every step, on all or the first so many texts."""
        settings = {"epochs": self.setting.epochs, "learning_rate": self.setting.learning_rate} | changes
        completions = self.inputs.completions[:texts]
        with without_adapter_afterwards(self.model):
            _, losses = plain.train(
                self.model,
                self.tokenizer,
                [completion.prompt for completion in completions],
                [completion.tokens for completion in completions],
                **settings,
            )
        return losses

    def evaluation(self) -> dict[str, list[str]]:
        """The answers of every arm."""
        answers = {}
        for arm, name in ARMS:
            with ExitStack() as stack:
                model = self.model
                if arm == "projected":
                    stack.enter_context(plain.projected(model, self.inputs.bases))
                if arm == "spd":
                    stack.enter_context(without_adapter_afterwards(model))
                    model = PeftModel.from_pretrained(model, str(self.inputs.adapter))
                answers[f"{arm}, {name}"], _ = plain.evaluate(
                    model,
                    self.tokenizer,
                    self.inputs.tests[name],
                    limit=self.setting.questions,
                    max_new_tokens=self.setting.new_tokens,
                )
        return answers


class Ours:
    """The stages as `spd` has them, with its own batch sizes, writing what a run writes."""

    def __init__(self, setting: Setting, inputs: Inputs, model: Any, tokenizer: Any, folder: Path) -> None:
        self.setting, self.inputs, self.folder = setting, inputs, folder
        self.model, self.tokenizer = model, tokenizer
        self.calls = 0

    def calibration(self) -> spd.Subspace:
        return spd.calibrate(self.model, self.tokenizer, self.inputs.examples, progress=False)

    def generation(self, *, project: bool = True) -> int:
        with spd.attach(self.model, self.inputs.subspace) if project else nullcontext():
            completions = spd.generate(
                self.model,
                self.tokenizer,
                self.inputs.prompts,
                out=self._new("completions.jsonl"),
                max_new_tokens=self.setting.new_tokens,
                progress=False,
            )
        return sum(len(completion.tokens) for completion in completions)

    def training(self, *, texts: int | None = None, **changes: Any) -> list[float]:
        adapter = spd.distill(
            self.model,
            self.tokenizer,
            self.inputs.completions[:texts],
            out=self._new("adapter"),
            recipe=replace(self.setting.recipe, **changes),
            progress=False,
        )
        return [entry["loss"] for entry in read_json(adapter / "training.json")["loss"]]

    def evaluation(self) -> dict[str, list[str]]:
        def answer(model: Any, name: str) -> list[str]:
            evaluation = spd.evaluate(
                model,
                self.tokenizer,
                self.inputs.tests[name],
                limit=self.setting.questions,
                max_new_tokens=self.setting.new_tokens,
                out=self._new(f"{name}.jsonl"),
                progress=False,
            )
            return [each.completion for each in evaluation.answers]

        answers = {}
        for arm, name in ARMS:
            with ExitStack() as stack:
                model = self.model
                if arm == "projected":
                    stack.enter_context(spd.attach(model, self.inputs.subspace))
                if arm == "spd":
                    model = stack.enter_context(spd.adapted(model, self.inputs.adapter))
                answers[f"{arm}, {name}"] = answer(model, name)
        return answers

    def _new(self, name: str) -> Path:
        self.calls += 1
        return self.folder / str(self.calls) / name


@contextmanager
def without_adapter_afterwards(model: Any) -> Iterator[None]:
    """Takes out what peft puts into the layers of a model."""
    try:
        yield
    finally:
        for module in model.modules():
            for name, child in list(module.named_children()):
                if isinstance(child, BaseTunerLayer):
                    setattr(module, name, child.get_base_layer())
        vars(model).pop("peft_config", None)


def prepare(setting: Setting, model: Any, tokenizer: Any, folder: Path) -> Inputs:
    """Make the inputs by the pipeline itself."""
    tests = {name: spd.load_task(name) for _, name in ARMS}
    examples = tests["words"].calibration()[: setting.examples]
    prompts = tests["words"].training_prompts()[: setting.prompts]
    subspace = spd.calibrate(model, tokenizer, examples, progress=False)
    with spd.attach(model, subspace):
        completions = spd.generate(model, tokenizer, prompts, max_new_tokens=setting.new_tokens, progress=False)
    adapter = spd.distill(model, tokenizer, completions, out=folder / "adapter", recipe=setting.recipe, progress=False)
    return Inputs(examples, prompts, tests, subspace, completions, adapter)


def warm_up(contender: Plain | Ours) -> None:
    """Every stage on very little: what the libraries do once is no stage's."""
    setting, inputs = contender.setting, contender.inputs
    contender.setting = replace(setting, questions=1, epochs=1, new_tokens=4)
    contender.inputs = replace(
        inputs, examples=inputs.examples[:2], prompts=inputs.prompts[:2], completions=inputs.completions[:2]
    )
    for stage in (contender.calibration, contender.generation, contender.training, contender.evaluation):
        stage()
    contender.setting, contender.inputs = setting, inputs
