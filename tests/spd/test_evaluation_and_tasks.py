"""Scores, intervals, and the tasks on made and on real records."""

import json

import pytest

import spd
from spd.stats import wilson_interval
from spd.tasks.numeric import final_number, marked_span, same_number


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),  # values of statsmodels.stats.proportion.proportion_confint(method="wilson")
    [(0, 10, 0.0, 0.27753), (5, 10, 0.23659, 0.76341), (17, 100, 0.10894, 0.25550), (10, 10, 0.72247, 1.0)],
)
def test_wilson_interval(correct, n, low, high):
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=2e-4)


def test_the_interval_ends_where_the_scale_ends():
    """Exactly: the rounding of the formula would put a bound on the wrong side of the accuracy."""
    for n in range(1, 1001):
        low, high = wilson_interval(0, n)
        assert low == 0.0 < high < 1.0
        low, high = wilson_interval(n, n)
        assert 0.0 < low < high == 1.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 4 + 5 = 9\n#### 9", "9"),
        ("#### 1,234", "1234"),
        ("#### $5.50 in all", "5.5"),
        ("#### -3", "-3"),
        ("first #### 7 then #### 8", "7"),
        ("It is 12, or rather 13.", "13"),
        ("costs $1,000.00.", "1000"),
        (".5", "0.5"),
        ("none", None),
        ("", None),
    ],
)
def test_the_final_number(text, number):
    from decimal import Decimal

    assert final_number(text) == (None if number is None else Decimal(number))


def test_numbers_are_compared_by_value():
    assert same_number("The answer is 1,000.0", "#### 1000")
    assert not same_number("The answer is 1,000.5", "#### 1000")
    assert not same_number("no number", "#### 1000")


def test_the_marked_span_is_the_last_one():
    text = "#### 1 and #### 23"
    start, end = marked_span(text)
    assert (text[start:end], start) == ("23", 16)
    assert marked_span("none") is None


@pytest.mark.parametrize("name", ["gsm8k", "svamp"])
def test_tasks_on_local_records(name, made_records):
    task = spd.load_task(name, made_records)
    calibration, prompts, test = task.calibration(), task.training_prompts(), task.test()
    assert (len(calibration), len(prompts), len(test)) == (24, 24, 6)
    for number, example in enumerate(calibration, start=2):
        ((start, end),) = example.spans
        assert example.text[start:end] == str(2 * number if name == "gsm8k" else number)
        assert example.text[:start].endswith("#### ")
        assert example.prompt in prompts
    for question in test:
        reference = question.reference.rpartition("#### ")[2]
        assert task.is_correct(f" so it is\n#### {reference}", question)
        assert task.is_correct(f" so it is {reference}.", question)
        assert not task.is_correct(f" so it is\n#### {reference}1", question)
        assert not task.is_correct(" no idea", question)


@pytest.mark.parametrize(("name", "train", "test"), [("gsm8k", 7473, 1319), ("svamp", 700, 300)])
def test_tasks_on_the_real_records(name, train, test, records):
    task = spd.load_task(name, records)
    calibration = task.calibration()
    assert (len(calibration), len(task.training_prompts()), len(task.test())) == (train, train, test)
    assert all(len(example.spans) == 1 for example in calibration)
    assert all(final_number(e.text[slice(*e.spans[0])]) == final_number(e.completion) for e in calibration)
    assert all(task.is_correct(question.reference, question) for question in task.test())


def test_evaluation_scores_and_writes(model, tokenizer, made_records, tmp_path):
    task = spd.load_task("gsm8k", made_records)
    found = spd.evaluate(model, tokenizer, task, out=tmp_path / "e.jsonl", max_new_tokens=6, progress=False)
    assert found.n == 6
    assert found.correct == sum(
        task.is_correct(a.completion, q) for a, q in zip(found.answers, task.test(), strict=True)
    )
    assert found.interval == wilson_interval(found.correct, 6)
    scored = [json.loads(line) for line in (tmp_path / "e.scored.jsonl").read_text().splitlines()]
    assert [record["prompt"] for record in scored] == [question.prompt for question in task.test()]
    assert sum(record["correct"] for record in scored) == found.correct
    assert spd.evaluate(model, tokenizer, task, limit=2, max_new_tokens=6, progress=False).n == 2


