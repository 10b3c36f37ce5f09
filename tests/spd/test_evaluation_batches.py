"""Batches do not change answers: of any size, in any order, halved where memory runs out."""

import json
import warnings
from random import Random

import pytest
import torch

import spd
from spd.likelihood import completion_nll
from spd.tasks.jsonl import JsonlTask


@pytest.mark.parametrize("name", ["words", "choice", "code"])
def test_answers_are_those_of_one_prompt_at_a_time(name, monkeypatch):
    """In fp32, with questions of mixed lengths."""
    model, tokenizer = spd.load_model("proving-ground")
    assert model.dtype == torch.float32
    task = spd.load_task(name)
    questions = Random(1).sample(task.test(), 24)
    monkeypatch.setattr(task, "test", lambda: questions)
    assert len({len(tokenizer(question.prompt)["input_ids"]) for question in questions}) > 2
    settings = {"run_generated_code": True, "progress": False}
    alone = spd.evaluate(model, tokenizer, task, batch_size=1, **settings)
    together = spd.evaluate(model, tokenizer, task, batch_size=32, **settings)
    assert together.answers == alone.answers
    assert [answer.prompt for answer in alone.answers] == [question.prompt for question in questions]
    assert alone.answer_by == "generation"
    assert 0 < alone.correct < alone.n == 24, "right ones and wrong ones are compared"


@pytest.fixture
def small_memory(model):
    """A model that has room for three texts in a pass, and how many it was given."""
    seen = []

    def refuse(module, args, given):
        seen.append(len(given["input_ids"]))
        if seen[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    handle = model.register_forward_pre_hook(refuse, with_kwargs=True)
    yield model, seen
    handle.remove()


def test_likelihoods_in_batches_that_fit(small_memory, tokenizer, examples):
    model, seen = small_memory
    pairs = [(example.prompt, example.completion) for example in examples]
    expected = completion_nll(model, tokenizer, pairs, batch_size=2, progress=False)
    seen.clear()
    with pytest.warns(UserWarning, match="pairs at a time do not fit in memory") as said:
        found = completion_nll(model, tokenizer, pairs, progress=False)
    assert [text.nll for text in found] == pytest.approx([text.nll for text in expected], rel=1e-5)
    assert [str(each.message)[:19] for each in said] == ["likelihood: 8 pairs", "likelihood: 4 pairs"]
    assert seen[:2] == [8, 4]
    assert max(seen[2:]) == 2, "what did not fit is not tried again"


def test_a_deterministic_pass_refuses_what_does_not_fit(small_memory, tokenizer, examples, tmp_path):
    model, _ = small_memory
    pairs = [(example.prompt, example.completion) for example in examples[:8]]
    with pytest.raises(spd.InputError, match="likelihood: deterministic: 8 pairs at a time do not fit in memory"):
        completion_nll(model, tokenizer, pairs, deterministic=True, progress=False)
    task, out = spd.load_task("choice"), tmp_path / "out.jsonl"
    exact = {"limit": 8, "answer_by": "likelihood", "out": out, "deterministic": True, "progress": False}
    with pytest.raises(spd.InputError, match=r"evaluate choice: deterministic: .* questions at a time do not fit"):
        spd.evaluate(model, tokenizer, task, **exact)
    assert json.loads(out.with_suffix(".settings.json").read_text())["deterministic"] is True


def test_choices_in_batches_that_fit(small_memory, tokenizer):
    model, _ = small_memory
    task = spd.load_task("choice")
    settings = {"limit": 10, "answer_by": "likelihood", "progress": False}
    expected = spd.evaluate(model, tokenizer, task, batch_size=1, **settings)
    with pytest.warns(UserWarning, match="evaluate choice: [84] questions at a time do not fit in memory"):
        found = spd.evaluate(model, tokenizer, task, batch_size=8, **settings)
    assert found == expected


def test_a_text_that_does_not_fit_by_itself(model, tokenizer):
    def refuse(module, args):
        raise MemoryError("no room")

    with model.register_forward_pre_hook(refuse), pytest.raises(spd.InputError, match="not even one of the pairs fits"):
        completion_nll(model, tokenizer, [("Question:", " yes")], progress=False)
    assert not model.training


def test_completions_that_nobody_judges_are_not_generated(model, tokenizer, tmp_path, monkeypatch):
    folder = tmp_path / "texts"
    folder.mkdir()
    for split, numbers in (("train", range(3)), ("test", range(10, 14))):
        records = [{"prompt": f"how many are {n}?", "completion": f" apples {n}"} for n in numbers]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    task = JsonlTask(folder, metric="nll")
    monkeypatch.setattr("spd.evaluation.generate", None)
    out = tmp_path / "texts.jsonl"
    found = spd.evaluate(model, tokenizer, task, out=out, progress=False)
    pairs = [(question.prompt, question.reference) for question in task.test()]
    expected = [text.per_token for text in completion_nll(model, tokenizer, pairs, progress=False)]
    assert found.nlls == pytest.approx(expected)
    assert (found.n, found.metric) == (0, "nll")
    assert [answer.completion for answer in found.answers] == [""] * 4
    assert not out.exists(), "there are no completions"
    scored = [json.loads(line) for line in out.with_suffix(".scored.jsonl").read_text().splitlines()]
    assert [each["nll"] for each in scored] == found.nlls

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no room for 600 tokens is needed where none are written
        assert spd.evaluate(model, tokenizer, task, max_new_tokens=600, progress=False).nlls == found.nlls
