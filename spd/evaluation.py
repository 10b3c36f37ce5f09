"""A task's test questions, answered in batches by greedy decoding or by the likeliest option, scored by the task."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import get_args

from torch import nn
from transformers import PreTrainedTokenizerBase

from spd.determinism import one_thread
from spd.distributed import is_main, join, on_main
from spd.errors import InputError
from spd.files import sha256, write_text
from spd.generation import GROUP, CompletionsFile, Generation, generate, without_room
from spd.intervention.attach import intervention_on
from spd.likelihood import completion_nll, refuse_nan, some
from spd.options import encode_choice, option_nlls
from spd.packed import packed
from spd.progress import bar
from spd.provenance import config_hash, model_name, weights_fingerprint
from spd.stats import mean_interval, wilson_interval
from spd.tasks.base import AnswerBy, Metric, Question, Task


@dataclass(frozen=True)
class Answer:
    """One test question, what the model said, and whether that is right (None: it is not that kind of question).

    The completion is "" where the task judges none, so that none was generated.

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
        answer_by: how the completions came about.
    """

    task: str
    answers: Sequence[Answer]
    too_long: Sequence[int] = ()
    metric: Metric = "accuracy"
    answer_by: AnswerBy = "generation"

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
            "answer_by": self.answer_by,
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
    answer_by: AnswerBy = "generation",
    deterministic: bool = False,
    tag: str = "",
    label: str | None = None,
    run_generated_code: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Answer the test questions and score the answers.

    Questions that leave the model no room for an answer are left out, counted and named: in a warning and in
    `Evaluation.too_long`. Under torchrun every process calls this alike, takes its share, and gets the whole; the main
    one judges and writes.

    Args:
        model: a causal language model of transformers, with whatever is attached to it.
        tokenizer: its tokenizer.
        task: the task (`spd.load_task(name)`).
        limit: the first so many test questions (default: the task's published number).
        out: JSON Lines file for the completions, resumed like `spd.generate`'s; the scored answers go beside it, in
            the order of the questions (suffix `.scored.jsonl`).
        max_new_tokens: length limit of what is generated (default: the task's).
        batch_size: questions answered together; halved where they do not fit in memory.
        answer_by: "generation", greedy; or "likelihood": of the options that a question has (MMLU's and BBH's letters
            and words) the likeliest behind the prompt, in one forward pass a question where the options are single
            tokens, as lm-evaluation-harness answers MMLU. What is right is the task's rule either way.
        deterministic: see `spd.generate`; answers by likelihood, too, come in batches of one size, which must fit.
        tag: see `spd.generate`.
        label: what the progress bar says.
        run_generated_code: consent to execute what the model writes, in `spd.sandbox`, for tasks that are judged so.
        progress: show it.

    Raises:
        InputError: unusable arguments, a task that runs code without consent, no question that fits the model, or
            answers by likelihood to questions without options.
    """
    join()
    if limit is not None and limit < 1:
        raise InputError(f"limit: expected a positive number of test questions, got {limit}")
    if answer_by not in get_args(AnswerBy):
        raise InputError(f"answer_by: expected one of {', '.join(get_args(AnswerBy))}, got {answer_by!r}")
    check_consent([task], run_generated_code)
    max_new_tokens = max_new_tokens or task.max_new_tokens
    questions = task.test()[: limit or task.test_size]
    if answer_by == "likelihood":
        _check_options(task, questions)
    too_long = _too_long(model, tokenizer, task, questions, max_new_tokens, answer_by)
    if len(too_long) == len(questions):
        raise InputError(f"task: none of the {len(questions)} questions of {task.name} fits the model's positions")
    if too_long:
        answers_room = f" with {max_new_tokens} new tokens" if answer_by == "generation" else ""
        _warn(
            f"{len(too_long)} of {len(questions)} questions of {task.name} are too long for the model{answers_room} "
            f"and are left out: {some(too_long)}"
        )
        dropped = set(too_long)
        questions = [question for index, question in enumerate(questions) if index not in dropped]

    label = label or f"evaluate {task.name}"
    out = None if out is None else Path(out)
    nlls: list[float | None] = [None] * len(questions)
    with one_thread() if deterministic else packed(model):
        if answer_by == "likelihood":
            completions = _likeliest(model, tokenizer, questions, out, batch_size, deterministic, tag, label, progress)
        elif task.judges_completions:
            generations = generate(
                model,
                tokenizer,
                [question.prompt for question in questions],
                out=out,
                temperature=0.0,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                stop=task.stop,
                deterministic=deterministic,
                tag=tag,
                label=label,
                progress=progress,
            )
            completions = [generation.completion for generation in generations]
        else:
            completions = [""] * len(questions)
        if task.metric == "nll":
            pairs = [(question.prompt, question.reference) for question in questions]
            # in batches of its own size, not of this one's: logits take much room
            scored = completion_nll(
                model, tokenizer, pairs, deterministic=deterministic, label=label, progress=progress
            )
            nlls = [text.per_token for text in scored]
    if task.runs_code:
        _say_what_is_not_enforced()
    verdicts = on_main(lambda: task.judge([_cut(task, completion) for completion in completions], questions))
    answers = [
        Answer(question.prompt, question.reference, completion, verdict, question.group, nll)
        for question, completion, verdict, nll in zip(questions, completions, verdicts, nlls, strict=True)
    ]
    if out is not None:
        lines = "".join(json.dumps(asdict(answer)) + "\n" for answer in answers)
        scored_file = out.with_suffix(".scored.jsonl")
        on_main(lambda: write_text(scored_file, lines))
    return Evaluation(task.name, answers, too_long, task.metric, answer_by)


