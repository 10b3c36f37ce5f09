"""Scores and intervals."""

import json

import pytest

import spd
from spd.stats import wilson_interval


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


def test_the_limit_is_checked(made_records):
    with pytest.raises(spd.InputError, match="limit"):
        spd.evaluate(None, None, spd.load_task("gsm8k", made_records), limit=0)
