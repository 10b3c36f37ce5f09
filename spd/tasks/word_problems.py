"""Word problems whose worked answers end in `#### n`: what GSM8K and SVAMP have in common.

S is the number after `####`. Training prompts are the whole training split, the test is its first 100 questions, as
published. Answers are compared by value.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from spd.errors import InputError
from spd.example import Example
from spd.tasks.base import Question, Task
from spd.tasks.numeric import marked_span, same_number
from spd.tasks.records import load_records


class WordProblems(Task):
    """A data set of word problems: a subclass names its records and turns one into a prompt and a worked answer."""

    test_size = 100
    stop = ("\nQuestion:",)
    hub: ClassVar[tuple[str, str | None]]
    """Repository and configuration on the hub."""
    fields: ClassVar[Mapping[str, tuple[type, ...]]]
    """What a record carries, and the types it may have."""

    def __init__(self, data: str | Path | None = None) -> None:
        self._data = data

    @abstractmethod
    def prompt(self, record: dict[str, Any]) -> str:
        """The problem, ready to be completed."""

    @abstractmethod
    def worked_answer(self, record: dict[str, Any]) -> str:
        """The reference, ending in `#### n`."""

    def calibration(self) -> list[Example]:
        return [self._example(record) for record in self._train]

    def training_prompts(self) -> list[str]:
        return [self.prompt(record) for record in self._train]

    def test(self) -> list[Question]:
        return [Question(self.prompt(record), self.worked_answer(record)) for record in self._load("test")]

    def is_correct(self, completion: str, question: Question) -> bool:
        return same_number(completion, question.reference)

    @cached_property
    def _train(self) -> list[dict[str, Any]]:
        return self._load("train")

    def _load(self, split: str) -> list[dict[str, Any]]:
        return load_records(self.name, split, self.fields, data=self._data, hub=self.hub)

    def _example(self, record: dict[str, Any]) -> Example:
        prompt, answer = self.prompt(record), self.worked_answer(record)
        completion = f" {answer}"
        span = marked_span(prompt + completion)
        if span is None:
            raise InputError(f"{self.name}: an answer does not end in '#### n': {answer[-60:]!r}")
        return Example(prompt, completion, [span])
