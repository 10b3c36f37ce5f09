"""MMLU (Hendrycks et al. 2021): questions with four options from 57 subjects. S is the letter of the answer.

The paper evaluates 200 test questions and trains on 2000 prompts of the auxiliary training split; which ones is not
known. Here the test goes round the subjects, so that every prefix is spread over them, and the training records are
drawn with a fixed seed. A folder without `auxiliary_train` gives those from `validation`, or else from `dev`, less the
questions that are also in the test split.
"""

from __future__ import annotations

from random import Random

from spd.errors import InputError
from spd.example import Example
from spd.tasks.answers import find_letter
from spd.tasks.base import Question
from spd.tasks.data_set import DataSet
from spd.tasks.harness import context, first_shots
from spd.tasks.records import Record, Records, round_robin

TRAINING = 2000
TRAINING_SPLITS = ("auxiliary_train", "validation", "dev")
LETTERS = "ABCD"
OPTIONS = tuple(f" {letter}" for letter in LETTERS)


class MMLU(DataSet):
    """Harness prompts have the first 5 records of the subject's dev split as shots.

    The harness compares the likelihoods of the four letters; here the model writes its answer unless
    `spd.evaluate(..., answer_by="likelihood")` asks for the letters.
    """

    name = "mmlu"
    calibration_size = 500
    test_size = 200
    stop = ("\nQuestion:",)
    harness_stop = ("\n\n",)
    records = Records(
        "mmlu",
        ("cais/mmlu", "all"),
        {"question": (str,), "subject": (str,), "choices": (list,), "answer": (int,)},
        may_be_empty=("subject",),  # it is in auxiliary_train
    )

    def training_records(self) -> list[Record]:
        there = [split for split in TRAINING_SPLITS if self.records.exists(split, self._data)]
        if not there:
            raise InputError(f"data: {self._data}/mmlu holds none of {', '.join(TRAINING_SPLITS)} (.jsonl)")
        records = self._load(there[0])
        if self.records.exists("test", self._data):
            test = {self.prompt(record) for record in self._test}
            records = [record for record in records if self.prompt(record) not in test]
        return Random(0).sample(records, min(TRAINING, len(records)))

    def test_records(self) -> list[Record]:
        return round_robin(_by_subject(self._load("test")).values())

    def prompt(self, record: Record) -> str:
        return f"Question: {_with_options(record)}"

    def example(self, record: Record) -> Example:
        prompt = self.prompt(record)
        return Example(prompt, f" {_letter(record)}", [(len(prompt) + 1, len(prompt) + 2)])

    def question(self, record: Record, prompt: str) -> Question:
        return Question(prompt, _letter(record), record["subject"], OPTIONS)

    def harness_prompts(self, records: list[Record]) -> list[str]:
        dev = _by_subject(self._load("dev"))
        return [_harness_prompt(record, dev.get(record["subject"], [])) for record in records]

    def is_correct(self, completion: str, question: Question) -> bool:
        return find_letter(completion, LETTERS) == question.reference

    def _load(self, split: str) -> list[Record]:
        return self.records.load(split, self._data, complaint=_problem)


def _with_options(record: Record) -> str:
    options = "".join(f"{letter}. {option}\n" for letter, option in zip(LETTERS, record["choices"], strict=True))
    return f"{record['question'].strip()}\n{options}Answer:"


def _harness_prompt(record: Record, dev: list[Record]) -> str:
    subject = record["subject"].replace("_", " ")
    shots = first_shots(dev, 5, f"{record['subject']} in mmlu/dev")
    return context(
        [(_with_options(shot), _letter(shot)) for shot in shots],
        _with_options(record),
        description=f"The following are multiple choice questions (with answers) about {subject}.\n\n",
    )


def _letter(record: Record) -> str:
    return LETTERS[record["answer"]]


def _by_subject(records: list[Record]) -> dict[str, list[Record]]:
    subjects: dict[str, list[Record]] = {}
    for record in records:
        subjects.setdefault(record["subject"], []).append(record)
    return subjects


def _problem(record: Record) -> str | None:
    choices, answer = record["choices"], record["answer"]
    if len(choices) != 4 or not all(isinstance(choice, str) for choice in choices):
        return f"choices: expected four texts, got {choices!r:.60}"
    if not 0 <= answer <= 3:
        return f"answer: expected 0, 1, 2 or 3, got {answer}"
    return None if choices[answer].strip() else f"choices: the right one, number {answer}, is empty"
