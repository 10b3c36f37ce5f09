"""Greedy decoding of a task's test questions, in batches, scored by the task."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from torch import nn
from transformers import PreTrainedTokenizerBase

from spd.errors import InputError
from spd.files import write_text
from spd.generation import generate, without_room
from spd.likelihood import completion_nll, some
from spd.stats import mean_interval, wilson_interval
from spd.tasks.base import Metric, Question, Task


@dataclass(frozen=True)
class Answer:
    """One test question, what the model said, and whether that is right (None: it is not that kind of question).

    `nll` is the reference's negative log-likelihood a token in nats, where the task is judged by that.
    """

    prompt: str
    reference: str
    completion: str
    correct: bool | None
    group: str = ""
    nll: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """A task's score: `accuracy` with its 95 % Wilson interval over the `n` questions that were judged.

    Args:
        task: name of the task.
        answers: in the order of the questions.
        too_long: positions of questions that leave the model no room for an answer; they are not among the answers.
        metric: what the task is judged by, which `value` and `value_interval` give.
    """

    task: str
    answers: Sequence[Answer]
    too_long: Sequence[int] = ()
    metric: Metric = "accuracy"

    @property
    def n(self) -> int:
        return sum(answer.correct is not None for answer in self.answers)

    @property
    def correct(self) -> int:
        return sum(bool(answer.correct) for answer in self.answers)

    @property
    def accuracy(self) -> float:
        return self.correct / self.n if self.n else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.correct, self.n)

    @property
    def nlls(self) -> list[float]:
        return [answer.nll for answer in self.answers if answer.nll is not None]

    @property
    def value(self) -> float:
        """The accuracy, or the mean over the references of their negative log-likelihood a token."""
        return self.accuracy if self.metric == "accuracy" else fmean(self.nlls)

    @property
    def value_interval(self) -> tuple[float, float]:
        """95 %: Wilson's, or Student's t over the references."""
        return self.interval if self.metric == "accuracy" else _mean_interval(self.nlls)

    def by_group(self) -> dict[str, tuple[int, int]]:
        """Right answers and questions of every sub-task or subject."""
        groups: dict[str, tuple[int, int]] = {}
        for answer in self.answers:
            if answer.group and answer.correct is not None:
                correct, n = groups.get(answer.group, (0, 0))
                groups[answer.group] = correct + answer.correct, n + 1
        return groups

    def to_dict(self) -> dict[str, object]:
        low, high = self.interval
        found: dict[str, object] = {
            "task": self.task,
            "n": self.n,
            "correct": self.correct,
            "accuracy": self.accuracy if self.n else None,
            "interval_95": [low, high],
        }
        if self.metric == "nll":
            found |= {"nll": self.value, "nll_interval_95": list(self.value_interval), "nll_n": len(self.nlls)}
        if groups := self.by_group():
            found["groups"] = {name: {"correct": correct, "n": n} for name, (correct, n) in groups.items()}
        if self.too_long:
            found["too_long"] = list(self.too_long)
        return found


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
    run_generated_code: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Decode greedily and score.

    Questions that leave the model no room for an answer are left out, counted and named: in a warning and in
    `Evaluation.too_long`.

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
        run_generated_code: consent to execute what the model writes, in `spd.sandbox`, for tasks that are judged so.
        progress: show it.

    Raises:
        InputError: unusable arguments, a task that runs code without consent, or no question that fits the model.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit: expected a positive number of test questions, got {limit}")
    check_consent([task], run_generated_code)
    max_new_tokens = max_new_tokens or task.max_new_tokens
    questions = task.test()[: limit or task.test_size]
    too_long = _too_long(model, tokenizer, task, questions, max_new_tokens)
    if len(too_long) == len(questions):
        raise InputError(f"task: none of the {len(questions)} questions of {task.name} fits the model's positions")
    if too_long:
        warnings.warn(
            f"evaluate: {len(too_long)} of {len(questions)} questions of {task.name} are too long for the model "
            f"with {max_new_tokens} new tokens and are left out: {some(too_long)}",
            stacklevel=2,
        )
        dropped = set(too_long)
        questions = [question for index, question in enumerate(questions) if index not in dropped]

    label = label or f"evaluate {task.name}"
    generations = generate(
        model,
        tokenizer,
        [question.prompt for question in questions],
        out=out,
        temperature=0.0,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        tag=tag,
        label=label,
        progress=progress,
    )
    if task.runs_code:
        _say_what_is_not_enforced()
    verdicts = task.judge([_cut(task, generation.completion) for generation in generations], questions)
    nlls: list[float | None] = [None] * len(questions)
    if task.metric == "nll":
        pairs = [(question.prompt, question.reference) for question in questions]
        # in batches of its own size, not of this one's: logits take much room
        scored = completion_nll(model, tokenizer, pairs, label=label, progress=progress)
        nlls = [text.per_token for text in scored]
    answers = [
        Answer(question.prompt, question.reference, generation.completion, verdict, question.group, nll)
        for question, generation, verdict, nll in zip(questions, generations, verdicts, nlls, strict=True)
    ]
    if out is not None:
        lines = (json.dumps(asdict(answer)) + "\n" for answer in answers)
        write_text(Path(out).with_suffix(".scored.jsonl"), "".join(lines))
    return Evaluation(task.name, answers, too_long, task.metric)


def check_consent(tasks: Sequence[Task], run_generated_code: bool) -> None:
    """Refuse tasks that would execute generated code, before any time is spent on them."""
    names = [task.name for task in tasks if task.runs_code]
    if names and not run_generated_code:
        raise InputError(
            f"task: {', '.join(names)} is judged by running the code that the model writes; "
            "consent with --run-generated-code (run_generated_code=True), best inside a container"
        )


def _say_what_is_not_enforced() -> None:
    from spd.sandbox import enforcement

    missing = [measure.name for measure in enforcement() if not measure.enforced]
    if missing:
        warnings.warn(
            f"evaluate: generated code is run, and this machine does not enforce: {', '.join(missing)}", stacklevel=3
        )


def _too_long(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, questions: Sequence[Question], max_new_tokens: int
) -> list[int]:
    found = set(without_room(model, tokenizer, [question.prompt for question in questions], max_new_tokens))
    if task.metric == "nll":
        found |= set(without_room(model, tokenizer, [each.prompt + each.reference for each in questions], 0))
    return sorted(found)


def _cut(task: Task, completion: str) -> str:
    for stop in task.stop:
        completion = completion.split(stop, 1)[0]
    return completion


def _mean_interval(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    _, low, high = mean_interval(values)
    return low, high
