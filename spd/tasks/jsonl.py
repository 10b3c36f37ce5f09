"""A task made of JSON Lines: prompts with reference completions, and a few lines of TOML."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from spd.errors import InputError, near
from spd.example import Example
from spd.files import numbered_records, read_toml
from spd.tasks.base import Question, Task
from spd.tasks.markers import Span, marker
from spd.tasks.matching import answer_in, check_rule, same_answer

SETTINGS = "task.toml"
REQUIRED = ("prompt", "completion")
LONGEST_NAME = 100
FIELDS = (*REQUIRED, "spans", "id", "group", "options")


class JsonlTask(Task):
    """Records from a file of training records, or from a folder with `train.jsonl`, `test.jsonl` and `task.toml`.

    A record has `prompt` and `completion`, which are joined as they are: a blank between them is part of one of them.
    It may have `spans`, pairs `[start, end]` of characters of the joined text, or pieces of that text, which stand for
    their last occurrence; `id`, unique in its file; `group`, the sub-task that it belongs to; and `options`, the
    completions that an answer by likelihood chooses among. Training records are calibration examples, by prompt and
    completion, and training prompts, by the prompt alone.

    Args:
        path: the file or folder. A folder needs no `task.toml`, and no split that is not asked for.
        settings: keys of `task.toml` (see `Settings`) that go before those there.

    Raises:
        InputError: nothing there, or an unusable setting; once records are asked for, an unusable record, a missing
            split, or test questions that are also training prompts.
    """

    def __init__(self, path: str | Path, **settings: Any) -> None:
        path = Path(path)
        folder = os.path.isdir(path)
        if folder:
            self._files = {split: path / f"{split}.jsonl" for split in ("train", "test")}
            if not any(map(os.path.isfile, self._files.values())):
                raise InputError(f"task: {path} holds neither train.jsonl nor test.jsonl")
        elif os.path.isfile(path):
            self._files = {"train": path}
        else:
            raise InputError(f"task: there is no file or folder {path}")
        chosen = _settings(path / SETTINGS if folder else None, settings)
        self.name = chosen.name or (path.resolve().name if folder else path.stem)
        if problem := unusable_name(self.name):
            raise InputError(f"task: {path}: {problem}; give the task a name, in {SETTINGS} of a folder")
        self.max_new_tokens = chosen.max_new_tokens
        self.calibration_size = chosen.calibration_size
        self.training_size = chosen.training_size
        self.test_size = chosen.test_size
        self.stop = tuple(chosen.stop)
        self.metric = "nll" if chosen.metric == "nll" else "accuracy"
        self.judges_completions = self.metric != "nll"
        self._matching = chosen.metric
        self._rule = chosen.spans

    def calibration(self) -> list[Example]:
        rule = None if self._rule is None else marker(self._rule)
        examples = []
        for record in self._split("train"):
            spans = record.spans
            if spans is None and rule is None:
                raise InputError(
                    f"{record.where}: has no spans, and no rule says where they are; "
                    f'add "spans" to it, or a rule such as spans = "answer" to {SETTINGS}'
                )
            if spans is None and rule is not None:
                spans = rule(record.prompt, record.completion)
            examples.append(Example(record.prompt, record.completion, spans or []))
        if not any(example.spans for example in examples):
            raise InputError(f"{self.name}: spans: nothing is marked in any of the {len(examples)} records")
        return examples

    def unmarked(self) -> list[Example]:
        """The calibration examples without spans, for a rule that is yet to be chosen."""
        return [Example(record.prompt, record.completion) for record in self._split("train")]

    def training_prompts(self) -> list[str]:
        return [record.prompt for record in self._split("train")[: self.training_size]]

    def test(self) -> list[Question]:
        return [Question(each.prompt, each.completion, each.group, each.options) for each in self._split("test")]

    def is_correct(self, completion: str, question: Question) -> bool:
        if self.metric == "nll":
            raise InputError(f"{self.name}: is judged by nll, which calls no completion right or wrong")
        return same_answer(self._matching, completion, question.reference)

    def judge(self, completions: Sequence[str], questions: Sequence[Question]) -> list[bool | None]:
        return [None] * len(questions) if self.metric == "nll" else super().judge(completions, questions)

    def _split(self, split: str) -> list[_Record]:
        if split in self._records:
            return self._records[split]
        if split in self._files:
            raise InputError(f"{self.name}: {self._files[split]} is missing")
        raise InputError(f"{self.name}: a single file has no test split; make a folder of train.jsonl and test.jsonl")

    @cached_property
    def _records(self) -> dict[str, list[_Record]]:
        """Every split that is there, whichever is asked for, so that a bad one is known before time is spent."""
        records = {split: _read(file) for split, file in self._files.items() if os.path.isfile(file)}
        seen = {record.prompt.strip() for record in records.get("train", [])}
        test = records.get("test", [])
        if leaked := [record for record in test if record.prompt.strip() in seen]:
            raise InputError(
                f"{self.name}: {len(leaked)} of {len(test)} test questions are also training prompts; "
                f"the first is {leaked[0].where}: {leaked[0].prompt!r:.80}"
            )
        for record in test:
            if self.metric == "accuracy" and answer_in(self._matching, record.completion) is None:
                raise InputError(
                    f"{record.where}: completion: the metric {self._matching!r} finds no answer in "
                    f"{record.completion[-60:]!r}"
                )
            right = (same_answer(self._matching, option, record.completion) for option in record.options)
            if self.metric == "accuracy" and record.options and not any(right):
                raise InputError(f"{record.where}: options: by the metric {self._matching!r} none of them is right")
        return records


class Settings(BaseModel):
    """The keys of `task.toml`.

    Args:
        name: of the task and of its result files (default: the folder's or the file's).
        spans: rule of `spd.tasks.markers` for records without spans of their own.
        metric: how completions are judged: a rule of `spd.tasks.matching`, or "nll", by the references' negative
            log-likelihood.
        max_new_tokens: length of a completion.
        calibration_size: default number of calibration examples.
        training_size: the first so many training prompts (default: all).
        test_size: default number of test questions (default: all).
        stop: a completion ends before the first of these strings.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str | None = None
    spans: str | None = None
    metric: str = "exact"
    max_new_tokens: int = Field(default=256, ge=1)
    calibration_size: int = Field(default=50, ge=1)
    training_size: int | None = Field(default=None, ge=1)
    test_size: int | None = Field(default=None, ge=1)
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default=[], strict=False)

    @field_validator("name")
    @classmethod
    def _file_name(cls, name: str | None) -> str | None:
        if name is not None and (problem := unusable_name(name)):
            raise ValueError(problem)
        return name

    @field_validator("spans")
    @classmethod
    def _rule(cls, rule: str | None) -> str | None:
        if rule is not None:
            marker(rule)
        return rule

    @field_validator("metric")
    @classmethod
    def _metric(cls, metric: str) -> str:
        if metric != "nll":
            check_rule(metric, besides=["nll"])
        return metric


