"""Examples, and the way from characters to tokens."""

import pytest

import spd
from spd.spans import encode_examples


def spans_of(tokenizer, prompt, completion, spans, max_length=256):
    return encode_examples(tokenizer, [spd.Example(prompt, completion, spans)], max_length=max_length)[0]


@pytest.mark.parametrize("span", [(0, 0), (3, 2), (-1, 2), (0, 12), (11, 12)])
def test_a_span_outside_the_text_is_refused(span):
    with pytest.raises(spd.InputError, match="11 characters"):
        spd.Example("prompt", " five", [span])


@pytest.mark.parametrize("spans", [[(1,)], [(1, 2, 3)], [(0.0, 1.0)], [("a", "b")], (3, 5), None])
def test_spans_that_are_no_pairs_of_integers_are_refused(spans):
    with pytest.raises(spd.InputError, match="pairs"):
        spd.Example("prompt", " five", spans)


def test_text_that_is_no_string_is_refused():
    with pytest.raises(spd.InputError, match=r"Example\.completion.*int"):
        spd.Example("prompt", 5, [])


def test_targets_are_exactly_the_tokens_of_the_span(tokenizer):
    prompt, completion = "Question: how many?\nAnswer:", " there are\n#### 1987"
    start = len(prompt) + completion.index("1987")
    encoded = spans_of(tokenizer, prompt, completion, [(start, start + 4)])
    assert "".join(tokenizer.decode([encoded.tokens[t]]) for t in encoded.targets) == "1987"
    assert encoded.straddling == encoded.cut == 0


def test_spans_may_lie_in_the_prompt(tokenizer):
    encoded = spans_of(tokenizer, "assert f(1) == 2\n", "def f(x): return x + 1", [(7, 16)])
    assert "".join(tokenizer.decode([encoded.tokens[t]]) for t in encoded.targets).strip() == "f(1) == 2"


def test_a_token_that_reaches_over_the_edge_is_counted(tokenizer):
    text = " apples"
    assert len(tokenizer(text)["input_ids"]) == 1, "the fixture's tokenizer has this word as one token"
    encoded = spans_of(tokenizer, "x", text, [(4, 6)])
    assert encoded.targets == [1]
    assert encoded.straddling == 1


def test_a_leading_space_in_the_token_is_not_straddling(tokenizer):
    encoded = spans_of(tokenizer, "x", " apples", [(2, 8)])
    assert encoded.targets == [1]
    assert encoded.straddling == 0


def test_spans_beyond_the_cut_are_counted(tokenizer):
    prompt, completion = "y" * 40, "z" * 10
    whole = spans_of(tokenizer, prompt, completion, [(0, 2), (45, 50)])
    cut = spans_of(tokenizer, prompt, completion, [(0, 2), (45, 50)], max_length=20)
    assert (whole.cut, cut.cut) == (0, 1)
    assert len(cut.tokens) == 20
    assert max(cut.targets) < 20


def test_the_first_token_is_never_a_target(tokenizer):
    assert spans_of(tokenizer, "ab", "", [(0, 1)]).targets == []


def test_full_loss_takes_every_token_but_the_first(tokenizer):
    example = spd.Example("prompt", " completion")
    encoded = encode_examples(tokenizer, [example], max_length=256, full=True)[0]
    assert encoded.targets == list(range(1, len(encoded.tokens)))


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(spd.InputError, match="Slow does not report character offsets"):
        encode_examples(Slow(), [spd.Example("a", "b")], max_length=8)
