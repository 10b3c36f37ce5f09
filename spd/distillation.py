"""Phase 2, training: LoRA on the original model, next-token loss on its own completions (arXiv 2605.22675, eq. 14)."""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from spd.adapters import (
    MANIFEST,
    WEIGHTS,
    adapted,
    check_original,
    merged,
    save,
    unloaded_at_the_end,
    whole_manifest,
    with_lora,
)
from spd.determinism import one_thread, warn_if_not_deterministic
from spd.distributed import broadcast, check_same, failing_together, is_main, is_sharded, join, size
from spd.errors import InputError
from spd.files import atomic_folder, read_json, remove_leftovers, sha256, write_json
from spd.generation import Generation
from spd.lock import locked
from spd.model_state import position_limit, preserved
from spd.provenance import config_hash, model_name, versions, weights_fingerprint
from spd.recipe import PRESETS, Recipe, named_recipe
from spd.training.checkpoints import last_whole
from spd.training.texts import Text, encode

__all__ = ["MANIFEST", "PRESETS", "WEIGHTS", "Recipe", "adapted", "distill", "merged"]

KEY = "key.json"


def distill(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    generations: Sequence[Generation],
    *,
    out: str | Path,
    recipe: Recipe | str = "paper",
    gradient_checkpointing: bool = False,
    deterministic: bool = False,
    label: str = "distill",
    progress: bool = True,
) -> Path:
    """Train a LoRA adapter on prompt + completion of every generation.

    The base model is left as it was; use the adapter with `spd.adapted(model, out)` or with peft. A run that is
    interrupted goes on from its last whole checkpoint when called again with the same arguments; `out` appears only
    when the adapter is whole. A batch that does not fit in memory is halved, with a warning; its gradient is the same.

    Under torchrun or `accelerate launch` every process must call this with the same arguments, on a file system that
    they share. The batches, their order and the loss are those of a single process; every process holds the model and
    takes its share of each batch. The adapter is the same but for rounding, and for dropout, which differs with the
    number of processes. It may be resumed with another number.

    Args:
        model: the original causal language model, without an intervention.
        tokenizer: its tokenizer.
        generations: what to train on, with no filter. The end-of-sequence token is part of the target where the model
            produced it.
        out: folder for the adapter in peft's format and `training.json` (recipe, loss by step, data hash).
        recipe: a `Recipe`, or the name of a preset ("paper").
        gradient_checkpointing: keep of every layer its input alone and compute the rest again on the way back: less
            memory for a second forward pass, and the same adapter.
        deterministic: the same bytes on the same machine, whatever the number of threads: texts are trained on in one
            thread, and a batch that does not fit in memory is refused, since halves would add up otherwise. Kept by one
            process on the CPU in float32; elsewhere a warning says that it cannot be.
        label: what the progress bar says.
        progress: show it.

    Returns:
        `out`.

    Raises:
        InputError: no generations, an intervention or an adapter on the model, an unknown preset, an `out` made from
            other data or settings, altered, or in use by another training; not even one text fits in memory, or where
            deterministic not a whole batch; the loss or a trained weight is no longer finite; another process failed.
        OSError: the disk is full.
    """
    join()
    with failing_together():
        recipe = named_recipe(recipe)
        check_original(model, "distill")
        _check_unsharded(model)
        recipe = replace(recipe, max_length=min(recipe.max_length, position_limit(model) or recipe.max_length))
        texts = _texts(tokenizer, generations, recipe)
    if deterministic:
        warn_if_not_deterministic(model, "distill")
    out = Path(out)
    key = {
        "model": model_name(model),
        "config_sha256": config_hash(model),
        "weights": weights_fingerprint(model),
        "recipe": asdict(recipe),
        "data_sha256": sha256(json.dumps([[g.prompt, g.completion, g.tokens, g.finished] for g in generations])),
        **({"deterministic": True} if deterministic else {}),
    }
    check_same("distill", key | {"out": str(out)})
    work = out.with_name(out.name + ".checkpoints")
    with _held(out):
        with failing_together():
            finished, resume = _prepared(out, work, key) if is_main() else (False, None)
        finished, resume = broadcast((finished, resume))
        if finished:
            return out
        threads = one_thread() if deterministic else nullcontext()
        with preserved(model), _own_random_numbers(), _own_cache_setting(model), threads:
            torch.manual_seed(recipe.seed)
            with unloaded_at_the_end(model, with_lora(model, recipe)) as tuned:
                losses = _train(
                    tuned,
                    [text for text in texts if text.targets],
                    recipe,
                    work=work,
                    resume=resume,
                    label=label,
                    progress=progress,
                    gradient_checkpointing=gradient_checkpointing,
                    deterministic=deterministic,
                )
                with failing_together():
                    if is_main():
                        with atomic_folder(out) as temporary:
                            save(tuned, temporary, key | _result(texts, losses))
                        _discard(work)
    return out


