"""Self-generation: one completion per prompt, in length-sorted batches, written as it goes, by one or many workers."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from spd import distributed
from spd.completions import SETTINGS, CompletionsFile, Generation, read_generations
from spd.decoding import Decoder
from spd.determinism import one_thread, warn_if_not_deterministic
from spd.errors import InputError
from spd.files import sha256
from spd.intervention.attach import intervention_on
from spd.memory import FittingBatches
from spd.model_state import position_limit, preserved
from spd.packed import packed
from spd.progress import bar
from spd.provenance import config_hash, model_name, weights_fingerprint
from spd.sampling import Sampling

__all__ = ["SETTINGS", "CompletionsFile", "Generation", "generate", "leave_out", "read_generations", "without_room"]

GROUP = 32
"""Prompts decoded together where the bytes must not depend on `batch_size`."""


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    out: str | Path | None = None,
    temperature: float = 0.7,
    top_k: int | None = None,
    top_p: float = 0.9,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    seed: int = 42,
    stop: Sequence[str] = (),
    deterministic: bool = False,
    shard: tuple[int, int] | None = None,
    tag: str = "",
    around: Callable[[list[int]], AbstractContextManager[object]] | None = None,
    label: str = "generate",
    progress: bool = True,
) -> list[Generation]:
    """Sample one completion per prompt. Nothing is filtered.

    Each prompt has its own random numbers, drawn from (seed, index), so a completion does not depend on its
    neighbours or on when the run was interrupted, beyond the rounding of the logits; with the same batch size, a
    resumed run forms the very same batches and ends with the very same completions. Sampling settings that the
    checkpoint carries (repetition penalty, top-k) are not used.

    Several workers share the batches of all prompts: worker i of n takes those whose number leaves i when divided by n.
    Each appends to a file of its own beside `out`; the last one to finish brings all into `out`. A worker that is
    started again, or others with another n, go on from whatever is there. Processes that torchrun started are such
    workers by themselves, and all of them return all completions.

    Args:
        model: a causal language model of transformers; attach an intervention first to generate under it.
        tokenizer: its tokenizer.
        prompts: non-empty texts.
        out: a JSON Lines file, one `Generation` a line, in the order they are finished. If it is there already, the
            prompts it holds are not generated again. `out` with the suffix `.settings.json` says what made it.
        temperature: softmax temperature; 0 decodes greedily.
        top_k: how many of the most likely tokens may be sampled; None: all.
        top_p: nucleus mass, of what temperature and `top_k` leave.
        max_new_tokens: length limit.
        batch_size: prompts decoded together at most; halved, with a warning, where they do not fit in memory.
        seed: of the samples.
        stop: texts at which a completion may end; it still holds the first of them that it came to.
        deterministic: the same bytes on the same machine, whatever the batch size, the number of workers and of
            threads: prompts are decoded 32 at a time in one thread. Kept on the CPU in float32; elsewhere a warning
            says that it cannot be.
        shard: (i, n): be worker i of n, counted from 0, in a process of its own. With `out` all need the same
            `batch_size`, which is refused otherwise.
        tag: any text that tells apart what `out` depends on besides the arguments and the intervention on the model:
            an adapter, what `around` makes.
        around: makes the context in which a batch is decoded from the indices of its prompts, in the order of its
            rows; `Router.generate` uses it. It is made anew when rows that have ended leave the batch.
        label: what the progress bar says.
        progress: show it.

    Returns:
        The completions in the order of the prompts. Of a `shard`, those of its own batches, unless all prompts are
        done and `out` holds them: then all.

    Raises:
        InputError: unusable arguments, a prompt with no token or too long for the model, an `out` made otherwise or in
            use by another process, a prompt that does not fit in memory even alone, or where deterministic 32, or one
            behind which the model's logits are not finite.
    """
    if shard is None:
        distributed.join()
    prompts, stop = list(prompts), _checked_stop(stop)
    check_settings(temperature, top_k, top_p, max_new_tokens, batch_size, seed)
    number, count = _checked_shard(shard)
    together = shard is None and count > 1
    if together and distributed.is_sharded(model):
        raise InputError("model: expected a whole copy in every process to generate with, got one that is dealt out")
    encoded = encode_prompts(model, tokenizer, prompts, max_new_tokens)
    sampling = Sampling(temperature, top_k, top_p, max_new_tokens, seed)
    if deterministic:
        warn_if_not_deterministic(model, "generate")
    order = sorted(range(len(prompts)), key=lambda index: (len(encoded[index]), index))
    size = GROUP if deterministic else batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)][number::count]
    settings = {
        "model": model_name(model),
        "config_sha256": config_hash(model),
        "weights": weights_fingerprint(model),
        **described(prompts, sampling, tag),
        **({"stop": list(stop)} if stop else {}),
        **({"deterministic": True} if deterministic else {}),
        **intervention_on(model),
    }
    if together:
        distributed.check_same("generate: the arguments", (settings, batch_size))
    deal = size if shard else None  # processes of torchrun have the same, and may resume with another
    store = CompletionsFile(Path(out), settings, prompts, (number, count), deal) if out is not None else None
    fits = FittingBatches(size, caller="generate", unit="prompts", fixed=deterministic)
    done: dict[int, Generation] = {}

    with distributed.failing_together() if together else nullcontext(), store or nullcontext():
        done |= store.done if store else {}
        own = {index for batch in batches for index in batch}
        shown = bar(total=len(own), done=len(own & done.keys()), label=label, unit="prompts", show=progress)
        threads = one_thread() if deterministic else nullcontext()
        with shown, threads, preserved(model), packed(model), plain_generation_config(model, tokenizer) as config:
            model.eval()
            ends = end_tokens(config)
            decode = Decoder(
                model,
                sampling,
                ends=ends,
                pad=config.pad_token_id,
                stopped=_Stop(tokenizer, encoded, stop) if stop else None,
                around=around,
            )

            def made(part: Sequence[int]) -> list[Generation]:
                sampled = decode(part, [encoded[index] for index in part])
                return [
                    completed(tokenizer, index, prompts[index], encoded[index], tokens, ends, stop)
                    for index, tokens in zip(part, sampled, strict=True)
                ]

            for batch in batches:
                if all(index in done for index in batch):
                    continue
                for part in fits.run(batch, made):
                    fresh = [generation for generation in part if generation.index not in done]
                    if store:
                        store.append(fresh)
                    done |= {generation.index: generation for generation in fresh}
                    shown.update(len(fresh))
        if store and not together and store.merge(order):
            return [store.done[index] for index in range(len(prompts))]
    if together:
        for each in distributed.gather({index: done[index] for index in own}):
            done |= each
        with distributed.failing_together():
            if store and distributed.is_main():
                store.done |= done  # of machines whose files cannot be seen here, too
                store.merge(order)
        own = done.keys()  # type: ignore[assignment]
    return [done[index] for index in sorted(own)]


def described(prompts: Sequence[str], sampling: Sampling, tag: str) -> dict[str, Any]:
    """What every engine's completions depend on, as it is recorded beside them."""
    return {
        "prompts": len(prompts),
        "prompts_sha256": sha256(json.dumps(prompts)),
        **asdict(sampling),
        "tag": tag,
    }