def _likeliest(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    out: Path | None,
    batch_size: int,
    deterministic: bool,
    tag: str,
    label: str,
    progress: bool,
) -> list[str]:
    """Of every question's options the one that the model finds likeliest; the first of equals."""
    prompts = [question.prompt for question in questions]
    options = [question.options for question in questions]
    settings = {
        "model": model_name(model),
        "config_sha256": config_hash(model),
        "weights": weights_fingerprint(model),
        "prompts": len(prompts),
        "prompts_sha256": sha256(json.dumps(prompts)),
        "options_sha256": sha256(json.dumps(options)),
        "answer_by": "likelihood",
        "tag": tag,
        **intervention_on(model),
        **({"deterministic": True} if deterministic else {}),
    }
    store = CompletionsFile(out, settings, prompts) if out is not None and is_main() else None
    choices = [encode_choice(tokenizer, *each) for each in zip(prompts, options, strict=True)]
    with ExitStack() as held:
        done = on_main(lambda: held.enter_context(store).done if store else {})
        chosen = {index: generation.completion for index, generation in done.items()}
        shown = held.enter_context(
            bar(total=len(prompts), done=len(chosen), label=label, unit="questions", show=progress)
        )
        size = GROUP if deterministic else batch_size
        for nlls in option_nlls(
            model, choices, done=set(chosen), batch_size=size, deterministic=deterministic, label=label
        ):
            for index, own in nlls.items():
                refuse_nan(model, own, f"question {index}, {prompts[index]!r:.60}")
            fresh = {index: options[index][own.index(min(own))] for index, own in nlls.items() if index not in chosen}
            if store:
                store.append([Generation(index, prompts[index], text, [], True) for index, text in fresh.items()])
            chosen |= fresh
            shown.update(len(fresh))
    return [chosen[index] for index in range(len(prompts))]


def _check_options(task: Task, questions: Sequence[Question]) -> None:
    without = [index for index, question in enumerate(questions) if not question.options]
    if without:
        raise InputError(
            f"answer_by: {len(without)} of {len(questions)} questions of {task.name} have no options whose likelihood "
            f"could be compared ({some(without)}); let the model generate its answers"
        )


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
        _warn(f"generated code is run, and this machine does not enforce: {', '.join(missing)}")


def _warn(message: str) -> None:
    if is_main():
        warnings.warn(f"evaluate: {message}", stacklevel=3)


def _too_long(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    questions: Sequence[Question],
    max_new_tokens: int,
    answer_by: AnswerBy,
) -> list[int]:
    if answer_by == "likelihood":
        texts = [[question.prompt + option for option in question.options] for question in questions]
        found = {index for index, own in enumerate(texts) if without_room(model, tokenizer, own, 0)}
    elif task.judges_completions:
        found = set(without_room(model, tokenizer, [question.prompt for question in questions], max_new_tokens))
    else:
        found = set()
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
