"""CodeAlpaca (Chaudhary 2023): instructions that ask for code, in many languages. CC BY-NC 4.0: no commercial use.

The test is the last 100 records, by the negative log-likelihood of their outputs, as published; calibration examples
and training prompts are the records before. S is the whole output. The parse rate beside it is the share of completions
that parse as Python, among the questions whose own output does.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cached_property

from spd.errors import InputError
from spd.example import Example
from spd.tasks.base import Question
from spd.tasks.data_set import DataSet
from spd.tasks.python_code import extract_code, parses
from spd.tasks.records import Record, Records

TEST = 100


class CodeAlpaca(DataSet):
    name = "codealpaca"
    metric = "nll"
    stop = ("\nInstruction:",)
    harness_stop = None
    records = Records(
        "codealpaca",
        ("sahil2801/CodeAlpaca-20k", None),
        {"instruction": (str,), "input": (str,), "output": (str,)},
        may_be_empty=("input", "output"),
    )

    def training_records(self) -> list[Record]:
        test = {self.prompt(record) for record in self._all[-TEST:]}
        return [record for record in self._all[:-TEST] if self.prompt(record) not in test]

    def test_records(self) -> list[Record]:
        return self._all[-TEST:]

    def prompt(self, record: Record) -> str:
        given = f"Input: {record['input'].strip()}\n" if record["input"].strip() else ""
        return f"Instruction: {record['instruction'].strip()}\n{given}Output:\n"

    def example(self, record: Record) -> Example:
        prompt, output = self.prompt(record), record["output"]
        return Example(prompt, output, [(len(prompt), len(prompt) + len(output))])

    def question(self, record: Record, prompt: str) -> Question:
        return Question(prompt, record["output"])

    def is_correct(self, completion: str, question: Question) -> bool:
        return parses(extract_code(completion))

    def judge(self, completions: Sequence[str], questions: Sequence[Question]) -> list[bool | None]:
        pairs = zip(completions, questions, strict=True)
        return [parses(extract_code(each)) if parses(question.reference) else None for each, question in pairs]

    @cached_property
    def _all(self) -> list[Record]:
        """Those with an output: among 20,000 outputs that a model wrote, one may well be empty."""
        records = self.records.load("train", self._data)
        empty = [number for number, record in enumerate(records, start=1) if not record["output"].strip()]
        if empty and empty[-1] > len(records) - TEST:
            raise InputError(f"codealpaca, record {empty[-1]}: output: is empty, and it is a test question")
        if empty:
            warnings.warn(
                f"codealpaca: {len(empty)} of {len(records)} records have an empty output and are left out: "
                f"{empty[:10]}",
                stacklevel=2,
            )
        return [record for record in records if record["output"].strip()]
