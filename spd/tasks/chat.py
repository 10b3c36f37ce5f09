"""A task asked through the tokenizer's chat template: every prompt becomes the turn of a user, ready to be answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from spd.errors import InputError
from spd.example import Example
from spd.tasks.base import Question, Task
from spd.tasks.markers import Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_STAND_IN = "0-the-prompt-0"  # of no meaning to a template, and without blanks that it might strip


@dataclass(frozen=True)
class ChatQuestion(Question):
    """A question inside the template; `asked` is the one that the task knows."""

    asked: Question = field(kw_only=True)


class ChatTask(Task):
    """The same task with its prompts inside the chat template, in calibration, training and test.

    Judging is the task's own: it sees its own questions. Where the template ends in a blank or a new line, the blanks
    that a completion starts with are dropped, since the model would not write them there. Text that the template opens
    with and the tokenizer adds again (a beginning-of-sequence token) stands there once.

    Args:
        task: the task.
        tokenizer: of the model; its template is used.
        settings: what else the template takes, such as `enable_thinking=False`.

    Raises:
        InputError: the tokenizer has no template, the template fails, or it alters prompts beyond stripping blanks.
    """

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                "tokenizer: it has no chat template; use the prompts as they are, or the tokenizer of a chat model"
            )
        self.task, self._tokenizer, self._settings = task, tokenizer, settings
        for name in Task.__annotations__:
            setattr(self, name, getattr(task, name))

    def calibration(self) -> list[Example]:
        return [self.inside(example) for example in self.task.calibration()]

    def training_prompts(self) -> list[str]:
        return [self._wrapped(prompt) for prompt in self.task.training_prompts()]

    def test(self) -> list[Question]:
        questions: list[Question] = []
        for asked in self.task.test():
            prompt = self._wrapped(asked.prompt)
            options = tuple(_following(prompt, option) for option in asked.options)
            reference = _following(prompt, asked.reference)
            questions.append(ChatQuestion(prompt, reference, asked.group, options, asked=asked))
        return questions

    def is_correct(self, completion: str, question: Question) -> bool:
        return self.task.is_correct(completion, _asked(question))

    def judge(self, completions: Sequence[str], questions: Sequence[Question]) -> list[bool | None]:
        return self.task.judge(completions, [_asked(question) for question in questions])

    def __getattr__(self, name: str) -> Any:
        """What else the task has. `task` itself is missing only while an object is being made."""
        if name == "task":
            raise AttributeError(name)
        return getattr(self.task, name)

    def inside(self, example: Example) -> Example:
        """An example of the task inside the template, its spans where they were."""
        prompt = self._wrapped(example.prompt)
        completion = _following(prompt, example.completion)
        before, after = self._frame
        body = prompt[len(before) : len(prompt) - len(after)]
        start = example.prompt.find(body)
        in_prompt = _moved(example.spans, (start, start + len(body)), len(before))
        in_completion = _moved(example.spans, (len(example.text) - len(completion), len(example.text)), len(prompt))
        return Example(prompt, completion, in_prompt + in_completion)

    def _wrapped(self, prompt: str) -> str:
        before, after = self._frame
        text = self._rendered(prompt)
        body = text[len(before) : len(text) - len(after)]
        stripped = (prompt, prompt.strip(), prompt.lstrip(), prompt.rstrip())
        if text != before + body + after or body not in stripped:
            raise InputError(f"tokenizer: its chat template alters the prompt {prompt!r:.60}, so spans would be lost")
        return text

    @cached_property
    def _frame(self) -> tuple[str, str]:
        """What the template puts before and after a prompt."""
        before, found, after = self._rendered(_STAND_IN).partition(_STAND_IN)
        if not found:
            raise InputError("tokenizer: its chat template leaves out what the user says")
        added = self._added
        if added and self._tokens(before + found + after)[len(added) :][: len(added)] == added:
            raise InputError(f"tokenizer: text in its chat template begins with {self._opening} more than once")
        return before, after

    def _rendered(self, prompt: str) -> str:
        turns = [{"role": "user", "content": prompt}]
        try:
            text = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, **self._settings
            )
        except Exception as error:  # a template may raise anything, and bad settings do
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(f"tokenizer: its chat template fails ({reason})") from error
        return str(text).removeprefix(self._opening)

    @cached_property
    def _opening(self) -> str:
        """The tokens that the tokenizer puts before every text, as a template writes them."""
        return "".join(self._tokenizer.convert_ids_to_tokens(self._added))

    @cached_property
    def _added(self) -> list[int]:
        plain, whole = self._tokens(_STAND_IN, add_special_tokens=False), self._tokens(_STAND_IN)
        return next((whole[:k] for k in range(len(whole)) if whole[k : k + len(plain)] == plain), [])

    def _tokens(self, text: str, **settings: Any) -> list[int]:
        return list(self._tokenizer(text, **settings)["input_ids"])


def _asked(question: Question) -> Question:
    return question.asked if isinstance(question, ChatQuestion) else question


def _following(prompt: str, completion: str) -> str:
    return completion.lstrip() if prompt[-1:].isspace() else completion


def _moved(spans: Sequence[Span], kept: Span, start: int) -> list[Span]:
    """What of the spans lies in the characters `kept`, which now begin at `start`."""
    inside = [(max(first, kept[0]), min(last, kept[1])) for first, last in spans]
    return [(first - kept[0] + start, last - kept[0] + start) for first, last in inside if first < last]
