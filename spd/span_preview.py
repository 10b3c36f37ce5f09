"""What counts: the tokens of calibration examples and their part in the loss, in a terminal or on a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Literal

from markupsafe import Markup, escape
from transformers import PreTrainedTokenizerBase

from spd.example import Example
from spd.report import page_environment
from spd.shown import visible
from spd.spans import EncodedExample, encode_examples

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

Role = Literal["plain", "counted", "straddling", "cut", "lost"]
MEANING: dict[Role, str] = {
    "counted": "in S: the loss is taken over it",
    "straddling": "in S, and reaches over the edge of its span",
    "cut": "beyond the cut",
    "lost": "in a span, but beyond the cut",
}
SHADES: dict[Role, tuple[str, str]] = {  # in turn, so that neighbours can be told apart
    "plain": ("", ""),
    "counted": ("black on #86efac", "black on #bbf7d0"),
    "straddling": ("black on #fdba74", "black on #fed7aa"),
    "cut": ("dim", "dim"),
    "lost": ("dim underline red", "dim underline red"),
}
BRACKETS: dict[Role, tuple[str, str]] = {  # where there are no colours
    "plain": ("", ""),
    "counted": ("⟦", "⟧"),
    "straddling": ("⟪", "⟫"),
    "cut": ("", ""),
    "lost": ("⟨", "⟩"),
}
NEW_LINE, COMPLETION = "↵", "▸"


@dataclass(frozen=True)
class Piece:
    """The characters of one token, or of text that no token stands for; `part` is where they begin."""

    text: str
    role: Role
    part: Literal["prompt", "completion"]

    @property
    def beyond(self) -> bool:
        return self.role in ("cut", "lost")


@dataclass(frozen=True)
class Preview:
    """One example as calibration takes it. The texts of its pieces, joined, are its text.

    Args:
        index: the example's position in what was passed.
        pieces: in the order of the text. Tokens that share a character are one piece.
        tokens: how many there are up to the cut.
        counted: how many of them are in S.
        straddling: how many of those reach over the edge of their span.
        cut: how many spans lost characters to the cut.
    """

    index: int
    pieces: list[Piece]
    tokens: int
    counted: int
    straddling: int
    cut: int

    @property
    def summary(self) -> str:
        told = f"{self.counted} of {_number(self.tokens, 'token')} in S"
        told += f", {self.straddling} straddling" if self.straddling else ""
        told += f", {_number(self.cut, 'span')} cut" if self.cut else ""
        return told + ("" if self.counted else ": left out of the calibration")


def preview(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, max_length: int = 256) -> list[Preview]:
    """Tokens with their roles, each as its characters in the text.

    Args:
        tokenizer: the fast tokenizer of the model.
        examples: labelled examples.
        max_length: tokens after which a text is cut, as in `spd.calibrate`.

    Raises:
        InputError: the tokenizer cannot tell which characters a token stands for.
    """
    previews = []
    for example, encoded in zip(examples, encode_examples(tokenizer, examples, max_length=max_length), strict=True):
        batch = tokenizer(example.text, return_offsets_mapping=True, truncation=True, max_length=max_length)
        pieces = _pieces(example, encoded, list(batch["offset_mapping"]))
        counts = len(encoded.tokens), len(encoded.targets), encoded.straddling, encoded.cut
        previews.append(Preview(encoded.index, pieces, *counts))
    return previews


def count_line(previews: Sequence[Preview]) -> str:
    """What the examples hold, all of them together."""
    without = sum(not each.counted for each in previews)
    return ", ".join(
        [
            _number(len(previews), "example"),
            f"{_number(sum(each.counted for each in previews), 'token')} in S",
            f"{sum(each.straddling for each in previews)} straddling",
            f"{_number(sum(each.cut for each in previews), 'span')} cut",
            f"{_number(without, 'example')} without any token in S",
        ]
    )


def print_preview(previews: Sequence[Preview], *, show: int | None = None, console: Console | None = None) -> None:
    """Print the text with what counts on coloured ground, or in brackets where there are no colours.

    Args:
        previews: of all examples that are to be counted.
        show: print the first so many (default: all).
        console: of rich (default: standard output).
    """
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    coloured = console.color_system is not None and not console.no_color
    for each in previews[:show]:
        console.print(Text(f"example {each.index}: {each.summary}", style="bold"), soft_wrap=True)
        console.print(_text(each, coloured))
        console.print()
    for role, meaning in MEANING.items():
        console.print(_marked("token", role, 0, coloured), meaning, highlight=False, soft_wrap=True)
    console.print(Text(COMPLETION, style="bold blue"), "here the completion begins", highlight=False, soft_wrap=True)
    console.print(Text(count_line(previews), style="bold"), soft_wrap=True)


def preview_html(previews: Sequence[Preview], *, title: str, show: int | None = None) -> str:
    """One self-contained page, without scripts.

    Args:
        previews: of all examples that are to be counted.
        title: the task, and the model whose tokens these are.
        show: put the first so many on the page (default: all).
    """
    environment = page_environment()
    environment.filters["characters"] = characters
    return environment.get_template("spans.html").render(
        title=title,
        meaning=MEANING,
        counts=count_line(previews),
        total=len(previews),
        examples=[(each, _parts(each)) for each in previews[:show]],
    )


def _pieces(example: Example, encoded: EncodedExample, offsets: list[tuple[int, int]]) -> list[Piece]:
    text, targets = example.text, set(encoded.targets)
    kept = [(start, end, position) for position, (start, end) in enumerate(offsets) if start < end]
    first, last = min((start for start, _, _ in kept), default=0), max((end for _, end, _ in kept), default=0)

    def piece(start: int, end: int, role: Role) -> Piece:
        return Piece(text[start:end], role, "prompt" if start < len(example.prompt) else "completion")

    pieces = [piece(*beyond) for beyond in _beyond(example, 0, first)]
    shown = first
    for start, end, position in kept:
        if start > shown:  # blanks that the tokenizer leaves out
            pieces.append(piece(shown, start, "plain"))
        role = _role(example, start, end) if position in targets else "plain"
        if end > shown:
            pieces.append(piece(max(start, shown), end, role))
        elif pieces[-1].role == "plain":  # another token of a character that is shown already
            pieces[-1] = Piece(pieces[-1].text, role, pieces[-1].part)
        shown = max(shown, end)
    return pieces + [piece(*beyond) for beyond in _beyond(example, last, len(text))]


def _role(example: Example, start: int, end: int) -> Role:
    """Of a token in S, by the same rule as `encode_examples` counts."""
    outside = [c for c in range(start, end) if not any(s <= c < e for s, e in example.spans)]
    return "straddling" if any(not example.text[c].isspace() for c in outside) else "counted"


def _beyond(example: Example, start: int, end: int) -> Iterator[tuple[int, int, Role]]:
    """Text before the first or after the last token, in spans and out of them; mere blanks are not cut, but unseen."""
    if not example.text[start:end].strip():
        if start < end:
            yield start, end, "plain"
        return
    edges = {start, end, len(example.prompt), *(edge for span in example.spans for edge in span)}
    inside = sorted(edge for edge in edges if start <= edge <= end)
    for a, b in pairwise(inside):
        yield a, b, "lost" if any(s <= a < e for s, e in example.spans) else "cut"


def _text(each: Preview, coloured: bool) -> Text:
    from rich.text import Text

    text, before = Text(), Piece("", "plain", "prompt")
    for number, piece in enumerate(each.pieces):
        if piece.part != before.part:
            text.append(COMPLETION, style="bold blue")
        if piece.beyond and not before.beyond:
            text.append(f"✂ cut after {each.tokens} tokens ✂", style="reverse")
        text.append_text(_marked(piece.text, piece.role, number, coloured))
        before = piece
    return text


def _marked(text: str, role: Role, number: int, coloured: bool) -> Text:
    from rich.text import Text

    opening, closing = ("", "") if coloured else BRACKETS[role]
    style = SHADES[role][number % 2] if coloured else ""
    body = text.removesuffix("\n")
    *lines, line = visible(body).split("\n")
    marked = Text(opening)
    for whole in lines:
        marked.append(whole, style).append(NEW_LINE, style or "dim").append("\n")
    marked.append(line, style)
    if body != text:  # the new line itself stands outside of the brackets
        return marked.append(NEW_LINE, style or "dim").append(f"{closing}\n")
    return marked.append(closing)


def characters(text: str) -> Markup:
    """Text for a page, with every new line shown as well."""
    return escape(visible(text)).replace("\n", Markup(f"<i>{NEW_LINE}</i>\n"))


def _parts(each: Preview) -> list[tuple[str, list[Piece]]]:
    return [(part, list(pieces)) for part, pieces in groupby(each.pieces, key=lambda piece: piece.part)]


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
