"""Decoding a batch: what `model.generate` computes, with less around it, and without the rows that have ended."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from spd.likelihood import not_finite, takes_cache
from spd.model_state import input_device
from spd.sampling import NO_TOKEN, Sampling

ROOM = 64
"""Tokens by which a full cache buffer grows."""

LEAVE = 8
"""Rows that have ended leave when they are this part of the batch: leaving copies the cache."""

LEAST_PREFIX = 16
"""Tokens at the front that all prompts of a batch must share to be run once."""

TRIED = 4
"""Tokens of a prompt tried behind padding: a recurrent layer forgets in many what was before them."""

Around = Callable[[list[int]], AbstractContextManager[object]]

_TAKES_PADDING: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""What a trial has shown of models that are left to their own `generate`."""


class Decoder:
    """Completes batches of one model's prompts.

    A model whose forward pass or cache is not of the usual kind is left to its own `generate`.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        sampling: how tokens are chosen.
        ends: tokens that end a text.
        pad: what stands before shorter prompts.
        stopped: says of a prompt's index and its sampled tokens whether they may end here.
        around: makes the context of a batch from the indices of its prompts, in the order of its rows.
    """

    def __init__(
        self,
        model: nn.Module,
        sampling: Sampling,
        *,
        ends: Collection[int],
        pad: int,
        stopped: Callable[[int, list[int]], bool] | None = None,
        around: Around | None = None,
    ) -> None:
        self.model: Any = model
        self.sampling = sampling
        self.ends = frozenset(ends)
        self.pad = pad
        self.stopped = stopped
        self.around = around or (lambda indices: nullcontext())
        self.shares_prefix = around is None and not _hides_windows(model)
        inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        accepted = inspect.signature(inner.forward).parameters
        self.usual = takes_cache(model, (DynamicLayer, DynamicSlidingWindowLayer))
        self.last = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    @torch.inference_mode()
    def __call__(self, indices: Sequence[int], prompts: Sequence[list[int]]) -> list[list[int]]:
        """What is sampled behind each prompt, up to and including the token that ends it.

        Args:
            indices: the prompts' numbers, which their random numbers are drawn from.
            prompts: their tokens.

        Raises:
            InputError: the largest logit behind a prompt is not finite.
        """
        if not self.usual:
            return self._by_transformers(indices, prompts)
        device = input_device(self.model)
        uniforms = self.sampling.uniforms(indices, device)
        cache = DynamicCache(config=self.model.config)
        shared = self._prefill_shared(prompts, cache, device)
        tokens, mask = left_padded([prompt[shared:] for prompt in prompts], self.pad, device)
        mask = torch.cat((mask.new_ones((len(prompts), shared)), mask), dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, shared:]

        sampled: list[list[int]] = [[] for _ in prompts]
        rows = list(range(len(prompts)))  # those of the batch, by their place among the prompts
        ended: set[int] = set()
        with ExitStack() as context:
            context.enter_context(self.around(list(indices)))
            for step in range(self.sampling.max_new_tokens):
                logits = self._forward(tokens, mask, positions, cache)
                if step == 0:
                    make_room(cache)
                chosen = self.sampling.choose(logits.to(device), uniforms[:, step])
                found = chosen.tolist()
                for row, token in zip(rows, found, strict=True):
                    if row not in ended:
                        if token == NO_TOKEN:
                            raise not_finite(self.model, f"prompt {indices[row]}")
                        sampled[row].append(token)
                        if token in self.ends or (self.stopped and self.stopped(indices[row], sampled[row])):
                            ended.add(row)
                staying = [place for place, row in enumerate(rows) if row not in ended]
                if not staying or step + 1 == self.sampling.max_new_tokens:
                    break
                if NO_TOKEN in found:  # of a row that has ended
                    chosen = chosen.clamp(min=0)
                tokens, positions = chosen[:, None], positions[:, -1:] + 1
                mask = torch.cat((mask, mask.new_ones((len(rows), 1))), dim=1)
                if (len(rows) - len(staying)) * LEAVE >= len(rows):
                    kept = torch.tensor(staying)  # on the CPU, for a cache that may be spread over devices
                    tokens, positions, mask, uniforms = (each[kept] for each in (tokens, positions, mask, uniforms))
                    cache.batch_select_indices(kept)
                    rows = [rows[place] for place in staying]
                    context.close()
                    context.enter_context(self.around([indices[row] for row in rows]))
        return sampled

    def _prefill_shared(self, prompts: Sequence[list[int]], cache: DynamicCache, device: torch.device) -> int:
        """Run the tokens that all prompts begin with once, for all rows of the cache; returns how many.

        Not where rows differ in more than their tokens, nor where layers see a window: behind the shared tokens stands
        padding, and a window counts it.
        """
        if len(prompts) < 2 or not self.shares_prefix or any(cache.is_sliding):
            return 0
        first, last = min(prompts), max(prompts)
        shared = next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        shared = min(shared, *(len(prompt) - 1 for prompt in prompts))  # the logits of a last token are needed
        if shared < LEAST_PREFIX:
            return 0
        tokens = torch.tensor([first[:shared]], device=device)
        self._forward(tokens, torch.ones_like(tokens), torch.arange(shared, device=device)[None], cache)
        cache.batch_repeat_interleave(len(prompts))
        return shared

    def _forward(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """The logits (B, V) of the last tokens."""
        output = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **self.last,
        )
        return output.logits[:, -1]

    def _by_transformers(self, indices: Sequence[int], prompts: Sequence[list[int]]) -> list[list[int]]:
        lengths = sorted(set(map(len, prompts)))
        if len(lengths) == 1 or self._takes_padding(indices, prompts):
            return self._generated(indices, prompts)
        found: dict[int, list[int]] = {}
        for length in lengths:
            places = [place for place, prompt in enumerate(prompts) if len(prompt) == length]
            sampled = self._generated([indices[place] for place in places], [prompts[place] for place in places])
            found |= zip(places, sampled, strict=True)
        return [found[place] for place in range(len(prompts))]

    def _takes_padding(self, indices: Sequence[int], prompts: Sequence[list[int]]) -> bool:
        """Whether a short prompt gets the same logits behind padding, beside a long one, as alone; tried once a model.

        A recurrent layer may take padding for text.
        """
        if self.model not in _TAKES_PADDING:
            order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
            pair = [indices[order[0]], indices[order[-1]]]
            short, long = prompts[order[0]][:TRIED], prompts[order[-1]]
            alone = self._first_logits(pair[:1], [short])
            beside = self._first_logits(pair, [short, long])
            eps = torch.finfo(self.model.dtype).eps
            scale = max(float(each.nan_to_num(0.0, 0.0, 0.0).abs().max()) for each in alone)
            _TAKES_PADDING[self.model] = all(
                torch.allclose(padded[:1], single, rtol=0.0, atol=max(1e-4, 8 * eps) * scale)
                for padded, single in zip(beside, alone, strict=False)
            )
        return _TAKES_PADDING[self.model]

    def _first_logits(self, indices: list[int], prompts: Sequence[list[int]]) -> Sequence[Tensor]:
        """Those (B, V) of the first two tokens behind the prompts, or of one if the texts end there."""
        tokens, mask = left_padded(prompts, self.pad, input_device(self.model))
        with self.around(indices):
            return self.model.generate(
                input_ids=tokens,
                attention_mask=mask,
                max_new_tokens=min(2, self.sampling.max_new_tokens),
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            ).logits

    def _generated(self, indices: Sequence[int], prompts: Sequence[list[int]]) -> list[list[int]]:
        """By the model's own `generate`, in one batch."""
        device = input_device(self.model)
        tokens, mask = left_padded(prompts, self.pad, device)
        uniforms = self.sampling.uniforms(indices, device)
        chosen = OwnSampling(self.sampling, uniforms, tokens.shape[1])
        with self.around(list(indices)):
            output = self.model.generate(
                input_ids=tokens,
                attention_mask=mask,
                max_new_tokens=self.sampling.max_new_tokens,
                do_sample=False,
                logits_processor=LogitsProcessorList([chosen]),
            )
        sampled = output[:, tokens.shape[1] :].tolist()
        found = [self._until_end(index, row) for index, row in zip(indices, sampled, strict=True)]
        for index, own, good in zip(indices, found, chosen.good.tolist(), strict=True):
            if good < len(own):
                raise not_finite(self.model, f"prompt {index}")
        return found

    def _until_end(self, index: int, sampled: list[int]) -> list[int]:
        for count, token in enumerate(sampled, start=1):
            if token in self.ends or (self.stopped and self.stopped(index, sampled[:count])):
                return sampled[:count]
        return sampled


