r"""Correctness spans by rule: which characters of a prompt and its reference completion the loss is taken over.

- `answer`: the answer at the end of the completion. The number after the last `####`; else the inside of the last
  `\boxed{}`; else what follows the last "answer is" or "Answer:", to the end of its line; else the last line with text.
- `code`: the insides of the completion's fenced blocks, without the fences; all of a completion without a fence.
- `asserts`: the lines of the prompt that start with `assert`; those of the completion where the prompt has none.
- `completion`: all of it.
- `regex:PATTERN`: every match in the completion. `prompt-regex:PATTERN`: every match in the prompt.

A pattern is one of Python's `re`; `^` and `$` stand at the ends of lines; where it has a group 1, that is marked. It
looks into one of the two texts alone: few-shot prompts hold answers too, and those are not the answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from spd.errors import InputError, near
from spd.example import Example
from spd.tasks.numeric import marked_span

Span = tuple[int, int]
Marker = Callable[[str, str], list[Span]]

_PATTERNS = ("regex", "prompt-regex")
_BLANK = " \t\r\n"
_BRACE = re.compile(r"\\boxed\s*\{|[{}]")
_PHRASE = re.compile(r"####|\banswer is\b:?|\banswer\s*:", re.IGNORECASE)
_REST_OF_LINE = re.compile(r"\s*(\S.*)")
_FENCED = re.compile(r"^[ \t]*(`{3,}|~{3,})[^\n`]*\n(.*?)(?:^[ \t]*\1[`~]*[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_ASSERT = re.compile(r"^[ \t]*(assert\b.*)", re.MULTILINE)


def mark(rule: str, prompt: str, completion: str) -> list[Span]:
    """Character intervals of `prompt + completion`, as `spd.Example` takes them; none where the rule finds nothing.

    Raises:
        InputError: no such rule (the near one is suggested), or a pattern that is no regular expression.
    """
    return marker(rule)(prompt, completion)


def remark(rule: str, examples: Sequence[Example]) -> list[Example]:
    """The same examples with the spans of this rule in place of their own."""
    chosen = marker(rule)
    return [Example(each.prompt, each.completion, chosen(each.prompt, each.completion)) for each in examples]


def marker(rule: str) -> Marker:
    """The rule as a function of prompt and completion; a bad rule is refused here, before there is a text.

    Raises:
        InputError: as `mark`.
    """
    name, colon, pattern = rule.partition(":")
    if name in _RULES and not colon:
        return _RULES[name]
    if name in _PATTERNS and pattern:
        return _pattern_marker(rule, pattern, in_prompt=name == "prompt-regex")
    known = [*_RULES, *(f"{each}:PATTERN" for each in _PATTERNS)]
    raise InputError(f"rule: there is no {rule!r}, only {', '.join(known)}{near(name, known)}")


def _pattern_marker(rule: str, pattern: str, in_prompt: bool) -> Marker:
    try:
        compiled = re.compile(pattern, re.MULTILINE)
    except (re.error, OverflowError) as error:
        raise InputError(f"rule: {rule!r} is no regular expression ({error})") from None
    group = min(compiled.groups, 1)

    def found(prompt: str, completion: str) -> list[Span]:
        matches = compiled.finditer(prompt if in_prompt else completion)
        return _moved((match.span(group) for match in matches), 0 if in_prompt else len(prompt))

    return found


def _answer(prompt: str, completion: str) -> list[Span]:
    found = marked_span(completion) or _boxed(completion) or _after_phrase(completion) or _last_line(completion)
    return _moved([_trimmed(completion, found, _BLANK + "*", _BLANK + "*.,")] if found else [], len(prompt))


def _boxed(text: str) -> Span | None:
    """The last box that is closed, in one pass."""
    found: Span | None = None
    open_braces: list[int | None] = []
    for brace in _BRACE.finditer(text):
        if brace[0] != "}":
            open_braces.append(brace.end() if len(brace[0]) > 1 else None)
        elif open_braces:
            start = open_braces.pop()
            if start is not None and (found is None or start > found[0]):
                found = start, brace.start()
    return found


def _after_phrase(text: str) -> Span | None:
    for phrase in reversed(list(_PHRASE.finditer(text))):
        if rest := _REST_OF_LINE.match(text, phrase.end()):
            return rest.span(1)
    return None


def _last_line(text: str) -> Span | None:
    end = len(text.rstrip())
    return (text.rfind("\n", 0, end) + 1, end) if end else None


def _code(prompt: str, completion: str) -> list[Span]:
    blocks = [match.span(2) for match in _FENCED.finditer(completion)] or [(0, len(completion))]
    return _moved((_trimmed(completion, block, "\r\n", _BLANK) for block in blocks), len(prompt))


def _asserts(prompt: str, completion: str) -> list[Span]:
    for text, offset in ((prompt, 0), (completion, len(prompt))):
        if lines := [_trimmed(text, match.span(1)) for match in _ASSERT.finditer(text)]:
            return _moved(lines, offset)
    return []


def _completion(prompt: str, completion: str) -> list[Span]:
    return _moved([(0, len(completion))], len(prompt))


_RULES: dict[str, Marker] = {"answer": _answer, "code": _code, "asserts": _asserts, "completion": _completion}


def _moved(spans: Iterable[Span], offset: int) -> list[Span]:
    """As spans of the whole text; empty ones, and groups that took no part in a match, are none."""
    return [(start + offset, end + offset) for start, end in spans if start < end]


def _trimmed(text: str, span: Span, before: str = _BLANK, after: str = _BLANK) -> Span:
    """Without these characters at its ends."""
    start, end = span
    while start < end and text[start] in before:
        start += 1
    while start < end and text[end - 1] in after:
        end -= 1
    return start, end
