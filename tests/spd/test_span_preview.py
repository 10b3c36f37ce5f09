"""What counts, as text, as colours and as a page."""

import html
import io
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import spd
from spd.span_preview import BRACKETS, count_line, preview, preview_html, print_preview
from spd.spans import encode_examples

SPECIAL = spd.Example(
    "<script>alert('&')</script>\n[red]x[/red] \x1b[31m\u202e\x85\r", " é🙂🙂\n\t#### 12", [(0, 3), (52, 55)]
)


def roles(preview):
    return [(piece.text, piece.role) for piece in preview.pieces if piece.role != "plain"]


def printed(previews, coloured=False, width=200, **settings):
    console = Console(file=io.StringIO(), width=width, color_system="truecolor" if coloured else None)
    print_preview(previews, console=console, **settings)
    return console.file.getvalue()


def shown_text(page):
    """The characters of the examples on a page, without what the page adds."""
    found = []
    for body in re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL):
        body = re.sub(r'<span class="scissors">.*?</span>|<i>↵</i>', "", body)
        found.append(html.unescape(re.sub(r"</?(mark|span)[^>]*>", "", body)))
    return found


def test_every_role(tokenizer):
    assert tokenizer.tokenize(" apples98") == ["Ġapples", "9", "8"]
    prompt, answer = "xy apples", "98 zz"
    example = spd.Example(prompt, answer, [(1, 2), (6, 9), (9, 11), (13, 14)])
    (found,) = preview(tokenizer, [example], max_length=4)
    assert roles(found) == [
        ("y", "counted"),
        (" apples", "straddling"),
        ("9", "counted"),
        ("8", "lost"),
        (" z", "cut"),
        ("z", "lost"),
    ]
    assert [piece.text for piece in found.pieces if piece.part == "prompt"] == ["x", "y", " apples"]
    assert found.summary == "3 of 4 tokens in S, 1 straddling, 2 spans cut"


@settings(max_examples=150, deadline=None)
@given(
    st.text("apples 12é🙂\n\t<", max_size=14),
    st.text("apples 12é🙂\n\t<", max_size=14),
    st.integers(2, 30),
    st.sampled_from(["left", "right"]),
    st.data(),
)
def test_the_text_reads_as_it_is_and_the_tokens_are_those_of_the_loss(tokenizer, prompt, answer, limit, side, data):
    length = len(prompt + answer)
    edges = st.tuples(st.integers(0, length), st.integers(0, length)).map(sorted).filter(lambda span: span[0] < span[1])
    spans = [tuple(span) for span in data.draw(st.lists(edges, max_size=3))] if length else []
    example = spd.Example(prompt, answer, spans)
    tokenizer.truncation_side = side
    try:
        (found,) = preview(tokenizer, [example], max_length=limit)
        (encoded,) = encode_examples(tokenizer, [example], max_length=limit)
        batch = tokenizer(example.text, return_offsets_mapping=True, truncation=True, max_length=limit)
    finally:
        tokenizer.truncation_side = "right"
    assert "".join(piece.text for piece in found.pieces) == example.text
    assert all(piece.text for piece in found.pieces)
    assert (found.tokens, found.counted) == (len(encoded.tokens), len(encoded.targets))
    assert (found.straddling, found.cut) == (encoded.straddling, encoded.cut)
    offsets = batch["offset_mapping"]
    characters = {c for t in encoded.targets for c in range(*offsets[t])}
    beyond = set(range(length)) - {c for start, end in offsets for c in range(start, end)}
    position = 0
    for piece in found.pieces:
        inside = set(range(position, position + len(piece.text)))
        position += len(piece.text)
        assert inside & characters == (inside if piece.role in ("counted", "straddling") else set())
        if piece.role in ("cut", "lost"):
            assert inside <= beyond
            assert piece.role == "cut" or any(start <= min(inside) and max(inside) < end for start, end in spans)
        assert piece.part == ("prompt" if min(inside) < len(prompt) else "completion")
    assert any(piece.role == "straddling" for piece in found.pieces) == (encoded.straddling > 0)
    assert any(piece.role == "lost" for piece in found.pieces) >= (encoded.cut > 0)


