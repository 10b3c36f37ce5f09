"""Self-generation with vLLM, on a checkpoint that may be projected: the completions of `spd.generate`, made faster.

The samples are vLLM's own: same prompts and settings, one seed a prompt, but not the random numbers of `spd.generate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from spd.completions import CompletionsFile, Generation
from spd.errors import InputError
from spd.export.checkpoint import Checkpoint, open_checkpoint
from spd.export.folded import export_folded
from spd.generation import check_settings, completed, described, encode_prompts, end_tokens
from spd.progress import bar
from spd.sampling import Sampling
from spd.subspace import Subspace

AT_ONCE = 1024
"""Prompts that vLLM gets in one call, and that an interruption can cost."""


def generate_with_vllm(
    checkpoint: str | Path,
    prompts: Sequence[str],
    *,
    subspace: Subspace | str | Path | None = None,
    sides: str = "kv",
    out: str | Path | None = None,
    temperature: float = 0.7,
    top_k: int | None = None,
    top_p: float = 0.9,
    max_new_tokens: int = 256,
    at_once: int = AT_ONCE,
    seed: int = 42,
    tag: str = "",
    label: str = "generate",
    progress: bool = True,
    options: Mapping[str, Any] | None = None,
) -> list[Generation]:
    """Sample one completion per prompt with vLLM. Nothing is filtered.

    Args:
        checkpoint: folder, or name on the hub, of a checkpoint with safetensors weights; it may be folded already.
        prompts: non-empty texts.
        subspace: project K and V on this while generating: a folded copy of the checkpoint lies beside `out` (or in
            the temporary folder) until the end.
        sides: which of K and V.
        out, temperature, top_k, top_p, max_new_tokens, tag, label, progress: as for `spd.generate`. A file that one
            engine began is not continued by the other.
        at_once: prompts handed over together; what they gave is written before the next are.
        seed: each prompt's own seed is drawn from (seed, index).
        options: what else `vllm.LLM` is to be told, such as {"tensor_parallel_size": 2}.

    Returns:
        The completions in the order of the prompts.

    Raises:
        InputError: vLLM is not installed, unusable arguments, or what `spd.generate` and `spd.export_folded` refuse.
    """
    prompts = list(prompts)
    check_settings(temperature, top_k, top_p, max_new_tokens, 1, seed)
    if not isinstance(at_once, int) or isinstance(at_once, bool) or at_once < 1:
        raise InputError(f"at_once: expected an integer of at least 1, got {at_once!r}")
    opened = open_checkpoint(checkpoint)
    if subspace is not None and not isinstance(subspace, Subspace):
        subspace = Subspace.from_pretrained(subspace)
    tokenizer = AutoTokenizer.from_pretrained(opened.folder)
    encoded = encode_prompts(opened.model, tokenizer, prompts, max_new_tokens)
    settings = {
        "engine": "vllm",
        "model": opened.name,
        "weights": opened.fingerprint(),
        "subspace": None if subspace is None else f"{subspace.sha256} {sides}",
        **described(prompts, Sampling(temperature, top_k, top_p, max_new_tokens, seed), tag),
    }
    store = CompletionsFile(Path(out), settings, prompts) if out is not None else None
    with ExitStack() as stack:
        done = stack.enter_context(store).done if store else {}
        missing = [index for index in range(len(prompts)) if index not in done]
        if not missing:
            return [done[index] for index in range(len(prompts))]
        vllm = _vllm()
        ends = _ends(opened, tokenizer)
        folder = opened.folder
        if subspace is not None:
            beside = None if out is None else Path(out).resolve().parent
            # as a file on its way to `out` is named: if this process is killed, the next one removes it
            name = ".folded" if out is None else f".{Path(out).name}"
            scratch = stack.enter_context(TemporaryDirectory(dir=beside, prefix=f"{name}.", suffix=".tmp"))
            folder = export_folded(checkpoint, subspace, Path(scratch) / "checkpoint", sides=sides)
        # "vllm": not the checkpoint's settings for sampling, which spd.generate does not use either
        model = vllm.LLM(model=str(folder), seed=seed, generation_config="vllm", **(options or {}))
        shown = bar(total=len(prompts), done=len(done), label=label, unit="prompts", show=progress)
        stack.enter_context(shown)
        for start in range(0, len(missing), at_once):
            batch = missing[start : start + at_once]
            sampling = [
                vllm.SamplingParams(
                    temperature=temperature,
                    top_k=-1 if top_k is None else top_k,
                    top_p=top_p,
                    max_tokens=max_new_tokens,
                    seed=request_seed(seed, index),
                    stop_token_ids=ends,
                    ignore_eos=True,  # the tokens that end a text are those named here, as in spd.generate
                    detokenize=False,
                )
                for index in batch
            ]
            asked = [{"prompt_token_ids": encoded[index]} for index in batch]
            sampled = [list(each.outputs[0].token_ids) for each in model.generate(asked, sampling, use_tqdm=False)]
            fresh = [
                completed(tokenizer, index, prompts[index], encoded[index], tokens, ends)
                for index, tokens in zip(batch, sampled, strict=True)
            ]
            if store:
                store.append(fresh)
            done |= {generation.index: generation for generation in fresh}
            shown.update(len(fresh))
    return [done[index] for index in range(len(prompts))]


def request_seed(seed: int, index: int) -> int:
    """32 bits drawn from (seed, index)."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


def _vllm() -> Any:
    try:
        return import_module("vllm")
    except ImportError as error:
        raise InputError(f'engine: vllm is not installed ({error}); pip install "spd[vllm]"') from None


def _ends(opened: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text for `spd.generate`: the checkpoint's, or else the tokenizer's."""
    if (opened.folder / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(opened.folder)
    else:
        config = opened.model.generation_config  # type: ignore[assignment]
    return end_tokens(config) or ([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])
