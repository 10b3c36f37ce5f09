"""BIG-Bench Hard (Suzgun et al. 2022): 27 sub-tasks, answered by letters, words, numbers or brackets. S is the answer.

The paper evaluates six sub-tasks with 50 questions each; which six is not known. BBH has no training split. Calibration
examples and training prompts are the records of the chosen sub-tasks from the 51st on, so a test beyond the published
number would meet them again.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from spd.example import Example
from spd.tasks.answers import find_brackets, find_letter, find_number, find_word, find_words
from spd.tasks.base import Question
from spd.tasks.data_set import DataSet, Prompts
from spd.tasks.harness import context, first_shots
from spd.tasks.records import Record, Records, round_robin

SUBTASKS = (
    "boolean_expressions",
    "causal_judgement",
    "date_understanding",
    "disambiguation_qa",
    "dyck_languages",
    "formal_fallacies",
    "geometric_shapes",
    "hyperbaton",
    "logical_deduction_five_objects",
    "logical_deduction_seven_objects",
    "logical_deduction_three_objects",
    "movie_recommendation",
    "multistep_arithmetic_two",
    "navigate",
    "object_counting",
    "penguins_in_a_table",
    "reasoning_about_colored_objects",
    "ruin_names",
    "salient_translation_error_detection",
    "snarks",
    "sports_understanding",
    "temporal_sequences",
    "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects",
    "tracking_shuffled_objects_three_objects",
    "web_of_lies",
    "word_sorting",
)

# The choice is this project's: three sub-tasks with letters, three with words.
PUBLISHED_NUMBER = (
    "boolean_expressions",
    "date_understanding",
    "logical_deduction_three_objects",
    "navigate",
    "reasoning_about_colored_objects",
    "sports_understanding",
)
EACH = 50

_LETTERS = "ABCDEFGHIJKLMNOPQR"
_PAIRS = (("yes", "no"), ("true", "false"), ("valid", "invalid"))


class BBH(DataSet):
    """All sub-tasks, the published number of questions first; or one of them.

    Harness prompts have its layout (`Q:`, `A:`) and its number of shots, three; but its shots and descriptions are
    texts of its own, so here the shots are the sub-task's last records other than the question, without description.

    Args:
        data: folder of local records (`bbh/SUBTASK.jsonl`); None loads from the hub.
        prompts: "plain", without shots, or "harness".
        subtask: one of `SUBTASKS`; None for all.
    """

    name = "bbh"
    test_size = EACH * len(PUBLISHED_NUMBER)
    stop = ("\nQ:",)
    harness_stop = ("\nQ:", "\n\n")

    def __init__(
        self, data: str | Path | None = None, *, prompts: Prompts = "plain", subtask: str | None = None
    ) -> None:
        super().__init__(data, prompts=prompts)
        self._first = (subtask,) if subtask else PUBLISHED_NUMBER
        self._subtasks = (subtask,) if subtask else SUBTASKS
        if subtask:
            self.name, self.test_size = f"bbh-{subtask}", EACH
        self._of = cache(self._load)

    def training_records(self) -> list[Record]:
        test = {self.prompt(record) for record in self._test_first()}
        records = round_robin(self._of(subtask)[EACH:] for subtask in self._first)
        return [record for record in records if self.prompt(record) not in test]

    def test_records(self) -> list[Record]:
        rest = (self._of(subtask)[EACH * (subtask in self._first) :] for subtask in self._subtasks)
        return [*self._test_first(), *(record for records in rest for record in records)]

    def prompt(self, record: Record) -> str:
        return f"Q: {record['input'].strip()}\nA:"

    def example(self, record: Record) -> Example:
        prompt, target = self.prompt(record), record["target"].strip()
        return Example(prompt, f" {target}", [(len(prompt) + 1, len(prompt) + 1 + len(target))])

    def question(self, record: Record, prompt: str) -> Question:
        return Question(prompt, record["target"].strip(), record["subtask"], _options(record))

    def harness_prompts(self, records: list[Record]) -> list[str]:
        prompts = []
        for record in records:
            others = [other for other in reversed(self._of(record["subtask"])) if other["input"] != record["input"]]
            shots = first_shots(others, 3, f"bbh/{record['subtask']}")
            prompts.append(context([(self.prompt(shot), shot["target"]) for shot in shots], self.prompt(record)))
        return prompts

    def is_correct(self, completion: str, question: Question) -> bool:
        return same_answer(completion, question.reference)

    def _test_first(self) -> list[Record]:
        return round_robin(self._of(subtask)[:EACH] for subtask in self._first)

    def _load(self, subtask: str) -> list[Record]:
        # The harness's copy: lukaemon/bbh is a script, which `datasets` no longer runs.
        hub = ("SaylorTwift/bbh", subtask)
        source = Records("bbh", hub, {"input": (str,), "target": (str,)}, hub_split="test")
        return [{**record, "subtask": subtask} for record in source.load(subtask, self._data)]


def _options(record: Record) -> tuple[str, ...]:
    """The letters that a question lists, or the pair of words that its target is of, in the target's case.

    A letter's closing bracket is left out: what decides is then the last token, and one pass serves all letters.
    """
    if letters := re.findall(r"^\([A-Z](?=\))", record["input"], re.MULTILINE):
        return tuple(f" {letter}" for letter in letters)
    target = record["target"].strip()
    for words in _PAIRS:
        if target.lower() in words:
            return tuple(f" {word.title() if target.istitle() else word}" for word in words)
    return ()


def same_answer(completion: str, target: str) -> bool:
    """Whether a completion gives the target, which says itself what kind of answer is looked for."""
    if re.fullmatch(r"\([A-Z]\)", target):
        return find_letter(completion, _LETTERS) == target[1]
    for words in _PAIRS:
        if target.lower() in words:
            plain = re.sub(r"\bnot (?:deductively )?valid\b", "invalid", completion, flags=re.IGNORECASE)
            return find_word(plain, words) == target.lower()
    if re.fullmatch(r"-?\d+", target):
        return find_number(completion) == int(target)
    if re.fullmatch(r"[()\[\]{}<>\s]+", target):
        return find_brackets(completion) == re.sub(r"\s", "", target)
    return find_words(completion) == find_words(target)
