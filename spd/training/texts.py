"""Completions as tokens and labels, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from spd.generation import Generation
from spd.recipe import Recipe

IGNORED = -100  # the label that cross_entropy leaves out


@dataclass(frozen=True)
class Text:
    """Token ids, the label of each, and whether both were cut. The first token's label is never used."""

    tokens: list[int]
    labels: list[int]
    cut: bool

    @property
    def targets(self) -> int:
        """Tokens that the loss is taken on."""
        return sum(label != IGNORED for label in self.labels[1:])


def encode(tokenizer: PreTrainedTokenizerBase, generation: Generation, recipe: Recipe) -> Text:
    """Prompt and completion: the very tokens that were sampled, or else those of the text."""
    prompt = list(tokenizer(generation.prompt)["input_ids"])
    if generation.tokens:
        tokens = prompt + list(generation.tokens)
    else:
        tokens = list(tokenizer(generation.prompt + generation.completion)["input_ids"])
        if generation.finished and tokenizer.eos_token_id is not None and tokens[-1:] != [tokenizer.eos_token_id]:
            tokens.append(tokenizer.eos_token_id)
    ignored = 0 if recipe.prompt_loss else len(prompt)
    labels = [IGNORED] * min(ignored, len(tokens)) + tokens[ignored:]
    limit = recipe.max_length
    return Text(tokens[:limit], labels[:limit], cut=len(tokens) > limit)


def collate(texts: Sequence[Text]) -> dict[str, Tensor]:
    """Right padding to the longest of the batch; padding is neither attended to nor trained on."""
    tokens = [torch.tensor(text.tokens) for text in texts]
    return {
        "input_ids": pad_sequence(tokens, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True),
        "labels": pad_sequence([torch.tensor(text.labels) for text in texts], batch_first=True, padding_value=IGNORED),
    }
