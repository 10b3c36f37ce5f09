"""The short answer in a completion: a letter, a word, a number, brackets, or words in their order.

Where to look, in this order: an answer that the completion opens with ("B.", "No, because ..."), the one behind its
last "the answer is" or "answer:", the last one that it holds. Where it holds none, None is found, which no reference
equals.
"""

from __future__ import annotations

import re
from decimal import Decimal

from spd.tasks.numeric import NUMBER, to_number

_STATED = re.compile(
    r"\b(?:answer(?: to [^.:\n]{1,80}?)?|(?:correct|right|best) (?:option|choice))\b"
    r"\W{0,4}?(?:\s*(?:is|would be|are|[:=])){1,2}\s*+(?!not\b)",
    re.IGNORECASE,
)
_OPENING = r"[\s*_`\"'#]*"
_END = r"(?=[)\]}*`\"']|[.,:;!?](?:\s|$)|\s*?\n|\s*$)"  # of a clause
_LETTER = re.compile(r"(?<![\w.])(?<!\w['’])(?:\((?P<bracketed>[A-Za-z])\)|(?P<bare>[A-Za-z]))(?!\w|['’]\w)")
_BEFORE_LETTER = re.compile(rf"{_OPENING}(?:(?:the )?(?:option|choice|letter) )?{_OPENING}", re.IGNORECASE)
_CALLED_RIGHT = re.compile(r"(?<!\w)\(?([A-Z])\)? is (?:the )?(?:correct|right|best|true|answer)\b")
_BRACKETS = re.compile(r"(?<!\w)[()\[\]{}<>](?:[ \t]*[()\[\]{}<>])*(?!\w)")
_BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+")


def stated(text: str) -> str | None:
    """What follows the last "the answer is" or "answer:"."""
    ends = [match.end() for match in _STATED.finditer(text)]
    return text[ends[-1] :] if ends else None


def find_letter(text: str, letters: str = "ABCD") -> str | None:
    """The option that a completion chooses.

    A letter counts in brackets, at the end of a clause, or as a capital between blanks; "A" and "I" between blanks are
    words, so there "A" counts only where it is called right ("A is correct") or stated ("the answer is A because").
    """
    candidates = [match for match in _LETTER.finditer(text) if match[0].strip("()").upper() in letters]
    plausible = [match for match in candidates if _is_option(match, text)]
    opening = re.match(_OPENING, text)
    if plausible and opening and plausible[0].start() == opening.end():
        return _name(plausible[0])
    statement = stated(text)
    if statement is not None:
        start = len(text) - len(statement)
        end = start + len(statement.partition("\n")[0])
        opening = _BEFORE_LETTER.match(text, start)
        for match in candidates:
            first_capital_a = match[0] == "A" and opening is not None and match.start() == opening.end()
            if start <= match.start() < end and (_is_option(match, text) or first_capital_a):
                return _name(match)
    called_right = [match[1] for match in _CALLED_RIGHT.finditer(text) if match[1] in letters]
    if called_right:
        return called_right[-1]
    bracketed = [match for match in plausible if match["bracketed"]]
    return _name((bracketed or plausible)[-1]) if plausible else None


def find_word(text: str, words: tuple[str, ...]) -> str | None:
    """Which of the words a completion ends up with, in lower case."""
    word = re.compile(rf"\b(?:{'|'.join(words)})\b", re.IGNORECASE)
    opening = re.match(rf"{_OPENING}({word.pattern})(?!\s*(?:(?:and|or|is)\b|[=()]))", text, re.IGNORECASE)
    if opening:
        return opening[1].lower()
    statement = word.search((stated(text) or "").partition("\n")[0])
    found = [statement[0]] if statement else word.findall(text)
    return str(found[-1]).lower() if found else None


def find_number(text: str) -> Decimal | None:
    """The number of a completion: its first line if that is one, the stated one (a sum's result), or the last."""
    first = text.strip().partition("\n")[0].strip(" .*`$")
    if re.fullmatch(NUMBER, first):
        return to_number(first)
    statement = (stated(text) or "").partition("\n")[0].rpartition("=")[2]
    numbers = re.findall(NUMBER, statement)[:1] or re.findall(NUMBER, text)[-1:]
    return to_number(numbers[0]) if numbers else None


def find_brackets(text: str) -> str | None:
    """A row of brackets, without blanks."""
    opening = re.compile(_OPENING).match(text)
    row = _BRACKETS.match(text, opening.end() if opening else 0) or _BRACKETS.search(stated(text) or "")
    rows = [row[0]] if row else _BRACKETS.findall(text)
    return re.sub(r"\s", "", rows[-1]) if rows else None


def find_words(text: str) -> list[str]:
    """Words in their order, in lower case: of one line, or one a line. A lead-in ends in a colon."""
    lines = [line for line in (stated(text) or text).split("\n") if line.strip()]
    if len(lines) > 1 and lines[0].rstrip().endswith(":"):
        lines = lines[1:]
    rows = [_words(_BULLET.sub("", line)) for line in lines]
    if rows and len(rows[0]) > 1:
        return _words(lines[0].rpartition(": ")[2])
    return [word for row in rows for word in row]


def _is_option(match: re.Match[str], text: str) -> bool:
    if match["bracketed"] or re.compile(_END).match(text, match.end()):
        return True
    return match["bare"].isupper() and match["bare"] not in "AI"


def _name(match: re.Match[str]) -> str:
    return str(match["bracketed"] or match["bare"]).upper()


def _words(text: str) -> list[str]:
    words = (word.strip(".,;:\"'`*()[]") for word in text.lower().replace(",", " ").split())
    return [word for word in words if word]
