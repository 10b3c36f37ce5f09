"""Self-generation: one completion per prompt, in length-sorted batches, written as it goes."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from spd.errors import InputError
from spd.files import read_json, read_jsonl, sha256, write_json
from spd.model_state import input_device, position_limit, preserved
from spd.progress import bar
from spd.provenance import config_hash, model_name, weights_fingerprint

SETTINGS = ".settings.json"


@dataclass(frozen=True)
class Generation:
    """A completion as it was sampled.

    Args:
        index: the prompt's position in what was passed.
        prompt: the prompt.
        completion: the text after it, without the end-of-sequence token.
        tokens: the sampled token ids, the end-of-sequence token included; training takes these, since text does not
            always lead back to the tokens it came from. Empty for text from elsewhere, which is then tokenised.
        finished: whether the model ended by itself, rather than at the length limit.
    """

    index: int
    prompt: str
    completion: str
    tokens: list[int]
    finished: bool


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
        batch_size: prompts decoded together.
        seed: of the samples.
        tag: any text that tells apart what `out` depends on besides the arguments: an intervention, an adapter.
        around: makes the context in which a batch is decoded from the indices of its prompts, in the order of its
            rows; `Router.generate` uses it.
        label: what the progress bar says.
        progress: show it.

    Returns:
        The completions in the order of the prompts.

    Raises:
        InputError: unusable arguments, a prompt with no token or too long for the model, or an `out` made otherwise.
    """
    prompts = list(prompts)
    check_settings(temperature, top_k, top_p, max_new_tokens, batch_size, seed)
    encoded = encode_prompts(model, tokenizer, prompts, max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda index: (len(encoded[index]), index))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    settings = {
        "model": model_name(model),
        "config_sha256": config_hash(model),
        "weights": weights_fingerprint(model),
        "prompts": len(prompts),
        "prompts_sha256": sha256(json.dumps(prompts)),
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "tag": tag,
    }
    store = CompletionsFile(Path(out), settings, prompts) if out is not None else None
    done = store.done if store else {}

    shown = bar(total=len(prompts), done=len(done), label=label, unit="prompts", show=progress)
    with shown, preserved(model), _plain_generation_config(model, tokenizer):
        model.eval()
        for batch in batches:
            if all(index in done for index in batch):
                continue
            with around(batch) if around else nullcontext():
                fresh = _generate_batch(
                    model, tokenizer, batch, prompts, encoded, temperature, top_k, top_p, max_new_tokens, seed
                )
            fresh = [generation for generation in fresh if generation.index not in done]
            if store:
                store.append(fresh)
            done |= {generation.index: generation for generation in fresh}
            shown.update(len(fresh))
    return [done[index] for index in range(len(prompts))]


def without_room(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int
) -> list[int]:
    """Which prompts leave no room for a completion in the model's positions: `generate` refuses those."""
    return _too_long(model, tokenizer(list(prompts))["input_ids"], max_new_tokens) if prompts else []


