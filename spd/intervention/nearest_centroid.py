"""Choosing a subspace by what a prompt is like: the nearest centroid of each task's own prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedTokenizerBase

from spd.errors import InputError
from spd.intervention.attach import refuse_if_attached
from spd.intervention.router import Decision
from spd.likelihood import padded
from spd.model_state import frozen, input_device, position_limit

Features = Literal["hidden", "embedding"]


class NearestCentroid:
    """A chooser for `spd.Router`: the name whose prompts' centroid is nearest in direction.

    A prompt is the mean over its tokens of the last hidden state, or of the input embedding, minus the mean of all
    centroids: what all prompts of a model share would hide what tells them apart.

    Args:
        model: the model, with nothing attached; under a router it is asked with every sequence left alone.
        tokenizer: its tokenizer.
        prompts: at least two names, each with at least one prompt, such as a task's calibration prompts.
        features: "hidden", one forward pass a prompt, or "embedding", no pass.
        margin: how much nearer, in cosine, the nearest must be than the next; below it a prompt is left alone.
        max_length: tokens of a prompt that are looked at, from its start.
        batch_size: prompts in one forward pass.

    Raises:
        InputError: unusable arguments, a prompt without a token, or a model that carries an intervention.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Mapping[str, Sequence[str]],
        *,
        features: Features | str = "hidden",
        margin: float = 0.0,
        max_length: int = 512,
        batch_size: int = 8,
    ) -> None:
        if features not in get_args(Features):
            raise InputError(f"features: expected one of {', '.join(get_args(Features))}, got {features!r}")
        if not (isinstance(margin, (int, float)) and math.isfinite(margin) and margin >= 0):
            raise InputError(f"margin: expected a finite number of at least 0, got {margin!r}")
        for name, value in (("max_length", max_length), ("batch_size", batch_size)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name}: expected an integer of at least 1, got {value!r}")
        if len(prompts) < 2:
            raise InputError(f"prompts: expected at least two names to choose between, got {list(prompts)}")
        lacking = [name for name, own in prompts.items() if isinstance(own, str) or not len(own)]
        if lacking:
            raise InputError(f"prompts: expected a list of at least one prompt for each name, not so for {lacking}")
        refuse_if_attached(model, "NearestCentroid")
        self.names = tuple(prompts)
        self.features, self.margin = features, float(margin)
        self._model, self._tokenizer = model, tokenizer
        self._max_length = min(max_length, position_limit(model) or max_length)
        self._batch_size = batch_size
        centroids = torch.stack([self._vectors(own).mean(0) for own in prompts.values()])
        self._centre = centroids.mean(0)
        self._directions = centroids - self._centre  # (S, hidden)

    def decide(self, prompts: Sequence[str]) -> list[Decision]:
        """The nearest name of each prompt, with the cosine to every name; None where the margin is not reached."""
        if not prompts:
            return []
        vectors = self._vectors(prompts) - self._centre
        similarities = cosine_similarity(vectors[:, None], self._directions, dim=-1)  # (prompts, S)
        by = f"nearest centroid ({self.features}, margin {self.margin:g})"
        decisions = []
        for prompt, row in zip(prompts, similarities.tolist(), strict=True):
            scores = dict(zip(self.names, row, strict=True))
            first, second = sorted(row, reverse=True)[:2]
            name = max(scores, key=lambda each: scores[each]) if first - second >= self.margin else None
            decisions.append(Decision(prompt, name, scores, by))
        return decisions

    def _vectors(self, prompts: Sequence[str]) -> Tensor:
        """(prompts, hidden) float32 on the CPU."""
        encoded = [list(tokens)[: self._max_length] for tokens in self._tokenizer(list(prompts))["input_ids"]]
        empty = [index for index, tokens in enumerate(encoded) if not tokens]
        if empty:
            raise InputError(f"prompts: {len(empty)} have no token at all: {empty[:10]}")
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
        vectors: dict[int, Tensor] = {}
        with frozen(self._model), torch.inference_mode():
            for start in range(0, len(order), self._batch_size):
                batch = order[start : start + self._batch_size]
                tokens, real = padded([encoded[index] for index in batch], input_device(self._model))
                states = self._states(tokens, real).float()
                weight = real.to(states.device).float()[..., None]
                means = (states * weight).sum(1) / weight.sum(1)
                vectors.update(zip(batch, means.cpu(), strict=True))
        return torch.stack([vectors[index] for index in range(len(encoded))])

    def _states(self, tokens: Tensor, real: Tensor) -> Tensor:
        """(B, T, hidden)."""
        model = self._model
        if self.features == "embedding":
            return model.get_input_embeddings()(tokens)  # type: ignore[operator]
        inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        decoder = inner.base_model  # gives no logits
        return decoder(input_ids=tokens, attention_mask=real.long(), use_cache=False).last_hidden_state
