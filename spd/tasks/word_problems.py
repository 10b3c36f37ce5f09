"""Word problems whose worked answers end in `#### n`: what GSM8K and SVAMP have in common.

S is the number after `####`. Training prompts are the whole training split, the test is its first 100 questions, as
published. Answers are compared by value.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from spd.example import Example
from spd.tasks.base import Question
from spd.tasks.data_set import DataSet
from spd.tasks.numeric import marked_span, same_number
from spd.tasks.records import Record, Records


class WordProblems(DataSet):
    """A data set of word problems: a subclass names its records and turns one into a prompt and a worked answer."""

    test_size = 100
    stop = ("\nQuestion:",)
    records: ClassVar[Records]

    @abstractmethod
    def worked_answer(self, record: Record) -> str:
        """The reference, ending in `#### n`."""

    def training_records(self) -> list[Record]:
        return self.records.load("train", self._data, complaint=self._complaint)

    def test_records(self) -> list[Record]:
        return self.records.load("test", self._data, complaint=self._complaint)

    def example(self, record: Record) -> Example:
        prompt, completion = self.prompt(record), f" {self.worked_answer(record)}"
        span = marked_span(prompt + completion)
        assert span is not None  # `_complaint` has looked
        return Example(prompt, completion, [span])

    def question(self, record: Record, prompt: str) -> Question:
        return Question(prompt, self.worked_answer(record))

    def is_correct(self, completion: str, question: Question) -> bool:
        return same_number(completion, question.reference)

    def _complaint(self, record: Record) -> str | None:
        answer = self.worked_answer(record)
        return None if marked_span(answer) else f"the answer does not end in '#### n': {answer[-60:]!r}"
