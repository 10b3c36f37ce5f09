"""When a completion says the same as a reference: the ways to compare that a task can name.

- `exact`: the same text, blanks at its ends aside.
- `number`: they end in the same number (`spd.tasks.numeric`).
- `letter`: they choose the same option, A to J (`spd.tasks.answers`).
- `contains`: the completion holds the reference.
- `regex:PATTERN`: the pattern's first match, or its group 1 if it has one, is the same in both; `^` and `$` stand at
  the ends of lines.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

from spd.errors import InputError, near
from spd.tasks.answers import find_letter
from spd.tasks.numeric import final_number

OPTIONS = "ABCDEFGHIJ"


def same_answer(rule: str, completion: str, reference: str) -> bool:
    """Whether the two say the same by this rule. A completion without an answer never does."""
    if rule == "contains":
        return reference.strip() in completion
    answer = answer_in(rule, completion)
    return answer is not None and answer == answer_in(rule, reference)


def answer_in(rule: str, text: str) -> object:
    """What of a text is compared; None where there is nothing of the kind."""
    if rule.startswith("regex:"):
        pattern = re.compile(rule.removeprefix("regex:"), re.MULTILINE)
        match = pattern.search(text)
        return (match and match[min(pattern.groups, 1)]) or None
    return _READERS[rule](text)


def check_rule(rule: str, besides: Sequence[str] = ()) -> None:
    """Refuse what is no rule; `besides` names what else could stand there.

    Raises:
        InputError: no such rule (the near one is suggested), or a pattern that is no regular expression.
    """
    name, _, pattern = rule.partition(":")
    if name == "regex" and pattern:
        try:
            re.compile(pattern)
        except (re.error, OverflowError) as error:
            raise InputError(f"{rule!r} is no regular expression ({error})") from None
    elif rule not in _READERS:
        known = [*_READERS, "regex:PATTERN", *besides]
        raise InputError(f"there is no {rule!r}, only {', '.join(known)}{near(name, known)}")


_READERS: dict[str, Callable[[str], object]] = {
    "exact": str.strip,
    "number": final_number,
    "letter": partial(find_letter, letters=OPTIONS),
    "contains": str.strip,
}
