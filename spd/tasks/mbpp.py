"""MBPP (Austin et al. 2021): short Python functions, judged by running `assert`s.

Calibration examples and training prompts are the training and validation splits, the test is the sanitized test split,
as published. S is the `assert` lines that the prompt quotes.
"""

from __future__ import annotations

from collections.abc import Sequence

from spd.example import Example
from spd.tasks.base import Question
from spd.tasks.data_set import DataSet
from spd.tasks.harness import context, first_shots
from spd.tasks.python_code import runnable_code
from spd.tasks.records import Record, Records

_HUB = "google-research-datasets/mbpp"
_FIELDS = {"task_id": (int,), "text": (str,), "code": (str,), "test_list": (list,)}
_ALIASES = {"prompt": "text"}
FULL = Records("mbpp", (_HUB, "full"), _FIELDS, aliases=_ALIASES, key="task_id")
SANITIZED = Records(
    "mbpp_sanitized", (_HUB, "sanitized"), {**_FIELDS, "test_imports": (list,)}, aliases=_ALIASES, key="task_id"
)


class MBPP(DataSet):
    """Judging runs what the model wrote, in `spd.sandbox`.

    Harness prompts have its three shots (tasks 2 to 4, from the split `prompt`) and quote three tests, as it does; the
    questions are still the sanitized ones, where the harness asks the full test split.
    """

    name = "mbpp"
    runs_code = True
    stop = ("\nTask:",)
    harness_stop = ("[DONE]",)

    def training_records(self) -> list[Record]:
        return [
            record for split in ("train", "validation") for record in FULL.load(split, self._data, complaint=_problem)
        ]

    def test_records(self) -> list[Record]:
        return SANITIZED.load("test", self._data, complaint=_problem)

    def prompt(self, record: Record) -> str:
        tests = "\n".join(_asserts(record))
        return f"Task: {record['text'].strip()}\nTests:\n{tests}\nCode:\n"

    def example(self, record: Record) -> Example:
        prompt = self.prompt(record)
        end = len(prompt) - len("\nCode:\n")
        spans = []
        for line in reversed(_asserts(record)):
            spans.append((end - len(line), end))
            end -= len(line) + 1
        return Example(prompt, _code(record), spans[::-1])

    def question(self, record: Record, prompt: str) -> Question:
        return Question(prompt, "\n".join([*record["test_imports"], *_asserts(record)]))

    def harness_prompts(self, records: list[Record]) -> list[str]:
        by_id = {record["task_id"]: record for record in FULL.load("prompt", self._data, complaint=_problem)}
        chosen = first_shots(
            [by_id[number] for number in (2, 3, 4) if number in by_id], 3, "tasks 2 to 4 of mbpp/prompt"
        )
        shots = [(_harness_prompt(shot), f"{shot['code']}\n[DONE]") for shot in chosen]
        return [context(shots, _harness_prompt(record), between="") for record in records]

    def is_correct(self, completion: str, question: Question) -> bool:
        return self.judge([completion], [question]) == [True]

    def judge(self, completions: Sequence[str], questions: Sequence[Question]) -> list[bool | None]:
        from spd.sandbox import run_many

        pairs = zip(completions, questions, strict=True)
        programs = [(runnable_code(completion), question.reference) for completion, question in pairs]
        return [verdict.passed for verdict in run_many(programs, label="run the tests", progress=len(programs) > 1)]


def _harness_prompt(record: Record) -> str:
    tests = "\n".join(record["test_list"][:3])
    return (
        f"You are an expert Python programmer, and here is your task: {record['text']} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def _asserts(record: Record) -> list[str]:
    return [test.strip() for test in record["test_list"]]


def _code(record: Record) -> str:
    return str(record["code"]).replace("\r\n", "\n")


def _problem(record: Record) -> str | None:
    tests = record["test_list"]
    if not tests or not all(isinstance(test, str) and test.strip().startswith("assert") for test in tests):
        return f"test_list: expected assert statements, got {tests!r:.60}"
    if not all(isinstance(line, str) for line in record.get("test_imports", ())):
        return f"test_imports: expected import statements, got {record['test_imports']!r:.60}"
    return None
