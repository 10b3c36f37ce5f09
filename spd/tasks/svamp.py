"""SVAMP (Patel et al. 2021): one-step word problems with varied wording; in the paper the sibling of GSM8K.

S is the number after `####` in the reference made from the record's equation and answer. The test is the first 100
questions, as published.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from spd.example import Example
from spd.tasks.base import Question, Task
from spd.tasks.numeric import marked_span, same_number
from spd.tasks.records import load_records


class SVAMP(Task):
    name = "svamp"
    test_size = 100
    stop = ("\nQuestion:",)

    def __init__(self, data: str | Path | None = None) -> None:
        self._data = data

    def calibration(self) -> list[Example]:
        examples = []
        for record in self._train:
            prompt, completion = _prompt(record), f" {record['Equation']} = {record['Answer']}\n#### {record['Answer']}"
            span = marked_span(prompt + completion)
            examples.append(Example(prompt, completion, [span] if span else []))
        return examples

    def training_prompts(self) -> list[str]:
        return [_prompt(record) for record in self._train]

    def test(self) -> list[Question]:
        return [Question(_prompt(record), f"#### {record['Answer']}") for record in self._load("test")]

    def is_correct(self, completion: str, question: Question) -> bool:
        return same_number(completion, question.reference)

    @cached_property
    def _train(self) -> list[dict[str, Any]]:
        return self._load("train")

    def _load(self, split: str) -> list[dict[str, Any]]:
        fields = ("Body", "Question", "Equation", "Answer")
        return load_records("svamp", split, fields, data=self._data, hub=("ChilleD/SVAMP", None))


def _prompt(record: dict[str, Any]) -> str:
    body = record["Body"].strip()
    if body and body[-1] not in ".!?,":
        body += "."
    return f"Question: {body} {record['Question'].strip()}\nAnswer:"