def read_generations(path: str | Path) -> list[Generation]:
    """The completions of a finished `out` file, in the order of the prompts.

    Raises:
        InputError: no such file, a line that is not a completion, or a file that a kill left incomplete.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"generations: there is no file {path}")
    try:
        generations = sorted((Generation(**record) for record in read_jsonl(path)), key=lambda each: each.index)
    except TypeError as error:
        raise InputError(f"{path}: not written by generate ({error})") from None
    settings = path.with_suffix(SETTINGS)
    count = read_json(settings).get("prompts") if settings.is_file() else len(generations)
    if not isinstance(count, int):
        raise InputError(f"{settings}: not written by generate (it does not say how many prompts there are)")
    if [generation.index for generation in generations] != list(range(count)):
        raise InputError(f"{path}: incomplete, some prompts have no completion yet; run spd generate again")
    return generations


class SeededSampling(LogitsProcessor):
    """Sampling by the inverse of the cumulative distribution, with uniform numbers that each row brings along.

    Leaves only the sampled token possible, so that greedy decoding picks it.
    """

    def __init__(self, uniforms: Tensor, prompt_length: int) -> None:
        self.uniforms = uniforms  # (B, max_new_tokens) in [0, 1)
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = self.uniforms[:, input_ids.shape[1] - self.prompt_length, None]
        cumulative = scores.double().softmax(dim=-1).cumsum(dim=-1)
        token = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        token = token.clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, float("-inf")).scatter(1, token, 0.0)


class CompletionsFile:
    """The JSON Lines file behind a resumable generation, and its settings beside it."""

    def __init__(self, path: Path, settings: dict[str, Any], prompts: list[str]) -> None:
        self.path = path
        self.done: dict[int, Generation] = {}
        beside = path.with_suffix(SETTINGS)
        path.parent.mkdir(parents=True, exist_ok=True)
        if beside.exists():
            found = read_json(beside)
            changed = sorted(key for key in settings if found.get(key) != settings[key])
            if changed:
                raise InputError(
                    f"{path}: was made with another {', '.join(changed)}; choose another file or delete this one"
                )
        elif path.exists():
            raise InputError(f"{path}: exists but was not written by generate ({beside.name} is missing)")
        else:
            write_json(beside, settings)
        if path.exists():
            self._recover(prompts)

    def _recover(self, prompts: list[str]) -> None:
        """Read whole lines; cut off a last one that a kill left torn."""
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                generation = Generation(**json.loads(line))
                matches = prompts[generation.index] == generation.prompt
            except (ValueError, TypeError, IndexError):
                matches = False
            if not matches:
                raise InputError(f"{self.path}, line {number}: not a completion of these prompts; delete the file")
            self.done[generation.index] = generation
        if len(whole) < len(content):
            with open(self.path, "r+b") as file:
                file.truncate(len(whole))

    def append(self, generations: list[Generation]) -> None:
        lines = "".join(json.dumps(asdict(generation)) + "\n" for generation in generations)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(lines)


def _generate_batch(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    batch: list[int],
    prompts: list[str],
    encoded: list[list[int]],
    temperature: float,
    top_k: int | None,
    top_p: float,
    max_new_tokens: int,
    seed: int,
) -> list[Generation]:
    device = input_device(model)
    config: GenerationConfig = model.generation_config  # type: ignore[assignment]
    length = max(len(encoded[index]) for index in batch)
    tokens = torch.full((len(batch), length), config.pad_token_id or 0)
    mask = torch.zeros_like(tokens)
    for row, index in enumerate(batch):
        tokens[row, length - len(encoded[index]) :] = torch.tensor(encoded[index])
        mask[row, length - len(encoded[index]) :] = 1

    processors = LogitsProcessorList()
    if temperature > 0:
        uniforms = np.stack([np.random.default_rng([seed, index]).random(max_new_tokens) for index in batch])
        processors.append(TemperatureLogitsWarper(float(temperature)))
        if top_k is not None:
            processors.append(TopKLogitsWarper(top_k))
        if top_p < 1.0:
            processors.append(TopPLogitsWarper(top_p))
        processors.append(SeededSampling(torch.from_numpy(uniforms).to(device), length))
    with torch.inference_mode():
        output = model.generate(  # type: ignore[operator]
            input_ids=tokens.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            logits_processor=processors,
        )[:, length:].cpu()

    ends = set(end_tokens(config))
    generations = []
    for row, index in enumerate(batch):
        sampled = output[row].tolist()
        generations.append(completed(tokenizer, index, prompts[index], encoded[index], sampled, ends))
    return generations


def completed(
    tokenizer: PreTrainedTokenizerBase,
    index: int,
    prompt: str,
    encoded: list[int],
    sampled: list[int],
    ends: Collection[int],
) -> Generation:
    """What was sampled behind a prompt, up to and including the first of the tokens that end a text."""
    end = next((position for position, token in enumerate(sampled) if token in ends), None)
    return Generation(
        index=index,
        prompt=prompt,
        completion=_continuation(tokenizer, encoded, sampled[:end]),
        tokens=sampled if end is None else sampled[: end + 1],
        finished=end is not None,
    )


def _continuation(tokenizer: PreTrainedTokenizerBase, prompt: list[int], sampled: list[int]) -> str:
    """The text that the sampled tokens add: decoded behind the prompt, because alone they may lose a leading space."""
    before = str(tokenizer.decode(prompt, skip_special_tokens=True))
    whole = str(tokenizer.decode(prompt + sampled, skip_special_tokens=True))
    if whole.startswith(before):
        return whole[len(before) :]
    return str(tokenizer.decode(sampled, skip_special_tokens=True))


@contextmanager
def _plain_generation_config(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Only the special tokens of the model's own generation settings inside the block.

    A peft model copies its settings to the model inside, which gets its own back as well.
    """
    own: GenerationConfig = model.generation_config  # type: ignore[assignment]
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    inner_own = inner.generation_config
    ends = end_tokens(own) or ([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])
    candidates = (tokenizer.pad_token_id, own.pad_token_id, ends[0] if ends else None, 0)
    model.generation_config = GenerationConfig(  # type: ignore[assignment]
        bos_token_id=own.bos_token_id,
        eos_token_id=ends or None,
        pad_token_id=next(token for token in candidates if token is not None),
    )
    try:
        yield
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
