"""transformers' Trainer on the same global batches in the same order, whatever the number of processes."""

from __future__ import annotations

import gc
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from spd.distributed import failing_together, is_main, rank, size
from spd.errors import InputError
from spd.files import sha256
from spd.memory import FittingBatches
from spd.model_state import checkpointed, input_device
from spd.progress import bar
from spd.recipe import Recipe
from spd.training.checkpoints import seal
from spd.training.layout import Layout
from spd.training.loss import SummedLoss
from spd.training.texts import Text

CHECKPOINT_STEPS = 100


def train(
    tuned: Any,
    texts: list[Text],
    recipe: Recipe,
    *,
    work: Path,
    resume: Path | None,
    label: str,
    progress: bool,
    gradient_checkpointing: bool,
    deterministic: bool = False,
) -> list[dict[str, float]]:
    """Train to the end, from the checkpoint `resume` if there is one.

    Args:
        tuned: a peft model, whose adapter is trained in place.
        texts: what to train on.
        recipe: how.
        work: folder for the checkpoints.
        resume: a whole checkpoint in it.
        label: what the progress bar says.
        progress: show it.
        gradient_checkpointing: keep of every layer its input alone, and compute the rest again on the way back.
        deterministic: refuse a batch that does not fit in memory, where else it is halved: its sums would be rounded
            otherwise.

    Returns:
        Step, loss and learning rate as they were logged.

    Raises:
        InputError: not even one text fits in memory, or where deterministic not a whole batch; or the layers cannot be
            checkpointed; or the loss or a trained weight is no longer finite.
        OSError: a checkpoint could not be written.
    """
    steps_per_epoch = math.ceil(len(texts) / recipe.batch_size)
    device = next(tuned.parameters()).device
    arguments = _Arguments(
        device,
        scaled=device.type == "cuda" and any(p.dtype == torch.float16 for p in tuned.parameters()),
        output_dir=str(work),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=round(recipe.warmup_epochs * steps_per_epoch),
        max_grad_norm=recipe.max_grad_norm,
        seed=recipe.seed,
        save_strategy="steps",
        save_steps=CHECKPOINT_STEPS,
        save_total_limit=2,
        logging_steps=max(1, min(10, steps_per_epoch // 4)),
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
    )
    trainer = _Trainer(tuned, arguments, texts, recipe, fixed=deterministic)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(_Progress(label, progress and is_main()))
    saving = checkpointed(tuned, training=True) if gradient_checkpointing else nullcontext()
    with saving, _current(device), _set_aside():
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    with failing_together():
        trainer.check_weights()
    return [
        {"step": entry["step"], "loss": entry["loss"], "learning_rate": entry["learning_rate"]}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


class _Arguments(TrainingArguments):
    """Of a training in one process, or one of several, on the device where the model is.

    Which one transformers would take of the machine's, and what the environment says of precision, change nothing.
    """

    def __init__(self, device: torch.device, *, scaled: bool, **settings: Any) -> None:
        self._own_device = device
        super().__init__(**settings, use_cpu=device.type == "cpu", fp16=scaled)
        self.mixed_precision = "fp16" if scaled else "no"  # fp16 scales the loss

    @cached_property
    def _setup_devices(self) -> torch.device:
        with _current(self._own_device):  # of several, transformers makes the first the current one
            _ = super()._setup_devices
        self.distributed_state.device = self._own_device  # accelerate moves models there
        self._n_gpu = 1  # the published batch is the whole batch
        return self._own_device


class _Trainer(Trainer):
    """Every process goes over the global batches and works on its share of each; then the gradients are added up.

    The loss of a global batch is the mean over all its tokens, so shares may be of any size, or empty.
    """

    def __init__(
        self, tuned: Any, arguments: TrainingArguments, texts: list[Text], recipe: Recipe, *, fixed: bool
    ) -> None:
        super().__init__(model=tuned, args=arguments, train_dataset=texts)
        self.recipe = recipe
        self.summed_loss = SummedLoss(tuned)
        self.layout = Layout(tuned)
        self.fitting = FittingBatches(recipe.batch_size, caller="distill", unit="texts", fixed=fixed)
        self.trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]

    def get_train_dataloader(self) -> DataLoader[Text]:
        """Global batches, not sharded by accelerate, which would make the number of processes part of the result."""
        texts: Any = self.train_dataset
        return DataLoader(texts, batch_size=self.recipe.batch_size, sampler=_Order(self, len(texts)), collate_fn=list)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Gradients of one global batch, and its loss, the same in all processes."""
        tuned: Any = self.model  # bare: what accelerate wraps it in would reduce the gradients by its own rules
        if not tuned.training:
            tuned.train()
        if size() > 1:  # dropout of its own in each process, and the same again after a resumption with as many
            torch.manual_seed(int(sha256(f"{self.recipe.seed} {self.state.global_step} {rank()}")[:15], 16))
        targets = sum(text.targets for text in inputs)
        loss = torch.zeros((), device=input_device(tuned))
        failed: Exception | None = None
        try:
            for part in self.fitting.run(inputs[rank() :: size()], partial(self._backward, targets=targets)):
                loss += part.to(loss.device)
        except Exception as error:
            if size() == 1:
                raise
            failed = error
        return self._added_up(loss, failed) if size() > 1 else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for name in ("loss", "train_loss"):  # the mean since the last; the mean of all
            if not math.isfinite(logs.get(name, 0.0)):
                raise self._not_finite(f"a finite loss, got {logs[name]}")
        super().log(logs, start_time)

    def check_weights(self) -> None:
        """A step that the scaling of the loss skipped leaves them finite.

        Raises:
            InputError: one is infinite or not a number.
        """
        if not all(bool(parameter.isfinite().all()) for parameter in self.trained):
            raise self._not_finite("finite trained weights, got others")

    def _not_finite(self, expected: str) -> InputError:
        return InputError(
            f"distill: step {self.state.global_step}: expected {expected}; lower the learning_rate, or load the model "
            "with dtype float32 or bfloat16"
        )

    def floating_point_ops(self, inputs: Any) -> int:
        """An estimate that nobody reads, at a walk over all parameters for every step."""
        return 0

    def store_flos(self) -> None:
        """Sums the estimate over the processes, in which a checkpoint that one of them writes cannot take part."""

    def _backward(self, part: Sequence[Text], targets: int) -> Tensor:
        """Add a part's gradients to those of the batch; if it fails, as out of memory, they are as before."""
        before = [None if each.grad is None else each.grad.clone() for each in self.trained]
        try:
            device = input_device(self.model)  # type: ignore[arg-type]
            batch = {name: each.to(device) for name, each in self.layout.batch(part).items()}
            loss = self.summed_loss(**batch) / targets
            self.accelerator.backward(loss)
            return loss.detach()
        except BaseException:
            for parameter, gradient in zip(self.trained, before, strict=True):
                parameter.grad = gradient
            raise

    def _added_up(self, loss: Tensor, failed: Exception | None) -> Tensor:
        """Sum the gradients and the loss over all processes, in one exchange, which tells of failures too.

        Raises:
            InputError: another process failed; or this one's own error.
        """
        for parameter in self.trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self.trained if parameter.grad is not None]
        device = gradients[0].device
        flat = [each.reshape(-1).to(device) for each in (loss, *gradients)]
        together = torch.cat([*flat, flat[0].new_tensor([failed is not None])])
        dist.all_reduce(together)
        if failed is not None:
            raise failed
        if together[-1]:
            raise InputError(
                f"distill: step {self.state.global_step + 1}: another process failed in its share of the batch, and "
                "says why"
            )
        parts = together[:-1].split([each.numel() for each in flat])
        for gradient, part in zip(gradients, parts[1:], strict=True):
            gradient.copy_(part.view_as(gradient))
        return parts[0][0]

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """By the main process alone, and sealed."""
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        with failing_together():
            if is_main():
                self.check_weights()
                try:
                    super()._save_checkpoint(*args, **kwargs)
                    seal(folder)
                except (RuntimeError, SafetensorError, OSError) as error:  # a full disk, in torch's words and others'
                    shutil.rmtree(folder, ignore_errors=True)
                    reason = str(error).strip().partition("\n")[0]
                    raise OSError(f"{folder}: the checkpoint could not be written ({reason})") from error


class _Order(Sampler[int]):
    """A permutation of its own for every epoch, which the step that the training is at tells."""

    def __init__(self, trainer: _Trainer, count: int) -> None:
        self.trainer = trainer
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        recipe = self.trainer.recipe
        epoch = self.trainer.state.global_step // math.ceil(self.count / recipe.batch_size)
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(recipe.seed + epoch))
        yield from order.tolist()


class _Progress(TrainerCallback):
    def __init__(self, label: str, show: bool) -> None:
        self.label = label
        self.show = show

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = bar(total=state.max_steps, done=state.global_step, label=self.label, unit="steps", show=self.show)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=logs["loss"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Whose random numbers Trainer keeps in a checkpoint."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def _set_aside() -> Iterator[None]:
    """Trainer begins by collecting garbage, which takes a third of a second if it looks at what the libraries hold."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
