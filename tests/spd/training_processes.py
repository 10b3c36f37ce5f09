"""`python training_processes.py FOLDER`: trainings by several processes at once, each process's results in a file.

The processes are forked, so that the libraries are imported once; they meet in a file. FOLDER holds a checkpoint and
`generations.json`; what rank R of N returned from JOB goes to FOLDER/JOB-N-R.json.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from forked import carry_out, meet

import spd
from spd import distributed
from spd.training import trainer
from spd.training.loss import SummedLoss

FOLDER = Path(sys.argv[1]) if __name__ == "__main__" else Path()
RECIPE = spd.Recipe(epochs=2, batch_size=4, learning_rate=5e-3, lora_dropout=0.0)

DROPPING = replace(RECIPE, lora_dropout=0.3)


def generations() -> list[spd.Generation]:
    return [spd.Generation(*each) for each in json.loads((FOLDER / "generations.json").read_text())]


def trained(name: str, given: list[spd.Generation] | None = None, recipe: spd.Recipe = RECIPE) -> str:
    """The folder's name, or the error."""
    model, tokenizer = spd.load_model(FOLDER)
    try:
        return spd.distill(
            model, tokenizer, given or generations(), out=FOLDER / name, recipe=recipe, progress=False
        ).name
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def plain() -> str:
    return trained(f"plain-{distributed.size()}")


def one_text_a_step() -> str:
    """Batches of two, so that one of three processes has none."""
    return trained(f"small-{distributed.size()}", generations()[:7], replace(RECIPE, batch_size=2))


def with_dropout() -> str:
    return trained("dropout", recipe=DROPPING)


def with_dropout_and_a_pause() -> str:
    interrupted("paused", 5, DROPPING)
    return trained("paused", recipe=DROPPING)


def interrupted(name: str, at: int, recipe: spd.Recipe = RECIPE) -> str:
    class Pull(trainer._Progress):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_end(args, state, control)
            if state.global_step == at:
                raise ValueError("pulled")

    before, trainer._Progress = trainer._Progress, Pull  # type: ignore[misc]
    try:
        return trained(name, recipe=recipe)
    finally:
        trainer._Progress = before  # type: ignore[misc]


def moved() -> str:
    """Begun by three processes, gone on with by two, ended by one."""
    size = distributed.size()
    return trained("moved") if size == 1 else interrupted("moved", {3: 5, 2: 7}[size])


def other_texts() -> str:
    return trained("refused", generations()[distributed.rank() :])


def no_texts_in_one() -> str:
    model, tokenizer = spd.load_model(FOLDER)
    given = generations() if distributed.rank() else []
    try:
        return str(spd.distill(model, tokenizer, given, out=FOLDER / "refused", progress=False))
    except spd.InputError as error:
        return str(error)


def one_without_memory() -> str:
    """From the third step on, rank 1 has memory for not even one text."""
    if distributed.rank() == 0:
        return trained("without")
    before, calls = SummedLoss.__call__, 0

    def call(self: SummedLoss, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return before(self, *args, **kwargs)

    SummedLoss.__call__ = call  # type: ignore[method-assign]
    try:
        return trained("without")
    finally:
        SummedLoss.__call__ = before  # type: ignore[method-assign]


JOBS: list[tuple[Callable[[], str], tuple[int, ...]]] = [
    (moved, (3, 2, 1)),
    (plain, (3, 2, 1)),
    (one_text_a_step, (3, 1)),
    (with_dropout, (2,)),
    (with_dropout_and_a_pause, (2,)),
    (other_texts, (2,)),
    (no_texts_in_one, (2,)),
    (one_without_memory, (2,)),
]


def run(size: int, number: int) -> None:
    """Every job of so many processes, in this one."""
    torch.set_num_threads(1)
    trainer.CHECKPOINT_STEPS = 3
    if size > 1:
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number)}
        os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}  # as torchrun says it to accelerate
    meet(FOLDER, size, number)
    for job, sizes in JOBS:
        if size in sizes:
            (FOLDER / f"{job.__name__}-{size}-{number}.json").write_text(json.dumps(job()))
    distributed.leave()


if __name__ == "__main__":
    sys.exit(carry_out(run, (3, 2, 1), seconds=90))
