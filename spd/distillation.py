"""Phase 2, training: LoRA on the original model, next-token loss on its own completions (arXiv 2605.22675, eq. 14)."""

from __future__ import annotations

import json
import math
import random
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from spd.errors import InputError
from spd.files import atomic_folder, read_json, sha256, sha256_of_file, write_json
from spd.generation import Generation
from spd.intervention import refuse_if_attached
from spd.model_state import position_limit, preserved
from spd.progress import bar
from spd.provenance import config_hash, model_name, versions, weights_fingerprint
from spd.sites import find_sites

MANIFEST = "training.json"
WEIGHTS = "adapter_model.safetensors"
CHECKPOINT_STEPS = 100
KEY = "key.json"
_COMPLETE = "complete"
_IGNORED = -100  # the label that transformers' loss leaves out
_ATTENTION_LINEARS = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj"),
    *("qkv_proj", "c_attn", "c_proj", "query_key_value", "dense"),  # the fused families' names for them
)


@dataclass(frozen=True)
class Recipe:
    """How to train. The defaults are the published settings.

    Args:
        lora_rank, lora_alpha, lora_dropout: of the adapter on the q, k, v and o projections.
        learning_rate, weight_decay: of AdamW.
        epochs: passes over the completions.
        warmup_epochs: linear warm-up before the cosine decay, in epochs.
        batch_size: completions per step.
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
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise InputError(f"{name}: expected a finite number {least}, got {value!r}")
            if value < 0 or (name in positive and value == 0):
                raise InputError(f"{name}: expected a number {least}, got {value!r}")
        if self.lora_dropout >= 1:
            raise InputError(f"lora_dropout: expected a number below 1, got {self.lora_dropout!r}")


PRESETS = {"paper": Recipe()}


def distill(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    generations: Sequence[Generation],
    *,
    out: str | Path,
    recipe: Recipe | str = "paper",
    label: str = "distill",
    progress: bool = True,
) -> Path:
    """Train a LoRA adapter on prompt + completion of every generation.

    The base model is left as it was; use the adapter with `spd.adapted(model, out)` or with peft. A run that is
    interrupted goes on from its last checkpoint when called again with the same arguments; `out` appears only when
    the adapter is whole.

    Args:
        model: the original causal language model, without an intervention.
        tokenizer: its tokenizer.
        generations: what to train on, with no filter. The end-of-sequence token is part of the target where the model
            produced it.
        out: folder for the adapter in peft's format and `training.json` (recipe, loss by step, data hash).
        recipe: a `Recipe`, or the name of a preset ("paper").
        label: what the progress bar says.
        progress: show it.

    Returns:
        `out`.

    Raises:
        InputError: no generations, an intervention or an adapter on the model, an unknown preset, or an `out` made
            from other data or settings.
    """
    if isinstance(recipe, str):
        if recipe not in PRESETS:
            raise InputError(f"recipe: expected a Recipe or one of {', '.join(PRESETS)}, got {recipe!r}")
        recipe = PRESETS[recipe]
    _check_original(model, "distill")
    recipe = replace(recipe, max_length=min(recipe.max_length, position_limit(model) or recipe.max_length))
    examples = [_encode(tokenizer, generation, recipe) for generation in generations]
    cut = sum(example.pop("cut") for example in examples)
    if cut:
        warnings.warn(
            f"distill: {cut} of {len(examples)} texts are longer than max_length = {recipe.max_length} tokens, and cut",
            stacklevel=2,
        )
    examples = [example for example in examples if any(label != _IGNORED for label in example["labels"][1:])]
    if not examples:
        raise InputError("generations: expected at least one with a token to train on, got none")

    out = Path(out)
    key = {
        "model": model_name(model),
        "config_sha256": config_hash(model),
        "weights": weights_fingerprint(model),
        "recipe": asdict(recipe),
        "data_sha256": sha256(json.dumps([[g.prompt, g.completion, g.tokens, g.finished] for g in generations])),
    }
    work = out.with_name(out.name + ".checkpoints")
    if (out / MANIFEST).is_file():
        manifest = read_json(out / MANIFEST)
        _check_key(out, manifest, key)
        _check_weights(out, manifest)
        if (work / KEY).is_file():
            shutil.rmtree(work)
        return out
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
    if out.exists():
        raise InputError(f"{out}: exists and holds no finished adapter; choose another folder or delete it")
    if (work / KEY).is_file():
        _check_key(work, read_json(work / KEY), key)
    elif work.is_dir() and any(path.suffix != ".tmp" for path in work.iterdir()):
        raise InputError(f"{work}: checkpoints would go there, but it holds something else")
    write_json(work / KEY, key)

    with preserved(model), _own_random_numbers(), _own_cache_setting(model):
        torch.manual_seed(recipe.seed)
        with _unloaded_at_the_end(model, _with_lora(model, recipe)) as tuned:
            losses = _train(tuned, examples, recipe, work, label, progress)
            with atomic_folder(out) as temporary:
                tuned.save_pretrained(temporary)
                result = {
                    "examples": len(examples),
                    "cut": cut,
                    "tokens": sum(len(example["input_ids"]) for example in examples),
                    "loss": losses,
                    "weights_sha256": sha256_of_file(temporary / WEIGHTS),
                    "versions": versions(),
                }
                write_json(temporary / MANIFEST, key | result)
    shutil.rmtree(work)
    return out


@contextmanager
def adapted(model: nn.Module, adapter: str | Path) -> Iterator[nn.Module]:
    """The model with a trained adapter inside the block; the model as it was afterwards.

    Raises:
        InputError: the folder holds no whole adapter, or one of another base model.
    """
    from peft import PeftModel

    _check_original(model, "adapted")
    adapter = Path(adapter)
    if not (adapter / MANIFEST).is_file():
        raise InputError(f"{adapter}: no adapter there ({MANIFEST} is missing)")
    manifest = read_json(adapter / MANIFEST)
    if manifest.get("config_sha256") != config_hash(model):
        raise InputError(f"{adapter}: trained on {manifest.get('model')!r}, but the model is {model_name(model)!r}")
    _check_weights(adapter, manifest)
    with preserved(model), _unloaded_at_the_end(model, PeftModel.from_pretrained(model, str(adapter))) as tuned:
        yield tuned


@contextmanager
def merged(model: nn.Module, adapter: str | Path) -> Iterator[nn.Module]:
    """The model with an adapter in its weights inside the block; the very same weights as before afterwards.

    Unlike `adapted` it yields the model itself, which can be calibrated, projected and trained: the start of a further
    round of self-distillation.

    Raises:
        InputError: as `adapted`; or weights in half precision, in which most of so small an update would vanish.
    """
    coarse = {str(p.dtype).removeprefix("torch.") for p in model.parameters()} & {"float16", "bfloat16"}
    if coarse:
        raise InputError(
            f"model: its weights are {coarse.pop()}, in which an adapter's small updates vanish when they are merged; "
            "for further rounds load it with dtype float32"
        )
    originals: list[tuple[nn.Parameter, torch.Tensor]] = []
    try:
        with adapted(model, adapter) as opened:
            tuned: Any = opened
            weights = [layer.get_base_layer().weight for layer in tuned.modules() if hasattr(layer, "get_base_layer")]
            originals += [(weight, weight.detach().clone()) for weight in weights]
            tuned.merge_adapter()
        yield model
    finally:
        with torch.no_grad():
            for weight, original in originals:
                weight.copy_(original)


def _check_original(model: nn.Module, caller: str) -> None:
    refuse_if_attached(model, caller)
    if hasattr(model, "peft_config"):
        raise InputError(f"{caller}: the model carries a peft adapter already; use the original model")


@contextmanager
def _unloaded_at_the_end(model: nn.Module, tuned: Any) -> Iterator[Any]:
    """The peft model inside the block; its layers out of `model` afterwards, with the traces that peft leaves there."""
    try:
        yield tuned
    finally:
        tuned.unload()
        for name in ("peft_config", "active_adapter"):
            if name in vars(model):
                delattr(model, name)


def _with_lora(model: nn.Module, recipe: Recipe) -> Any:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=_attention_linears(model),
        fan_in_fan_out=any(isinstance(site.k.module, Conv1D) for site in find_sites(model).values()),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def _train(
    tuned: Any, examples: list[dict[str, Any]], recipe: Recipe, work: Path, label: str, progress: bool
) -> list[dict[str, float]]:
    """Train to the end, from the last whole checkpoint in `work` if there is one; the loss as it was logged."""
    from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

    device = next(tuned.parameters()).device
    steps_per_epoch = math.ceil(len(examples) / recipe.batch_size)
    arguments = TrainingArguments(
        output_dir=str(work),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=round(recipe.warmup_epochs * steps_per_epoch),
        max_grad_norm=recipe.max_grad_norm,
        seed=recipe.seed,
        use_cpu=device.type == "cpu",
        save_strategy="steps",
        save_steps=CHECKPOINT_STEPS,
        save_total_limit=2,
        logging_steps=max(1, min(10, steps_per_epoch // 4)),
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        fp16=device.type == "cuda" and any(p.dtype == torch.float16 for p in tuned.parameters()),  # scales the loss
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # the model is on one device, and the published batch is the whole batch
    trainer = Trainer(model=tuned, args=arguments, train_dataset=examples, data_collator=_collate)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(_mark_complete_callback())
    trainer.add_callback(_progress_callback(label, progress))
    trainer.train(resume_from_checkpoint=_last_complete_checkpoint(work))
    return [
        {"step": entry["step"], "loss": entry["loss"], "learning_rate": entry["learning_rate"]}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def _encode(tokenizer: PreTrainedTokenizerBase, generation: Generation, recipe: Recipe) -> dict[str, Any]:
    """Token ids, labels, and whether they were cut: the very tokens that were sampled, or else those of the text."""
    prompt = list(tokenizer(generation.prompt)["input_ids"])
    if generation.tokens:
        tokens = prompt + list(generation.tokens)
    else:
        tokens = list(tokenizer(generation.prompt + generation.completion)["input_ids"])
        if generation.finished and tokenizer.eos_token_id is not None and tokens[-1:] != [tokenizer.eos_token_id]:
            tokens.append(tokenizer.eos_token_id)
    ignored = 0 if recipe.prompt_loss else len(prompt)
    labels = [_IGNORED] * min(ignored, len(tokens)) + tokens[ignored:]
    cut = len(tokens) > recipe.max_length
    return {"input_ids": tokens[: recipe.max_length], "labels": labels[: recipe.max_length], "cut": cut}


def _collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Right padding to the longest of the batch; padding is neither attended to nor trained on."""
    pad = nn.utils.rnn.pad_sequence
    tokens = [torch.tensor(example["input_ids"]) for example in examples]
    return {
        "input_ids": pad(tokens, batch_first=True),
        "attention_mask": pad([torch.ones_like(row) for row in tokens], batch_first=True),
        "labels": pad(
            [torch.tensor(example["labels"]) for example in examples], batch_first=True, padding_value=_IGNORED
        ),
    }


