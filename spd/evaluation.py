"""Greedy decoding of a task's test questions, in batches, scored by the task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from spd.errors import InputError
from spd.files import write_text
from spd.generation import Generation, generate
from spd.stats import wilson_interval
from spd.tasks.base import Question, Task


@dataclass(frozen=True)
class Answer:
    """One test question, what the model said, and whether that is right."""

    prompt: str
    reference: str
    completion: str
    correct: bool


@dataclass(frozen=True)
class Evaluation:
    """A task's score: `accuracy` with its 95 % Wilson interval over `n` questions."""

    task: str
    answers: Sequence[Answer]

    @property
    def n(self) -> int:
        return len(self.answers)

    @property
    def correct(self) -> int:
        return sum(answer.correct for answer in self.answers)

    @property
    def accuracy(self) -> float:
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.correct, self.n)

    def to_dict(self) -> dict[str, object]:
        low, high = self.interval
        return {
            "task": self.task,
            "n": self.n,
            "correct": self.correct,
            "accuracy": self.accuracy,
            "interval_95": [low, high],
        }


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    limit: int | None = None,
    out: str | Path | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    tag: str = "",
    label: str | None = None,
    progress: bool = True,
) -> Evaluation:
    """Decode greedily and score.

    Args:
        model: a causal language model of transformers, with whatever is attached to it.
        tokenizer: its tokenizer.
        task: the task (`spd.load_task(name)`).
        limit: the first so many test questions (default: the task's published number).
        out: JSON Lines file for the completions, resumed like `spd.generate`'s; the scored answers go beside it, in
            the order of the questions (suffix `.scored.jsonl`).
        max_new_tokens: length limit (default: the task's).
        batch_size: questions decoded together.
        tag: see `spd.generate`.
        label: what the progress bar says.
        progress: show it.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit: expected a positive number of test questions, got {limit}")
    questions = task.test()[: limit or task.test_size]
    generations = generate(
        model,
        tokenizer,
        [question.prompt for question in questions],
        out=out,
        temperature=0.0,
        max_new_tokens=max_new_tokens or task.max_new_tokens,
        batch_size=batch_size,
        tag=tag,
        label=label or f"evaluate {task.name}",
        progress=progress,
    )
    pairs = zip(questions, generations, strict=True)
    answers = [_answer(task, question, generation) for question, generation in pairs]
    if out is not None:
        lines = (json.dumps(asdict(answer)) + "\n" for answer in answers)
        write_text(Path(out).with_suffix(".scored.jsonl"), "".join(lines))
    return Evaluation(task.name, answers)


def _answer(task: Task, question: Question, generation: Generation) -> Answer:
    completion = generation.completion
    for stop in task.stop:
        completion = completion.split(stop, 1)[0]
    correct = task.is_correct(completion, question)
    return Answer(question.prompt, question.reference, generation.completion, correct)
