"""Tasks by name. A task's own file says what its prompts, spans and answers are."""

from __future__ import annotations

import difflib
from pathlib import Path

from spd.errors import InputError
from spd.tasks.base import Question, Task
from spd.tasks.gsm8k import GSM8K
from spd.tasks.svamp import SVAMP
from spd.tasks.word_problems import WordProblems

__all__ = ["Question", "Task", "load_task", "task_names"]

DATA_SETS: dict[str, type[WordProblems]] = {"gsm8k": GSM8K, "svamp": SVAMP}


def load_task(name: str, data: str | Path | None = None) -> Task:
    """A task by name; `data` is a folder of local records (`NAME/SPLIT.jsonl`) in place of the hub.

    Raises:
        InputError: no such task (the near one is suggested) or no such folder.
    """
    from spd.proving_ground import TASKS

    if data is not None and not Path(data).is_dir():
        raise InputError(f"data: {data} is not a folder")
    if name in TASKS:
        return TASKS[name]
    if name in DATA_SETS:
        return DATA_SETS[name](data)
    near = difflib.get_close_matches(name, task_names(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(f"task: there is no {name!r}, only {', '.join(task_names())}{hint}")


def task_names() -> list[str]:
    from spd.proving_ground import TASKS

    return [*DATA_SETS, *TASKS]
