"""How a batch's texts are laid out: a padded row for each, or all in one row without padding, where that is faster."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, cache_utils

from spd.training.texts import IGNORED, Text, collate

PAYS = 1.2
"""Packing begins where the estimate says that padding costs so many times as much: it knows nothing of kernels."""


class Layout:
    """Chooses by the texts' lengths and the model's shape alone, so that a training resumed chooses as before.

    In one row a text sees no other: positions start anew, from which transformers makes a mask of blocks. Attention is
    then computed for all pairs of the row, so long rows do not pay in narrow models. Models that do not keep the texts
    apart, which is tried once, get padded rows: convolutions and recurrent states among them, which no mask stops.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        config = model.config.get_text_config()
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        attention = config.num_hidden_layers * config.num_attention_heads * width
        tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        weights = sum(p.numel() for p in model.parameters() if id(p) not in tables)
        self.per_pair = 2 * attention / weights  # multiplications for a pair of tokens, in those for a token

    def batch(self, texts: Sequence[Text]) -> dict[str, Tensor]:
        """What goes into the loss."""
        pays = self.gain([len(text.tokens) for text in texts]) > PAYS
        return pack(texts) if pays and self.keeps_apart else collate(texts)

    def gain(self, lengths: Sequence[int]) -> float:
        """By estimate, the time of padded rows relative to that of one row."""
        padded, together = len(lengths) * max(lengths), sum(lengths)
        return padded * (1 + self.per_pair * max(lengths)) / (together * (1 + self.per_pair * together))

    @cached_property
    @torch.no_grad()
    def keeps_apart(self) -> bool:
        """Whether two texts in a row have the logits that they have alone, and the second the same behind another.

        Behind a text of the same length nothing that a mask lets through changes, so half precision, whose rounding can
        hide a leak, has to give the same bits; experts alone may round otherwise, and then get padded rows.
        """
        if not self._only_attends:
            return False
        weight = self.model.get_input_embeddings().weight
        first, other, second = (
            Text(tokens, tokens, cut=False) for tokens in ([1, 2, 3, 4, 5], [6, 7, 8, 9, 1], [6, 7, 8, 9])
        )
        training = self.model.training
        self.model.eval()
        try:
            batches = (collate([first]), collate([second]), pack([first, second]), pack([other, second]))
            *alone, together, behind = (self._logits(batch, weight.device) for batch in batches)
        finally:
            self.model.train(training)
        coarse = {together.dtype, weight.dtype} & {torch.float16, torch.bfloat16}  # autocast makes float32 of it
        eps = max(torch.finfo(dtype).eps for dtype in coarse or {together.dtype})
        scale, start = float(together.abs().max()), len(first.tokens)

        def near(one: Tensor, another: Tensor, tolerance: float) -> bool:
            return torch.allclose(one, another, rtol=0.0, atol=tolerance * scale)

        same = near(together[:, start:], behind[:, start:], 0.0 if coarse else 16 * eps)
        return same and near(together, torch.cat(alone, dim=1), 16 * eps if coarse else 1e-4)

    @property
    def _only_attends(self) -> bool:
        """Whether no layer has a state of another kind than keys and values."""
        try:
            layers = DynamicCache(config=self.model.config).layers
        except (KeyError, AttributeError, ValueError):  # layers that transformers has no cache for
            return False
        keys_and_values = (cache_utils.DynamicLayer, getattr(cache_utils, "DummyLayer", cache_utils.DynamicLayer))
        attends = all(
            isinstance(layer, keys_and_values) and not isinstance(layer, cache_utils.LinearAttentionLayer)
            for layer in layers
        )
        return attends and not getattr(self.model, "_is_stateful", False)

    def _logits(self, batch: dict[str, Tensor], device: torch.device) -> Tensor:
        inputs = {name: each.to(device) for name, each in batch.items() if name != "labels"}
        logits: Tensor = self.model(**inputs, use_cache=False).logits
        return logits


def pack(texts: Sequence[Text]) -> dict[str, Tensor]:
    """All texts in one row; no label is predicted from another text."""
    return {
        "input_ids": torch.tensor([[token for text in texts for token in text.tokens]]),
        "position_ids": torch.tensor([[position for text in texts for position in range(len(text.tokens))]]),
        "labels": torch.tensor([[label for text in texts for label in (IGNORED, *text.labels[1:])]]),
    }