class OwnSampling(LogitsProcessor):
    """Leaves only the token possible that `Sampling` chooses, so that greedy decoding picks it.

    Attributes:
        good: how many tokens (B,) each row had before the first whose logits were not finite.
    """

    def __init__(self, sampling: Sampling, uniforms: Tensor, prompt_length: int) -> None:
        self.sampling = sampling
        self.uniforms = uniforms
        self.prompt_length = prompt_length
        self.good = torch.full((len(uniforms),), sampling.max_new_tokens, device=uniforms.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt_length
        token = self.sampling.choose(scores, self.uniforms[:, step])
        self.good = torch.where(token == NO_TOKEN, self.good.clamp(max=step), self.good)
        return torch.full_like(scores, float("-inf")).scatter(1, token.clamp(min=0)[:, None], 0.0)


class RoomyLayer(DynamicLayer):
    """A dense layer with room to spare: a token is written behind the others, not all of them copied to make place."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self._hold(keys, values)

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        self._buffers = [_with_room(keys), _with_room(values)]
        self._show(keys.shape[2])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        held = self.keys.shape[2]
        total = held + key_states.shape[2]
        if total > self._buffers[0].shape[2]:
            self._hold(self.keys, self.values)
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, held:total] = new
        return self._show(total)

    def batch_select_indices(self, indices: Tensor) -> None:
        assert self.keys is not None and self.values is not None
        self._hold(self.keys[indices], self.values[indices])

    def _show(self, tokens: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (buffer[:, :, :tokens] for buffer in self._buffers)
        return self.keys, self.values


def make_room(cache: DynamicCache) -> None:
    """Dense layers become roomy ones; latent layers have room already, and windows move."""
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
            cache.layers[number] = RoomyLayer(layer.keys, layer.values)


def left_padded(prompts: Sequence[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, (B, T) each."""
    length = max(map(len, prompts))
    tokens = torch.tensor([[pad] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return tokens.to(device), mask.to(device)


def _hides_windows(model: Any) -> bool:
    """Whether attention looks no further than a window that the cache does not know of, as GPT-Neo's does."""
    return "local" in (getattr(model.config.get_text_config(), "attention_layers", None) or ())


def _with_room(stored: Tensor) -> Tensor:
    batch, heads, tokens, width = stored.shape
    buffer = stored.new_empty((batch, heads, tokens + ROOM, width))
    buffer[:, :, :tokens] = stored
    return buffer
