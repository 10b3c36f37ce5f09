"""Tasks of the user's own by name: JSON Lines, or a class.

A class says where its items come from and what is correct; `--task my_tasks:Sums` finds this one in `my_tasks.py`:

    class Sums(Task):                                  # from spd.tasks.base import Question, Task
        name = "sums"
        max_new_tokens = 8
        def calibration(self):                         # the spans are the characters of the answer, after the blank
            return [Example(f"{n} + 1 =", f" {n + 1}", mark("answer", f"{n} + 1 =", f" {n + 1}")) for n in range(50)]
        def training_prompts(self):                    # from spd import Example
            return [f"{n} + 1 =" for n in range(150)]  # from spd.tasks.markers import mark
        def test(self):                                # from spd.tasks.numeric import same_number
            return [Question(f"{n} + 1 =", str(n + 1)) for n in range(150, 200)]
        def is_correct(self, completion, question):
            return same_number(completion, question.reference)
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from pathlib import Path
from typing import Any

from spd.errors import InputError, near
from spd.example import Example
from spd.tasks.base import Task
from spd.tasks.jsonl import SETTINGS, JsonlTask, unusable_name
from spd.tasks.markers import remark


def load_custom(name: str, data: str | Path | None = None) -> Task | None:
    """A task of the user's own, or None where the name is of another kind.

    Args:
        name: a file that ends in `.jsonl`; a folder that holds `train.jsonl`, `test.jsonl` or `task.toml`; both also
            below `data`. Or `package.module:Name`, an object of a subclass of `Task`, or the subclass, which is called
            without arguments, or with `data` if it has such an argument. Modules are also looked for in the working
            folder, after the installed ones.
        data: folder of local records.

    Raises:
        InputError: no such file, module or name there, or what it names is no task.
    """
    if re.fullmatch(r"[\w.]+:[\w.]+", name):
        module, _, path = name.partition(":")
        return _imported(module, path, data)
    places = [Path(name)] + ([Path(data) / name] if data is not None else [])
    for place in places:
        folder = any(os.path.isfile(place / file) for file in ("train.jsonl", "test.jsonl", SETTINGS))
        if folder or (name.endswith(".jsonl") and os.path.isfile(place)):
            return JsonlTask(place)
    if name.endswith(".jsonl"):
        raise InputError(f"task: there is no file {' or '.join(map(str, places))}")
    return None


def calibration_by_rule(task: Task, rule: str) -> list[Example]:
    """A task's calibration examples with the spans of a rule of `spd.tasks.markers`, had they others or none."""
    from spd.tasks.chat import ChatTask

    if isinstance(task, ChatTask):
        return [task.inside(example) for example in calibration_by_rule(task.task, rule)]
    return remark(rule, task.unmarked() if isinstance(task, JsonlTask) else task.calibration())


def _imported(module: str, path: str, data: str | Path | None) -> Task:
    found = _module(module)
    for part in path.split("."):
        if not hasattr(found, part):
            public = [each for each in dir(found) if not each.startswith("_")]
            raise InputError(f"task: there is no {part!r} in {module}{near(part, public)}")
        found = getattr(found, part)
    given = f"{module}:{path}"
    if inspect.isclass(found):
        found = _instance(given, found, data)
    if not isinstance(found, Task):
        raise InputError(f"task: {given} is no spd.tasks.base.Task but of type {type(found).__name__}")
    if not isinstance(getattr(found, "name", None), str):
        raise InputError(f"task: {given} has no name; give it one that its files can have, such as {path.lower()!r}")
    if problem := unusable_name(found.name):
        raise InputError(f"task: {given}: name: {problem}")
    return found


def _module(name: str) -> Any:
    here = str(Path.cwd())
    if "" not in sys.path and here not in sys.path:
        sys.path.append(here)  # where `python -m` looks too, while an installed command does not
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise InputError(f"task: there is no module {error.name!r}, here or among the installed ones") from None
        raise InputError(f"task: {name} could not be imported ({error})") from error
    except Exception as error:  # whatever a module of the user's own may raise
        raise InputError(f"task: {name} could not be imported ({type(error).__name__}: {error})") from error


def _instance(given: str, kind: type, data: str | Path | None) -> Any:
    if not issubclass(kind, Task):
        raise InputError(f"task: {given} is no subclass of spd.tasks.base.Task")
    if missing := sorted(getattr(kind, "__abstractmethods__", ())):
        raise InputError(f"task: {given} lacks {', '.join(missing)}")
    parameters = inspect.signature(kind).parameters
    arguments = {"data": data} if "data" in parameters else {}
    try:
        inspect.signature(kind).bind(**arguments)
    except TypeError as error:
        raise InputError(f"task: {given} is called without arguments, or with data alone, but {error}") from None
    return kind(**arguments)