def without_room(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int
) -> list[int]:
    """Which prompts leave no room for a completion in the model's positions: `generate` refuses those."""
    return _too_long(model, tokenizer(list(prompts))["input_ids"], max_new_tokens) if prompts else []


def leave_out(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int, task: str
) -> tuple[list[str], list[int]]:
    """The training prompts of a task that `generate` takes, and which it would refuse: of those it warns.

    Raises:
        InputError: it would refuse all.
    """
    refused = without_room(model, tokenizer, prompts, max_new_tokens)
    if prompts and len(refused) == len(prompts):
        raise InputError(f"task: none of the {len(prompts)} training prompts of {task} fits the model's positions")
    if refused:
        warnings.warn(
            f"generate: {len(refused)} of {len(prompts)} training prompts of {task} are too long for the model and are "
            f"left out: {refused[:10]}",
            stacklevel=2,
        )
    out = set(refused)
    return [prompt for index, prompt in enumerate(prompts) if index not in out], refused


def completed(
    tokenizer: PreTrainedTokenizerBase,
    index: int,
    prompt: str,
    encoded: list[int],
    sampled: list[int],
    ends: Collection[int],
    stop: Sequence[str] = (),
) -> Generation:
    """What was sampled behind a prompt, up to and including the first of the tokens that end a text."""
    end = next((position for position, token in enumerate(sampled) if token in ends), None)
    completion = _continuation(tokenizer, encoded, sampled[:end])
    return Generation(
        index=index,
        prompt=prompt,
        completion=completion,
        tokens=sampled if end is None else sampled[: end + 1],
        finished=end is not None or any(text in completion for text in stop),
    )


