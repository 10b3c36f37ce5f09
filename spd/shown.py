"""Text from elsewhere (a model, a record, a file's name) as it may be shown: in a terminal, on a page, in Markdown."""

from __future__ import annotations

import re

LONGEST = 2000
"""Characters of a message; what is longer loses its middle."""
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

_MARKS = re.compile(r"([\\`*|<>\[\]#~$&!]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")


def visible(text: str) -> str:
    """Controls, which could drive a terminal or turn the text around, and halves of characters by picture or number.

    New lines and tabs stay.
    """
    return _CONTROLS.sub(_picture, text)


def one_line(text: str) -> str:
    """Of a few thousand characters at the most, without a control."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return visible(re.sub(r"\s*[\r\n]+\s*", " ", text).replace("\t", " ")).strip()


def markdown(text: object) -> str:
    """One line that Markdown shows as it is."""
    return _MARKS.sub(r"\\\1", " ".join(visible(str(text)).split()))


def _picture(control: re.Match[str]) -> str:
    return chr(0x2400 + ord(control[0])) if control[0] < " " else f"\\u{ord(control[0]):04x}"
