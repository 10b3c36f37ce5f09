"""What the tasks on published data sets have in common: from records to examples, training prompts and questions."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

from spd.errors import InputError
from spd.example import Example
from spd.tasks.base import Question, Task
from spd.tasks.records import Record

Prompts = Literal["plain", "harness"] | str


class DataSet(Task):
    """A task on the records of a data set. A subclass loads them and lays one out.

    Args:
        data: folder of local records (`NAME/SPLIT.jsonl`); None loads from the hub.
        prompts: how test questions are asked: "plain", or "harness", with the layout and the shots of
            lm-evaluation-harness (`spd/tasks/harness.py`). Calibration and training prompts are plain either way.

    Raises:
        InputError: harness prompts for a data set that the harness does not have.
    """

    harness_stop: ClassVar[tuple[str, ...] | None]
    """Where a completion of a harness prompt ends; None for a data set that the harness does not have."""

    def __init__(self, data: str | Path | None = None, *, prompts: Prompts = "plain") -> None:
        self._data, self._prompts = data, prompts
        if prompts == "harness":
            if self.harness_stop is None:
                raise InputError(
                    f"prompts: lm-evaluation-harness does not have {self.name}, so only 'plain' is possible"
                )
            self.stop = self.harness_stop

    @abstractmethod
    def training_records(self) -> list[Record]:
        """Records for calibration and training prompts."""

    @abstractmethod
    def test_records(self) -> list[Record]:
        """Records of the test questions."""

    @abstractmethod
    def prompt(self, record: Record) -> str:
        """The record, ready to be completed."""

    @abstractmethod
    def example(self, record: Record) -> Example:
        """The record with its reference completion and spans."""

    @abstractmethod
    def question(self, record: Record, prompt: str) -> Question:
        """The record as a question, asked with this prompt."""

    def harness_prompts(self, records: list[Record]) -> list[str]:
        """The records as lm-evaluation-harness would ask them."""
        raise NotImplementedError

    def calibration(self) -> list[Example]:
        return [self.example(record) for record in self._training]

    def training_prompts(self) -> list[str]:
        return [self.prompt(record) for record in self._training]

    def test(self) -> list[Question]:
        records = self._test
        prompts = self.harness_prompts(records) if self._prompts == "harness" else map(self.prompt, records)
        return [self.question(record, prompt) for record, prompt in zip(records, prompts, strict=True)]

    @cached_property
    def _training(self) -> list[Record]:
        return self.training_records()

    @cached_property
    def _test(self) -> list[Record]:
        return self.test_records()
