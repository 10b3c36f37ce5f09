"""Spans by rule."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import spd
from spd.tasks.markers import mark, marker, remark


def marked(rule, prompt, completion):
    text = prompt + completion
    return [text[start:end] for start, end in mark(rule, prompt, completion)]


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (" 2 + 2 = 4\n#### 4", "4"),
        ("#### 1 and then #### -1,234.5, all told", "-1,234.5"),
        ("#### 7 so \\boxed{8}", "7"),
        ("so it is \\boxed{3}, no, \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("so it is \\boxed {5} and \\boxed{6 is left open", "5"),
        ("The answer is not 5. The answer is: **Dr. Who**.\n", "Dr. Who"),
        ("Answer: .5\nbecause it is half", ".5"),
        ("The ANSWER IS\n  \n yes, indeed. \n", "yes, indeed"),
        ("#### Paris", "Paris"),
        ("first\n  last line \n\n", "last line"),
        (" B", "B"),
    ],
)
def test_the_answer_at_the_end(completion, answer):
    assert marked("answer", "#### 9\nThe answer is 9", completion) == [answer]


def test_code_is_what_stands_between_fences():
    completion = "Here:\n```python\n  def f(): pass\n```\nand\n~~~\ny = 1\n~~~\n````\n```\n````\nlast\n  ```\nz"
    assert marked("code", "```\nx\n```\n", completion) == ["  def f(): pass", "y = 1", "```", "z"]
    assert marked("code", "q\n", "def f():\n    pass\n") == ["def f():\n    pass"]
    assert marked("code", "q\n", "```\n```") == [], "an empty block is no span, and no reason to take the fences"
    assert marked("code", "q\n", "use `f` or ``` g ``` there") == ["use `f` or ``` g ``` there"]


def test_asserts_are_lines_of_the_prompt_or_else_of_the_completion():
    prompt = "Write f.\nassert f(1) == 2 \r\n  assert(f(2))\nassert_that(f)\nwe assert nothing\n"
    assert marked("asserts", prompt, "assert False") == ["assert f(1) == 2", "assert(f(2))"]
    assert marked("asserts", "Test f.", "assert f(1)\nx\n") == ["assert f(1)"]
    assert marked("asserts", "Write f.", "def f(): pass") == []


def test_completion_is_all_of_it():
    assert mark("completion", "ab", " c\n") == [(2, 5)]
    assert mark("completion", "ab", "") == []


def test_a_pattern_looks_into_one_text_and_marks_its_group():
    assert marked(r"regex:\d+", "1 2", "3 and 45") == ["3", "45"]
    assert marked(r"prompt-regex:\d+", "1 2", "3 and 45") == ["1", "2"]
    assert marked(r"regex:^(\w+): (\w+)$", "a: b\n", "c: d\ne: f") == ["c", "e"]
    assert marked(r"regex:a(b)?", "", "a ab") == ["b"], "a group that took no part is no span"
    assert mark("regex:x*", "y", "yy") == [], "an empty match is no span"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("anser", r"there is no 'anser', only answer, code, .*; did you mean 'answer'\?"),
        ("Code", r"did you mean 'code'\?"),
        ("regex", r"did you mean 'regex:PATTERN'\?"),
        ("prompt-regx:a", r"did you mean 'prompt-regex:PATTERN'\?"),
        ("regex:", r"did you mean 'regex:PATTERN'\?"),
        ("answer:x", r"did you mean 'answer'\?"),
        ("nothing like it", r"prompt-regex:PATTERN$"),
        ("regex:(", r"'regex:\(' is no regular expression \(missing \)"),
        ("regex:a{99999999999}", "is no regular expression"),
    ],
)
def test_a_bad_rule_is_refused_before_there_is_a_text(rule, message):
    with pytest.raises(spd.InputError, match=message):
        marker(rule)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["answer", "code", "asserts", "completion", "regex:a+|(#)", "prompt-regex:.*"]),
    st.text("a1 \n`#.*{}:", max_size=12),
    st.lists(
        st.sampled_from(["#### ", "\\boxed{", "}", "answer is", "Answer:", "```", "\n", " ", "assert x", "4.", "a"])
    ),
)
def test_what_is_marked_is_a_valid_span_of_the_text(rule, prompt, pieces):
    spans = mark(rule, prompt, "".join(pieces))
    example = spd.Example(prompt, "".join(pieces), spans)
    assert example.spans == sorted(spans)
    if rule in ("answer", "code", "completion", "regex:a+|(#)"):
        assert all(start >= len(prompt) for start, _ in spans)
    if rule == "answer":
        assert all(re.fullmatch(r"\S(.*\S)?", example.text[s:e], re.DOTALL) for s, e in spans)


def test_examples_are_marked_anew(examples):
    again = remark("answer", examples)
    assert [example.spans for example in again] == [example.spans for example in examples]
    assert all(
        example.spans == [(len(example.prompt), len(example.text))] for example in remark("completion", examples)
    )


def test_the_rules_find_what_the_tasks_mark():
    for name, rule in (("words", "answer"), ("choice", "answer"), ("code", "asserts")):
        calibration = spd.load_task(name).calibration()
        assert remark(rule, calibration) == calibration


def test_the_rule_finds_what_gsm8k_marks(records):
    calibration = spd.load_task("gsm8k", records).calibration()
    assert remark("answer", calibration) == calibration
