"""GSM8K (Cobbe et al. 2021): grade-school word problems with worked answers that end in `#### n`.

S is the number after `####`. Training prompts are the whole training split, the test is its first 100 questions, as
published.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from spd.errors import InputError
from spd.example import Example
from spd.tasks.base import Question, Task
from spd.tasks.numeric import marked_span, same_number
from spd.tasks.records import load_records


class GSM8K(Task):
    name = "gsm8k"
    test_size = 100
    stop = ("\nQuestion:",)

    def __init__(self, data: str | Path | None = None) -> None:
        self._data = data

    def calibration(self) -> list[Example]:
        return [self._example(record) for record in self._train]

    def training_prompts(self) -> list[str]:
        return [_prompt(record) for record in self._train]

    def test(self) -> list[Question]:
        return [Question(_prompt(record), record["answer"]) for record in self._load("test")]

    def is_correct(self, completion: str, question: Question) -> bool:
        return same_number(completion, question.reference)

    @cached_property
    def _train(self) -> list[dict[str, Any]]:
        return self._load("train")

    def _load(self, split: str) -> list[dict[str, Any]]:
        return load_records("gsm8k", split, ("question", "answer"), data=self._data, hub=("openai/gsm8k", "main"))

    def _example(self, record: dict[str, Any]) -> Example:
        prompt, completion = _prompt(record), f" {record['answer']}"
        span = marked_span(prompt + completion)
        if span is None:
            raise InputError(f"gsm8k: an answer does not end in '#### n': {record['answer'][-60:]!r}")
        return Example(prompt, completion, [span])


def _prompt(record: dict[str, Any]) -> str:
    return f"Question: {record['question'].strip()}\nAnswer:"