def test_a_character_of_several_tokens_is_shown_once(tokenizer):
    example = spd.Example("q", " 🙂🙂", [(3, 4)])
    assert len(tokenizer("🙂")["input_ids"]) > 1
    (found,) = preview(tokenizer, [example])
    assert roles(found) == [("🙂", "counted")]
    assert found.counted == len(tokenizer("🙂")["input_ids"])


def test_the_count_line_counts_all_examples_whether_shown_or_not(tokenizer, examples):
    previews = preview(tokenizer, [*examples[:3], spd.Example("a", "b", [])])
    tokens = sum(each.counted for each in previews)
    line = f"4 examples, {tokens} tokens in S, 0 straddling, 0 spans cut, 1 example without any token in S"
    assert tokens >= 3
    assert count_line(previews) == line
    for text in (printed(previews, show=2), preview_html(previews, title="t", show=2)):
        assert line in text
        assert "example 1" in text and "example 2" not in text and "example 3" not in text
    assert "Shown are the first 2" in preview_html(previews, title="t", show=2)
    assert "Shown" not in preview_html(previews, title="t")
    assert "example 3: 0 of 2 tokens in S: left out of the calibration" in printed(previews)


def test_the_terminal_shows_what_counts_by_colour_or_by_brackets(tokenizer, examples):
    previews = preview(tokenizer, examples[:2])
    plain, coloured = printed(previews), printed(previews, coloured=True)
    assert "\x1b" not in plain
    assert "⟦" not in coloured
    # black on any ground: a style of rich keeps the codes of the first terminal that it was rendered for
    for text, token in ((plain, r"⟦([^⟧]+)⟧"), (coloured, r"\x1b\[30;[\d;]+m(.*?)\x1b\[0m")):
        counted = [piece.text for each in previews for piece in each.pieces if piece.role == "counted"]
        assert len(counted) >= 2
        assert re.findall(token, text)[: len(counted) + 1] == [*counted, "token"], "the legend comes last"


def test_what_is_cut_is_marked_where_the_cut_is(tokenizer):
    example = spd.Example("Question: how many?\nAnswer:", " there are\n#### 1987", [(43, 47)])
    tokens = len(tokenizer("Question: how many?\nAnswer: there are\n####")["input_ids"])
    previews = preview(tokenizer, [example], max_length=tokens)
    assert previews[0].summary == f"0 of {tokens} tokens in S, 1 span cut: left out of the calibration"
    assert f"####✂ cut after {tokens} tokens ✂ ⟨1987⟩\n" in printed(previews)
    page = preview_html(previews, title="t")
    assert f'####<span class="scissors">✂ cut after {tokens} tokens</span><mark class="cut"> </mark>' in page
    assert '<mark class="lost">1987</mark>' in page


def test_records_cannot_drive_the_page(tokenizer):
    page = preview_html(preview(tokenizer, [SPECIAL]), title="<b>&")
    assert "<script" not in page and "<b>" not in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", page)
    assert not re.search(r"(src|href|url|@import)\b", page), "nothing from elsewhere"
    pictured = (
        SPECIAL.text.replace("\x1b", "␛").replace("\u202e", r"\u202e").replace("\x85", r"\u0085").replace("\r", "␍")
    )
    assert shown_text(page) == [pictured]


def test_records_cannot_drive_the_terminal(tokenizer):
    text = printed(preview(tokenizer, [SPECIAL]))
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert "[red]x[/red] ␛[31m" in re.sub("[⟦⟧⟪⟫]", "", text)


def test_new_lines_are_visible_and_stay(tokenizer):
    example = spd.Example("a\n\nb\n", "c\n", [(1, 3), (6, 7)])
    text = printed(preview(tokenizer, [example])).partition("\n")[2]
    for brackets in BRACKETS.values():
        for bracket in filter(None, brackets):
            text = text.replace(bracket, "")
    assert text.startswith("a↵\n↵\nb↵\n▸c↵\n")
    page = preview_html(preview(tokenizer, [example]), title="t")
    assert shown_text(page) == [example.text]
    assert page.count("<i>↵</i>\n") == 4


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(spd.InputError, match="Slow does not report character offsets"):
        preview(Slow(), [spd.Example("a", "b")])
