"""How likely a model, with whatever is attached to it, finds texts that it did not write here."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from spd.distributed import failing_together, gather, is_sharded, rank, size
from spd.errors import InputError
from spd.memory import FittingBatches
from spd.model_state import frozen, input_device, position_limit
from spd.progress import bar

R = TypeVar("R")


@dataclass(frozen=True)
class TextNLL:
    """-log p of a text's scored tokens, summed, in nats, and how many tokens those are (at least one)."""

    nll: float
    tokens: int

    @property
    def per_token(self) -> float:
        return self.nll / self.tokens


@dataclass(frozen=True)
class ScoredText:
    """Token ids, of which those from position `start` on are scored; nothing predicts position 0, so `start` >= 1."""

    tokens: list[int]
    start: int

    @property
    def scored(self) -> int:
        return len(self.tokens) - self.start


def completion_nll(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    deterministic: bool = False,
    label: str = "likelihood",
    progress: bool = True,
) -> list[TextNLL]:
    """-log p(completion | prompt) of every pair (prompt, completion), in the order of the pairs.

    Prompt and completion are tokenised as one text, as they are for training; no end-of-sequence token is added. A
    token that reaches over the border between the two counts as the completion's. Results do not depend on the
    batching but for rounding, nor on how many processes share the work, if torchrun started several. Losses are float32
    at least, their sums float64.

    Args:
        model: a causal language model of transformers, with whatever is attached to it, or of peft.
        tokenizer: its fast tokenizer.
        pairs: prompts and completions. Without a prompt, and without a token that the tokenizer puts before every
            text, the first token of the completion is not scored, since nothing predicts it.
        batch_size: pairs in one forward pass, which holds the logits of their completions; halved where they do not
            fit in memory.
        max_length: tokens of a pair; None: as many as the model has positions.
        deterministic: refuse a batch that does not fit instead: in a smaller one sums would be rounded otherwise.
        label: what the progress bar says.
        progress: show it.

    Raises:
        InputError: unusable arguments, a pair without a token to score, or one that is too long; they are counted and
            named, and nothing is cut.
    """
    return _nll("pairs", model, tokenizer, pairs, batch_size, max_length, deterministic, label, progress)


def text_nll(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    deterministic: bool = False,
    label: str = "likelihood",
    progress: bool = True,
) -> list[TextNLL]:
    """-log p of whole texts: of every token but the first. Arguments and errors are those of `completion_nll`."""
    pairs = [("", text) for text in texts]
    return _nll("texts", model, tokenizer, pairs, batch_size, max_length, deterministic, label, progress)


def _nll(
    name: str,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    batch_size: int,
    max_length: int | None,
    deterministic: bool,
    label: str,
    progress: bool,
) -> list[TextNLL]:
    texts = encode_pairs(name, tokenizer, pairs)
    check_texts(name, texts, model, max_length)

    def score(batch: Sequence[int]) -> dict[int, TextNLL]:
        logits, targets = scored_logits(model, [texts[index] for index in batch])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = cross_entropy(logits, targets, reduction="none").double().cpu()
        sums = [float(own.sum()) for own in losses.split([texts[index].scored for index in batch])]
        for index, nll in zip(batch, sums, strict=True):
            refuse_nan(model, [nll], f"{name}[{index}]")
        return {index: TextNLL(nll, texts[index].scored) for index, nll in zip(batch, sums, strict=True)}

    found: dict[int, TextNLL] = {}
    with bar(total=len(texts), label=label, unit="texts", show=progress) as shown:
        batches = length_sorted(texts, batch_size)
        for fresh in dealt(batches, score, model=model, caller=label, unit=name, fixed=deterministic):
            found |= fresh
            shown.update(len(fresh))
    return [found[index] for index in range(len(texts))]


def dealt(
    batches: Sequence[Sequence[int]],
    work: Callable[[Sequence[int]], dict[int, R]],
    *,
    model: nn.Module,
    caller: str,
    unit: str,
    fixed: bool = False,
) -> Iterator[dict[int, R]]:
    """What `work` finds for batches of indices, which the processes of a job take in turn; each of them gets it all."""
    if size() > 1 and is_sharded(model):
        raise InputError("model: expected a whole one in every process, got one that fully_shard dealt out over them")
    fitting = FittingBatches(max(map(len, batches), default=1), caller=caller, unit=unit, fixed=fixed)
    for first in range(0, len(batches), size()):
        found: dict[int, R] = {}
        with failing_together():
            for batch in batches[first + rank() : first + rank() + 1]:
                for part in fitting.run(batch, work):
                    found |= part
        yield {index: value for share in gather(found) for index, value in share.items()}


