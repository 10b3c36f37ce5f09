"""What a task is: where its examples come from, what counts as correct, how an answer is matched."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from spd.example import Example

Metric = Literal["accuracy", "nll"]
AnswerBy = Literal["generation", "likelihood"]


@dataclass(frozen=True)
class Question:
    """One evaluation item: the prompt a model completes and the reference that `Task.is_correct` compares with.

    `group` is the sub-task or subject it belongs to, where a data set has such. `options` are the completions to choose
    among, where there are such, as they stand behind the prompt (" A", " B"): an answer by likelihood is one of them.
    """

    prompt: str
    reference: str
    group: str = ""
    options: tuple[str, ...] = ()


class Task(ABC):
    """A capability and three uses of its records: calibration, training prompts, test.

    Test questions are never among the other two; calibration examples may be (the paper takes both from the training
    split). Every method returns items in a fixed order, so that a limit is a prefix and a record keeps its index.
    """

    name: str
    """Registry name, also the file name of the task's results."""
    max_new_tokens: int = 256
    """Length of a completion, in tokens (the paper: 256)."""
    calibration_size: int = 50
    """Default number of calibration examples (the paper: 50 for maths and code, 500 for multiple choice)."""
    test_size: int | None = None
    """Default number of test questions (None: all)."""
    stop: tuple[str, ...] = ()
    """A completion ends before the first of these strings, for models that run on into a next question."""
    metric: Metric = "accuracy"
    """What the task is judged by: the share of right completions, or the reference's NLL a token."""
    judges_completions: bool = True
    """Whether a completion counts for anything. If not, `spd.evaluate` generates none."""
    runs_code: bool = False
    """Whether judging a completion executes it. `spd.evaluate` then asks for consent."""

    @abstractmethod
    def calibration(self) -> list[Example]:
        """Labelled examples with correctness-defining spans."""

    @abstractmethod
    def training_prompts(self) -> list[str]:
        """Prompts the model completes by itself to make its training set; no label is used."""

    @abstractmethod
    def test(self) -> list[Question]:
        """Held-out questions."""

    @abstractmethod
    def is_correct(self, completion: str, question: Question) -> bool:
        """Whether a completion (already cut at `stop`) answers the question."""

    def judge(self, completions: Sequence[str], questions: Sequence[Question]) -> list[bool | None]:
        """`is_correct` for many at once; None where a question has no right or wrong and is left out of the count."""
        return [self.is_correct(each, question) for each, question in zip(completions, questions, strict=True)]