class _Stop:
    """Whether a completion has come to one of the texts that it may end at, asked after every token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, encoded: Sequence[list[int]], stop: Sequence[str]) -> None:
        self._tokenizer, self._encoded, self._stop = tokenizer, encoded, stop
        self._width = max(len(text.encode()) for text in stop) + 1  # a token is a byte at least

    def __call__(self, index: int, sampled: list[int]) -> bool:
        # the last tokens by themselves are quickly decoded; they may lack a leading space, so then the whole is asked
        tail = str(self._tokenizer.decode(sampled[-self._width :], skip_special_tokens=True))
        if not any(text in tail for text in self._stop):
            return False
        whole = _continuation(self._tokenizer, self._encoded[index], sampled)
        return any(text in whole for text in self._stop)


def _continuation(tokenizer: PreTrainedTokenizerBase, prompt: list[int], sampled: list[int]) -> str:
    """The text that the sampled tokens add: decoded behind the prompt, because alone they may lose a leading space."""
    before = str(tokenizer.decode(prompt, skip_special_tokens=True))
    whole = str(tokenizer.decode(prompt + sampled, skip_special_tokens=True))
    if whole.startswith(before):
        return whole[len(before) :]
    return str(tokenizer.decode(sampled, skip_special_tokens=True))


@contextmanager
def plain_generation_config(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Iterator[GenerationConfig]:
    """Only the special tokens of the model's own generation settings inside the block.

    A peft model copies its settings to the model inside, which gets its own back as well.
    """
    own: GenerationConfig = model.generation_config  # type: ignore[assignment]
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    inner_own = inner.generation_config
    ends = end_tokens(own) or ([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])
    candidates = (tokenizer.pad_token_id, own.pad_token_id, ends[0] if ends else None, 0)
    plain = GenerationConfig(
        bos_token_id=own.bos_token_id,
        eos_token_id=ends or None,
        pad_token_id=next(token for token in candidates if token is not None),
    )
    model.generation_config = plain  # type: ignore[assignment]
    try:
        yield plain
    finally:
        model.generation_config = own  # type: ignore[assignment]
        inner.generation_config = inner_own


def end_tokens(config: GenerationConfig) -> list[int]:
    ends = config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def encode_prompts(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_new_tokens: int
) -> list[list[int]]:
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise InputError(f"prompts: expected strings, got {type(prompt).__name__} at index {index}")
        if not prompt.isascii() and re.search("[\ud800-\udfff]", prompt):
            raise InputError(
                f"prompts: half of a surrogate pair, which is no character, in {prompt!r:.60} at index {index}"
            )
    encoded = [list(tokens) for tokens in tokenizer(prompts)["input_ids"]] if prompts else []
    empty = [index for index, tokens in enumerate(encoded) if not tokens]
    if empty:
        raise InputError(f"prompts: {len(empty)} have no token at all: {empty[:10]}")
    long = _too_long(model, encoded, max_new_tokens)
    if long:
        raise InputError(
            f"prompts: {len(long)} of {len(prompts)} leave no room for max_new_tokens = {max_new_tokens} "
            f"in the model's {position_limit(model)} positions: {long[:10]}"
        )
    return encoded


def _too_long(model: nn.Module, encoded: Sequence[Sequence[int]], max_new_tokens: int) -> list[int]:
    limit = position_limit(model)
    if limit is None:
        return []
    return [index for index, tokens in enumerate(encoded) if len(tokens) + max_new_tokens > limit]


def check_settings(
    temperature: float, top_k: int | None, top_p: float, max_new_tokens: int, batch_size: int, seed: int
) -> None:
    if not (isinstance(temperature, (int, float)) and 0 <= temperature < float("inf")):
        raise InputError(f"temperature: expected a finite number of at least 0, got {temperature!r}")
    if not (isinstance(top_p, (int, float)) and 0 < top_p <= 1):
        raise InputError(f"top_p: expected a number in (0, 1], got {top_p!r}")
    whole = [("max_new_tokens", max_new_tokens, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)]
    for name, value, least in whole + ([("top_k", top_k, 1)] if top_k is not None else []):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(f"{name}: expected an integer of at least {least}, got {value!r}")


def _checked_stop(stop: Sequence[str]) -> tuple[str, ...]:
    if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
        raise InputError(f"stop: expected non-empty texts in a list, got {stop!r}")
    return tuple(stop)


def _checked_shard(shard: tuple[int, int] | None) -> tuple[int, int]:
    if shard is None:
        return distributed.rank(), distributed.size()
    whole = isinstance(shard, (tuple, list)) and len(shard) == 2 and all(type(each) is int for each in shard)
    if not (whole and 0 <= shard[0] < shard[1]):
        raise InputError(f"shard: expected (i, n) with 0 <= i < n, got {shard!r}")
    return shard[0], shard[1]