def _attention_linears(model: nn.Module) -> list[str]:
    """Dotted names of the q, k, v and o projections, or of their fused forms, at every attention layer."""
    paths = [site.k.path.rpartition(".")[0] for site in find_sites(model).values()]
    return [
        f"{path}.{name}"
        for path in paths
        for name in _ATTENTION_LINEARS
        if isinstance(getattr(model.get_submodule(path), name, None), nn.Module)
    ]


def _last_complete_checkpoint(work: Path) -> str | None:
    """The newest checkpoint whose writing was finished; torn ones are removed."""
    checkpoints = sorted(work.glob("checkpoint-[0-9]*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in list(checkpoints):
        if not (path / _COMPLETE).is_file():
            shutil.rmtree(path)
            checkpoints.remove(path)
    return str(checkpoints[-1]) if checkpoints else None


def _mark_complete_callback() -> Any:
    from transformers import TrainerCallback

    class MarkComplete(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _COMPLETE).touch()

    return MarkComplete()


def _progress_callback(label: str, show: bool) -> Any:
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar = bar(total=state.max_steps, done=state.global_step, label=label, unit="steps", show=show)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.update()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                self.bar.set_postfix(loss=logs["loss"])

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.close()

    return Progress()


def _check_key(folder: Path, found: dict[str, Any], key: dict[str, Any]) -> None:
    changed = sorted(name for name in key if found.get(name) != key[name])
    if changed:
        raise InputError(f"{folder}: is of a training with another {', '.join(changed)}; choose another or delete it")


def _check_weights(adapter: Path, manifest: dict[str, Any]) -> None:
    weights = adapter / WEIGHTS
    if not weights.is_file() or sha256_of_file(weights) != manifest.get("weights_sha256"):
        raise InputError(f"{weights}: missing, truncated or altered")


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
    """Trainer turns the model's key-value cache off."""
    config: Any = model.config
    use_cache = config.use_cache
    try:
        yield
    finally:
        config.use_cache = use_cache
