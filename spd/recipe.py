"""How to train: the published settings, and what may be changed of them."""

from __future__ import annotations

from dataclasses import dataclass

from spd.errors import InputError


@dataclass(frozen=True)
class Recipe:
    """How to train. The defaults are the published settings.

    Args:
        lora_rank, lora_alpha, lora_dropout: of the adapter on the q, k, v and o projections.
        learning_rate, weight_decay: of AdamW.
        epochs: passes over the completions.
        warmup_epochs: linear warm-up before the cosine decay, in epochs.
        batch_size: completions per step, over all processes together.
        max_length: tokens after which prompt + completion is cut.
        max_grad_norm: gradient clipping.
        prompt_loss: take the loss on the prompt too, as published; else on the completion only.
        seed: of the adapter's initialisation, the order of the data and the dropout.
    """

    lora_rank: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.05
    learning_rate: float = 1e-5
    weight_decay: float = 0.01
    epochs: float = 5
    warmup_epochs: float = 0.5
    batch_size: int = 4
    max_length: int = 256
    max_grad_norm: float = 1.0
    prompt_loss: bool = True
    seed: int = 42

    def __post_init__(self) -> None:
        positive = ("lora_rank", "lora_alpha", "learning_rate", "epochs", "batch_size", "max_length", "max_grad_norm")
        for name in ("lora_rank", "batch_size", "max_length", "seed"):
            if not isinstance(getattr(self, name), int):
                raise InputError(f"{name}: expected an integer, got {getattr(self, name)!r}")
        if not isinstance(self.prompt_loss, bool):
            raise InputError(f"prompt_loss: expected true or false, got {self.prompt_loss!r}")
        for name in (*positive, "lora_dropout", "weight_decay", "warmup_epochs", "seed"):
            value, least = getattr(self, name), "above 0" if name in positive else "of at least 0"
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
                raise InputError(f"{name}: expected a finite number {least}, got {value!r}")
            if value < 0 or (name in positive and value == 0):
                raise InputError(f"{name}: expected a number {least}, got {value!r}")
        if self.lora_dropout >= 1:
            raise InputError(f"lora_dropout: expected a number below 1, got {self.lora_dropout!r}")


PRESETS = {"paper": Recipe()}


def named_recipe(recipe: Recipe | str) -> Recipe:
    """A recipe, or the preset of that name.

    Raises:
        InputError: there is none.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str) or recipe not in PRESETS:
        raise InputError(f"recipe: expected a Recipe or one of {', '.join(PRESETS)}, got {recipe!r}")
    return PRESETS[recipe]
