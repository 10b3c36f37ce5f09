"""Few-shot contexts as lm-evaluation-harness 0.4.13 writes them: description, shots, question, nothing in between.

Its settings that matter here: gsm8k draws 5 shots from the training split, anew for every question; mmlu takes the
first 5 of the subject's dev split; mbpp has three fixed shots, tasks 2 to 4. Layouts are in each task's own file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from random import Random

from spd.errors import InputError
from spd.tasks.records import Record

SEED = 1234
"""The harness's default seed for shots."""


def context(shots: Iterable[tuple[str, str]], prompt: str, *, description: str = "", between: str = " ") -> str:
    """The prompt behind its shots.

    Args:
        shots: prompts and answers.
        prompt: what is asked.
        description: comes first.
        between: stands between a shot's prompt and its answer.
    """
    return description + "".join(f"{asked}{between}{answer}\n\n" for asked, answer in shots) + prompt


def drawn_shots(records: Sequence[Record], count: int, questions: int) -> Iterator[list[Record]]:
    """The harness's default sampler: one random generator for the whole test, asked in the order of the questions."""
    first_shots(records, count, "shots")
    generator = Random(SEED)
    for _ in range(questions):
        yield generator.sample(records, count)


def first_shots(records: Sequence[Record], count: int, of: str) -> Sequence[Record]:
    """The first `count` records.

    Raises:
        InputError: there are fewer.
    """
    if len(records) < count:
        raise InputError(f"prompts: harness prompts need {count} records for {of}, there are {len(records)}")
    return records[:count]
