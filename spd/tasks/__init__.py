"""Tasks by name. A task's own file says what its prompts, spans and answers are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from spd.errors import InputError, near
from spd.tasks.base import Question, Task
from spd.tasks.bbh import BBH, SUBTASKS
from spd.tasks.codealpaca import CodeAlpaca
from spd.tasks.custom import load_custom
from spd.tasks.data_set import DataSet
from spd.tasks.gsm8k import GSM8K
from spd.tasks.mbpp import MBPP
from spd.tasks.mmlu import MMLU
from spd.tasks.svamp import SVAMP

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Question", "Task", "load_task", "task_names"]

DATA_SETS: dict[str, type[DataSet]] = {
    "gsm8k": GSM8K,
    "svamp": SVAMP,
    "mbpp": MBPP,
    "codealpaca": CodeAlpaca,
    "mmlu": MMLU,
    "bbh": BBH,
}
PROMPTS = ("plain", "chat", "harness")


def load_task(
    name: str,
    data: str | Path | None = None,
    *,
    prompts: Literal["plain", "chat", "harness"] | str = "plain",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Task:
    """A task by name.

    Args:
        name: a data set, `bbh-SUBTASK` for one of BBH's, a capability of the proving ground, or a task of the user's
            own: a JSON Lines file, a folder of them, or `package.module:Name` (see `spd.tasks.custom`).
        data: a folder of local records (`NAME/SPLIT.jsonl`) in place of the hub.
        prompts: how a question is asked: "plain"; "chat", every prompt inside the tokenizer's chat template; or
            "harness", test questions as lm-evaluation-harness asks them: its layout, its number of shots, and its shots
            where they come from the records.
        tokenizer: with "chat", whose template is used.

    Raises:
        InputError: no such task (the near one is suggested), no such folder, harness prompts for a task that the
            harness does not have, or chat prompts without a tokenizer or template.
    """
    if data is not None and not os.path.isdir(data):
        raise InputError(f"data: {data} is not a folder")
    if prompts not in PROMPTS:
        raise InputError(f"prompts: expected one of {', '.join(PROMPTS)}, got {prompts!r}")
    if prompts == "chat":
        from spd.tasks.chat import ChatTask

        if tokenizer is None:
            raise InputError("tokenizer: chat prompts need one, whose template they take, got None")
        return ChatTask(load_task(name, data), tokenizer)
    task = _find(name, data, prompts)
    if prompts == "harness" and not isinstance(task, DataSet):
        raise InputError(f"prompts: lm-evaluation-harness does not have {name}, so it cannot be asked in its way")
    return task


def _find(name: str, data: str | Path | None, prompts: str) -> Task:
    from spd.proving_ground import STEERING, TASKS

    generated: dict[str, Task] = {**TASKS, **STEERING}
    if name in generated:
        return generated[name]
    if name in DATA_SETS:
        return DATA_SETS[name](data, prompts=prompts)
    if name.startswith("bbh-") and name.removeprefix("bbh-") in SUBTASKS:
        return BBH(data, prompts=prompts, subtask=name.removeprefix("bbh-"))
    if (own := load_custom(name, data)) is not None:
        return own
    short = [*DATA_SETS, "bbh-SUBTASK", *TASKS]
    raise InputError(
        f"task: there is no {name!r}, only {', '.join(short)}, a JSON Lines file or folder, or package.module:Name"
        f"{near(name, task_names())}"
    )


def task_names() -> list[str]:
    from spd.proving_ground import TASKS

    return [*DATA_SETS, *(f"bbh-{subtask}" for subtask in SUBTASKS), *TASKS]