def unusable_name(name: str) -> str:
    """Why no result can be called so; "" if it can: a name becomes that of files and folders, and is printed."""
    usable = name.isprintable() and not name.startswith(".") and not re.search(r"[/\\]", name)
    if name and usable and len(name.encode()) <= LONGEST_NAME:
        return ""
    return f"expected a name that a file can have, got {name!r:.80} (printable, at most {LONGEST_NAME} bytes)"


def _settings(path: Path | None, given: dict[str, Any]) -> Settings:
    values: dict[str, Any] = {}
    source = "task"
    if path is not None and os.path.isfile(path):
        source, values = str(path), read_toml(path)
    values |= given
    for key in values:
        if key not in Settings.model_fields:
            known = list(Settings.model_fields)
            raise InputError(f"{source}: unknown key {key!r}{near(key, known) or f'; the keys are {known}'}")
    try:
        return Settings(**values)
    except ValidationError as failed:
        problem = failed.errors()[0]
        key, message = ".".join(map(str, problem["loc"])), problem["msg"]
        if problem["type"] == "value_error":  # words of this project, which say what came
            raise InputError(f"{source}: {key}: {message.removeprefix('Value error, ')}") from None
        raise InputError(f"{source}: {key}: {message}, got {problem['input']!r}") from None


@dataclass(frozen=True)
class _Record:
    where: str
    prompt: str
    completion: str
    spans: list[Span] | None
    group: str
    options: tuple[str, ...]


def _read(path: Path) -> list[_Record]:
    records: list[_Record] = []
    first: dict[object, int] = {}
    for number, record in numbered_records(path):
        where = f"{path}, line {number}"
        try:
            records.append(_record(where, record))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        identity = record.get("id")
        if identity is not None and first.setdefault(identity, number) != number:
            raise InputError(f"{path}, lines {first[identity]} and {number}: have the same id {identity!r}")
    if not records:
        raise InputError(f"{path}: holds no record")
    return records


def _record(where: str, record: dict[str, Any]) -> _Record:
    if missing := [field for field in REQUIRED if field not in record]:
        raise InputError(f"{', '.join(missing)} missing; it has {', '.join(record) or 'nothing'}")
    for field in record:
        if field not in FIELDS:
            raise InputError(f"unknown field {field!r}{near(field, FIELDS) or f'; the fields are {list(FIELDS)}'}")
    for field in REQUIRED:
        _check_text(field, record[field])
    for field, types in (("id", (str, int)), ("group", (str,)), ("spans", (list,)), ("options", (list,))):
        if record.get(field) is not None and type(record[field]) not in types:
            expected = " or ".join(each.__name__ for each in types)
            raise InputError(f"{field}: expected {expected}, got {record[field]!r:.60}")
    prompt, completion, spans = record["prompt"], record["completion"], record.get("spans")
    if spans is not None:
        spans = Example(prompt, completion, [_located(prompt + completion, span) for span in spans]).spans
    options = record.get("options") or []
    for option in options:
        _check_text("options", option)
    if record.get("options") is not None and (len(options) < 2 or len(set(options)) < len(options)):
        raise InputError(f"options: expected two or more, no two the same, got {options!r:.60}")
    return _Record(where, prompt, completion, spans, record.get("group") or "", tuple(options))


def _check_text(field: str, text: object) -> None:
    if not isinstance(text, str):
        raise InputError(f"{field}: expected str, got {text!r:.60}")
    if not text.strip():
        raise InputError(f"{field}: is empty")


def _located(text: str, span: Any) -> Any:
    """A piece of the text as a pair; what is no string is left to `Example` to judge."""
    if not isinstance(span, str):
        return span
    start = text.rfind(span)
    if not span or start < 0:
        raise InputError(f"spans: {span!r:.60} does not occur in prompt + completion")
    return start, start + len(span)