def test_a_completion_ends_where_the_next_question_begins(tokenizer, model, made_records, monkeypatch):
    task = spd.load_task("gsm8k", made_records)
    answers = [f" #### {question.reference.rpartition('#### ')[2]}" for question in task.test()]

    def runs_on(model, tokenizer, prompts, **settings):
        return [
            spd.Generation(i, prompt, f" it is{answers[i][5:]}\nQuestion: what else?\nAnswer: 99", [], False)
            for i, prompt in enumerate(prompts)
        ]

    monkeypatch.setattr("spd.evaluation.generate", runs_on)
    assert spd.evaluate(model, tokenizer, task, progress=False).accuracy == 1.0


def test_bad_data_is_named(made_records, tmp_path):
    with pytest.raises(spd.InputError, match="did you mean 'gsm8k'"):
        spd.load_task("gsm8", made_records)
    with pytest.raises(spd.InputError, match="not a folder"):
        spd.load_task("gsm8k", tmp_path / "nowhere")
    with pytest.raises(spd.InputError, match=r"train\.jsonl is missing"):
        spd.load_task("gsm8k", tmp_path).training_prompts()
    (tmp_path / "gsm8k").mkdir()
    path = tmp_path / "gsm8k" / "train.jsonl"
    for content, message in (
        ("", "holds no record"),
        ('{"question": "q"}\n', "record 1: answer missing"),
        ('{"question": "q", "answer": "5"}\n', "does not end in '#### n'"),
        ('{"question": "q", "answer": "#### 5"}\n[]\n', "line 2: expected an object"),
        ('{"question": "q", \n', "line 1: not JSON"),
        ('{"question": "q", "answer": "#### 5"}\n{"question": "\xe9"}\n', r"train\.jsonl, line 2: not JSON .*utf-8"),
        (
            '{"question": "q", "answer": "#### 5"}\n{"question": null, "answer": "#### 5"}',
            "record 2: question: .* None",
        ),
        ('{"question": "q", "answer": 5}\n', r"train\.jsonl, record 1: answer: expected str, got 5"),
        ('{"question": "q", "answer": ["#### 5"]}\n', "record 1: answer: expected str, got"),
    ):
        path.write_text(content, encoding="latin-1")
        with pytest.raises(spd.InputError, match=message):
            spd.load_task("gsm8k", tmp_path).calibration()
    with pytest.raises(spd.InputError, match="limit"):
        spd.evaluate(None, None, spd.load_task("gsm8k", made_records), limit=0)


@pytest.mark.parametrize(("answer", "number"), [('"145"', "145"), ("145", "145"), ("145.0", "145"), ("2.5", "2.5")])
def test_an_answer_of_svamp_is_text_or_a_number(answer, number, tmp_path):
    (tmp_path / "svamp").mkdir()
    path = tmp_path / "svamp" / "train.jsonl"
    path.write_text(f'{{"Body": "b", "Question": "q?", "Equation": "( 290.0 / 2.0 )", "Answer": {answer}}}\n')
    (example,) = spd.load_task("svamp", tmp_path).calibration()
    ((start, end),) = example.spans
    assert same_number(example.text[start:end], number)
    for wrong in ("true", "null", '"none"'):
        path.write_text(f'{{"Body": "b", "Question": "q?", "Equation": "e", "Answer": {wrong}}}\n')
        with pytest.raises(spd.InputError, match=r"Answer: expected str or int or float|does not end in '#### n'"):
            spd.load_task("svamp", tmp_path).calibration()
