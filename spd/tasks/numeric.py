"""The number at the end of a worked answer: what GSM8K and SVAMP are scored on."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

NUMBER = r"[-+]?\$?\d[\d,]*(?:\.\d+)?|[-+]?\$?\.\d+"
_MARKED = re.compile(rf"####\s*({NUMBER})")
_ANY = re.compile(NUMBER)


def final_number(text: str) -> Decimal | None:
    """The number after the first `####`, else the last number of the text, else None."""
    marked = _MARKED.search(text)
    if marked:
        return to_number(marked[1])
    numbers = _ANY.findall(text)
    return to_number(numbers[-1]) if numbers else None


def same_number(completion: str, reference: str) -> bool:
    """Whether both end in the same number: 1,000 and 1000.00 are the same."""
    answer = final_number(completion)
    return answer is not None and answer == final_number(reference)


def marked_span(text: str) -> tuple[int, int] | None:
    """Characters of the number after the last `####`."""
    marks = list(_MARKED.finditer(text))
    return marks[-1].span(1) if marks else None


def to_number(text: str) -> Decimal | None:
    """The value of what `NUMBER` matches."""
    try:
        return Decimal(text.replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None