def encode_pairs(name: str, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> list[ScoredText]:
    """Prompt and completion as one text, scored from the first token on that reaches beyond the prompt.

    Raises:
        InputError: no text at all or no string, or a tokenizer that cannot tell which characters a token stands for.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"tokenizer: {type(tokenizer).__name__} does not report character offsets; a fast tokenizer is needed"
        )
    if not pairs:
        raise InputError(f"{name}: expected at least one, got none")
    for index, pair in enumerate(pairs):
        if not all(isinstance(text, str) for text in pair):
            raise InputError(f"{name}: expected strings, got {', '.join(type(t).__name__ for t in pair)} at {index}")
    encoded = tokenizer([prompt + completion for prompt, completion in pairs], return_offsets_mapping=True)
    texts = []
    for (prompt, _), tokens, offsets in zip(pairs, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        beyond = (position for position, (_, end) in enumerate(offsets) if end > len(prompt))
        texts.append(ScoredText(list(tokens), max(1, next(beyond, len(tokens)))))
    return texts


def check_texts(name: str, texts: Sequence[ScoredText], model: nn.Module, max_length: int | None = None) -> None:
    """Refuse texts with nothing to score, and those longer than the model or `max_length` allows."""
    empty = [index for index, text in enumerate(texts) if text.scored < 1]
    if empty:
        raise InputError(f"{name}: {len(empty)} of {len(texts)} have no token to score: {some(empty)}")
    limit = min((each for each in (max_length, position_limit(model)) if each is not None), default=None)
    long = [index for index, text in enumerate(texts) if limit is not None and len(text.tokens) > limit]
    if long:
        raise InputError(f"{name}: {len(long)} of {len(texts)} are longer than {limit} tokens: {some(long)}")


def length_sorted(texts: Sequence[ScoredText], batch_size: int) -> list[list[int]]:
    """Batches of indices, of texts of like length."""
    check_batch_size(batch_size)
    order = sorted(range(len(texts)), key=lambda index: (len(texts[index].tokens), index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def check_batch_size(batch_size: int) -> None:
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise InputError(f"batch_size: expected an integer of at least 1, got {batch_size!r}")


def scored_logits(model: nn.Module, batch: Sequence[ScoredText], shared: int = 0) -> tuple[Tensor, Tensor]:
    """What the model says where tokens are scored, text after text.

    Args:
        model: the model.
        batch: the texts.
        shared: so many tokens at the front, none of them scored and all before one that is not shared, are the same
            in all texts: they go through the model once, in a pass of their own.

    Returns:
        Logits (n, vocabulary) as the model gives them, and the tokens (n,) they should predict.
    """
    tokens, real = padded([text.tokens[shared:] for text in batch], input_device(model))
    rows = torch.tensor([row for row, text in enumerate(batch) for _ in range(text.scored)])
    targets = torch.tensor([t - shared for text in batch for t in range(text.start, len(text.tokens))])
    positions, columns = torch.unique(targets - 1, return_inverse=True)
    with frozen(model), torch.inference_mode():
        front = _front(model, batch[0].tokens[:shared], len(batch)) if shared else {}
        if shared:
            seen = real.new_ones((len(batch), shared))
            front["attention_mask"] = torch.cat((seen, real), dim=1).long()
            front["position_ids"] = torch.arange(shared, shared + tokens.shape[1], device=tokens.device)[None]
        logits = logits_at(model, tokens, real, positions.to(tokens.device), **front)
        logits = logits[rows.to(logits.device), columns.to(logits.device)]
    return logits, tokens[rows.to(tokens.device), targets.to(tokens.device)].to(logits.device)


def padded(texts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (B, T), padded on the right whatever the tokenizer prefers, and which of them are real (B, T) bool."""
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
    lengths = torch.tensor([len(text) for text in texts])
    return tokens.to(device), (torch.arange(tokens.shape[1]) < lengths[:, None]).to(device)


def logits_at(model: nn.Module, tokens: Tensor, real: Tensor, positions: Tensor, **more: Any) -> Tensor:
    """Logits (B, n, vocabulary) at `positions` (n,) of every row, multiplied out nowhere else if the model allows.

    `more` are further arguments of the model, which go before those made here.
    """
    arguments: dict[str, Any] = {"input_ids": tokens, "attention_mask": real.long(), "use_cache": False} | more
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    one_device = len(set(getattr(inner, "hf_device_map", {}).values())) < 2
    if one_device and "logits_to_keep" in inspect.signature(inner.forward).parameters:
        return model(**arguments, logits_to_keep=positions).logits
    logits = model(**arguments).logits
    return logits[:, positions.to(logits.device)]


def not_finite(model: nn.Module, what: str) -> InputError:
    """What to raise where the largest logit is NaN or infinite."""
    return InputError(
        f"model: expected finite logits, got NaN or infinity for {what}; float16 overflows where bfloat16 and float32 "
        f"do not (it is in {getattr(model, 'dtype', None)}): load it with one of those, or else look for NaN in its "
        "weights and adapters"
    )


def refuse_nan(model: nn.Module, nlls: Sequence[float], what: str) -> None:
    """Refuse -log p that are NaN, as they are where the largest logit is not finite."""
    if any(map(math.isnan, nlls)):
        raise not_finite(model, what)


def takes_cache(model: nn.Module, layers: Collection[type] = (DynamicLayer,)) -> bool:
    """Whether the model goes on from a cache of the usual kind, of such layers: by default each sees all tokens."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    accepted = inspect.signature(inner.forward).parameters
    return (
        {"attention_mask", "position_ids", "past_key_values", "use_cache"} <= accepted.keys()
        and not _stateful(inner)
        and all(type(layer) in layers for layer in DynamicCache(config=inner.config).layers)
    )


def _stateful(model: Any) -> bool:
    """Whether states are kept beside the cache, as RecurrentGemma's are in earlier releases of transformers."""
    kinds = getattr(model.config, "layers_block_type", None) or ()
    return getattr(model, "_is_stateful", False) or "recurrent" in kinds


def _front(model: Any, tokens: list[int], rows: int) -> dict[str, Any]:
    """The arguments with which a model goes on behind these tokens, in so many rows."""
    cache = DynamicCache(config=model.config)
    given = torch.tensor([tokens], device=input_device(model))
    arguments = {"past_key_values": cache, "use_cache": True}
    logits_at(model, given, torch.ones_like(given), torch.tensor([len(tokens) - 1]), **arguments)
    cache.batch_repeat_interleave(rows)
    return arguments


def some(indices: Sequence[int]) -> str:
    """The first ten, for a message."""
    shown = ", ".join(map(str, indices[:10]))
    return shown if len(indices) <= 10 else f"{shown}, ..."