def _texts(tokenizer: PreTrainedTokenizerBase, generations: Sequence[Generation], recipe: Recipe) -> list[Text]:
    texts = [encode(tokenizer, generation, recipe) for generation in generations]
    if not any(text.targets for text in texts):
        raise InputError("generations: expected at least one with a token to train on, got none")
    cut = sum(text.cut for text in texts)
    if cut and is_main():
        warnings.warn(
            f"distill: {cut} of {len(texts)} texts are longer than max_length = {recipe.max_length} tokens, and cut",
            stacklevel=3,
        )
    return texts


def _result(texts: list[Text], losses: list[dict[str, float]]) -> dict[str, Any]:
    trained = [text for text in texts if text.targets]
    return {
        "examples": len(trained),
        "cut": sum(text.cut for text in texts),
        "tokens": sum(len(text.tokens) for text in trained),
        "loss": losses,
        "processes": size(),
        "versions": versions(),
    }


def _discard(work: Path) -> None:
    """The key goes last: who is killed in the middle finds it again, and knows the rest for its own."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != KEY:
            path.unlink()
    (work / KEY).unlink(missing_ok=True)
    work.rmdir()


def _prepared(out: Path, work: Path, key: dict[str, Any]) -> tuple[bool, Path | None]:
    """Whether `out` is finished, and else the checkpoint to go on from; `work` is ready then."""
    remove_leftovers(out)
    if (out / MANIFEST).is_file():
        _check_key(out, whole_manifest(out), key)
        if (work / KEY).is_file() or (work.is_dir() and not any(work.iterdir())):
            _discard(work)
        return True, None
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
    if out.exists():
        raise InputError(f"{out}: exists and holds no finished adapter; choose another folder or delete it")
    if (work / KEY).is_file():
        _check_key(work, read_json(work / KEY), key)
    elif work.is_dir() and any(path.suffix != ".tmp" for path in work.iterdir()):
        raise InputError(f"{work}: checkpoints would go there, but it holds something else")
    write_json(work / KEY, key)
    return False, last_whole(work)


def _train(*args: Any, **kwargs: Any) -> list[dict[str, float]]:
    from spd.training.trainer import train  # Trainer takes a second to import

    return train(*args, **kwargs)


def _check_unsharded(model: nn.Module) -> None:
    """Every process holds the whole model here, whatever accelerate's configuration says of others."""
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true", "yes"):
            raise InputError(
                f"distill: accelerate is configured for {name}, but every process must hold the whole model; "
                "configure it for multi-GPU or multi-CPU, or start with torchrun"
            )
    if is_sharded(model):
        raise InputError("model: expected the whole model in every process, got one that is sharded over them")


def _check_key(folder: Path, found: Any, key: dict[str, Any]) -> None:
    changed = sorted(name for name in key if not isinstance(found, dict) or found.get(name) != key[name])
    if changed:
        raise InputError(f"{folder}: is of a training with another {', '.join(changed)}; choose another or delete it")


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """No other training goes into `out` meanwhile."""
    with ExitStack() as held:
        with failing_together():
            if is_main():
                held.enter_context(locked(out, "distill"))
        yield


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Trainer seeds every global generator; the caller's go on where they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _own_cache_setting(model: nn.Module) -> Iterator[None]:
    """Trainer turns the model's key-value cache off, in a composite configuration where there was no such setting."""
    config: Any = model.config
    absent = object()
    before = [(each, getattr(each, "use_cache", absent)) for each in (config, config.get_text_config())]
    try:
        yield
    finally:
        for each, use_cache in before:
            if use_cache is not absent:
                each.use_cache = use_cache
            elif hasattr(each, "use_cache"):
                del each.use_cache
