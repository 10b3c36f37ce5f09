"""Answers by likelihood: the same as comparing every option by itself, and said so in what is written."""

import copy
import json
from random import Random

import pytest
import torch
from families import FAMILIES

import spd
from spd.generation import read_generations
from spd.likelihood import completion_nll
from spd.options import encode_choice, option_nlls
from spd.tasks.base import Question, Task
from spd.tasks.chat import ChatTask


@pytest.fixture(scope="module")
def carried():
    return spd.load_model("proving-ground")


class Colours(Task):
    """Options of one and of several tokens, one that begins another, and a prompt that is asked twice."""

    name = "colours"
    max_new_tokens = 4
    asked = (
        Question("the sky is", "blue", "sky", (" blue", " red", " green")),
        Question("two and three are", "5", "sums", (" 5", " 55", " 6")),
        Question("an apple is very very", "red", "", (" A", " B")),
        Question("the sky is", "red", "sky", (" blue", " red", " green")),
    )

    def calibration(self):
        return []

    def training_prompts(self):
        return []

    def test(self):
        return list(self.asked)

    def is_correct(self, completion, question):
        return completion.strip() == question.reference


def one_at_a_time(model, tokenizer, question):
    """The option with the largest sum of log-probabilities: a text at a time, every logit, float64."""
    sums = []
    for option in question.options:
        prompt, tokens = tokenizer(question.prompt)["input_ids"], tokenizer(question.prompt + option)["input_ids"]
        assert tokens[: len(prompt)] == prompt
        with torch.no_grad():
            log_p = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        sums.append(sum(float(log_p[t - 1, tokens[t]]) for t in range(len(prompt), len(tokens))))
    return question.options[max(range(len(sums)), key=sums.__getitem__)]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma3"])
def test_options_of_any_length(family, batch_size, make_model, tokenizer):
    model, task = make_model(family), Colours()
    found = spd.evaluate(model, tokenizer, task, answer_by="likelihood", batch_size=batch_size, progress=False)
    assert [answer.completion for answer in found.answers] == [
        one_at_a_time(model, tokenizer, question) for question in task.test()
    ]
    assert [answer.correct for answer in found.answers] == [
        answer.completion.strip() == answer.reference for answer in found.answers
    ]
    assert (found.answer_by, found.to_dict()["answer_by"]) == ("likelihood", "likelihood")


def test_choice_questions_in_any_order(carried, monkeypatch):
    model, tokenizer = carried
    task = spd.load_task("choice")
    questions = task.test()[:60]
    expected = {question.prompt: one_at_a_time(model, tokenizer, question) for question in questions}
    Random(0).shuffle(questions)
    monkeypatch.setattr(task, "test", lambda: questions)
    for batch_size in (1, 32):
        found = spd.evaluate(
            model, tokenizer, task, limit=60, answer_by="likelihood", batch_size=batch_size, progress=False
        )
        assert {answer.prompt: answer.completion for answer in found.answers} == expected
        assert [answer.prompt for answer in found.answers] == [question.prompt for question in questions]
        assert found.interval[0] <= found.accuracy <= found.interval[1]


@pytest.mark.parametrize(("name", "limit"), [("mmlu", 12), ("bbh", 14), ("bbh-ruin_names", 12)])
def test_real_questions(name, limit, carried, records):
    """Too long for the carried model are some; the others are answered as one at a time."""
    model, tokenizer = carried
    task = spd.load_task(name, records)
    asked = [q for q in task.test() if len(tokenizer(q.prompt)["input_ids"]) < 400][:limit]
    expected = [one_at_a_time(model, tokenizer, question) for question in asked]
    choices = [encode_choice(tokenizer, question.prompt, question.options) for question in asked]
    found = {}
    for batch in option_nlls(model, choices, batch_size=8, label="test"):
        found |= batch
    assert [q.options[found[i].index(min(found[i]))] for i, q in enumerate(asked)] == expected
    assert {len(choice.rows) for choice in choices if choice.texts[0].scored == 1} <= {1}


@pytest.mark.parametrize("name", ["mmlu", "bbh", "choice", "choice-ood"])
def test_one_option_is_right_by_the_tasks_own_rule(name, records):
    """Of the records whose target is one of their options: all of MMLU's, of BBH's all but three."""
    task = spd.load_task(name, records)
    asked = [question for question in task.test() if question.options]
    right = [sum(map(bool, task.judge(list(each.options), [each] * len(each.options)))) for each in asked]
    assert len(asked) >= 200
    assert [count for count in right if count != 1] == [0] * (3 if name == "bbh" else 0)


def test_single_tokens_take_one_pass_a_question(carried):
    model, _ = carried
    rows = []
    handle = model.register_forward_pre_hook(
        lambda module, args, given: rows.append(given["input_ids"].shape), with_kwargs=True
    )
    logits = []
    head = model.lm_head.register_forward_hook(lambda module, args, output: logits.append(output.shape[:2]))
    try:
        spd.evaluate(*carried, spd.load_task("choice"), limit=20, answer_by="likelihood", batch_size=8, progress=False)
    finally:
        handle.remove()
        head.remove()
    assert sum(shape[0] for shape in rows) == 20
    assert max(shape[0] for shape in rows) == 8
    assert all(made[1] <= shape[0] for made, shape in zip(logits, rows, strict=True))


@pytest.mark.parametrize("mode", ["hook", "fold", "latent_v", "latent"])
def test_under_an_intervention(mode, model, tokenizer, subspace_of):
    task, subspace = Colours(), subspace_of(model)
    with spd.attach(model, subspace, mode="hook"):
        expected = [one_at_a_time(model, tokenizer, question) for question in task.test()]
    with spd.attach(model, subspace, mode=mode):
        found = spd.evaluate(model, tokenizer, task, answer_by="likelihood", progress=False)
    assert [answer.completion for answer in found.answers] == expected


SHOTS = "Question: how many apples are there? Answer: there are 12. " * 3
SHARING = [
    (SHOTS + "Question: how many apples?", (" many", " there", " 1234")),
    (SHOTS + "Question: are there 4?", (" A", " B")),
    ("another question", (" A", " B")),
    (SHOTS[::-1] + "one", (" apples are there", " are 1234", " 12")),
    (SHOTS + "Question: how?", (" apples are there", " are 1234")),
]
"""A family of three, one question alone, and one whose own options are rows that share its prompt."""


def sums_of(model, tokenizer, batch_size=8):
    """Differences to each question's first option."""
    choices = [encode_choice(tokenizer, *each) for each in SHARING]
    found = {}
    for batch in option_nlls(model, choices, batch_size=batch_size, label="test"):
        found |= batch
    return [nll - found[index][0] for index in range(len(SHARING)) for nll in found[index]]


def sums_one_at_a_time(model, tokenizer):
    pairs = [[(prompt, option) for option in options] for prompt, options in SHARING]
    nlls = [completion_nll(model, tokenizer, own, batch_size=1, progress=False) for own in pairs]
    return [text.nll - own[0].nll for own in nlls for text in own]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_texts_begin_with_is_run_once(family, batch_size, make_model, tokenizer):
    model = make_model(family).double()
    tokens = []
    handle = model.register_forward_pre_hook(
        lambda module, args, given: tokens.append(given["input_ids"].numel()), with_kwargs=True
    )
    found = sums_of(model, tokenizer, batch_size)
    handle.remove()
    assert found == pytest.approx(sums_one_at_a_time(model, tokenizer), rel=1e-9, abs=1e-9)
    if batch_size == 32:
        rows = [row for each in SHARING for row in encode_choice(tokenizer, *each).rows]
        shares = family != "gemma3"  # which has windows
        assert (sum(tokens) < 0.6 * sum(len(row.tokens) for row in rows)) == shares


@pytest.mark.parametrize("mode", ["hook", "fold", "latent_v", "latent"])
def test_it_is_run_once_under_an_intervention(mode, model, tokenizer, subspace_of):
    subspace = subspace_of(model)
    with spd.attach(model, subspace, mode="hook"):
        expected = sums_one_at_a_time(model, tokenizer)
    with spd.attach(model, subspace, mode=mode):
        assert sums_of(model, tokenizer) == pytest.approx(expected, abs=2e-3)


def test_it_is_run_once_under_an_adapter(model, tokenizer):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    tuned = get_peft_model(model, lora)
    assert sums_of(tuned, tokenizer) == pytest.approx(sums_one_at_a_time(tuned, tokenizer), abs=1e-3)


def test_what_is_written_is_resumed_and_told_apart(model, tokenizer, tmp_path):
    task, out = Colours(), tmp_path / "colours.jsonl"
    settings = {"out": out, "answer_by": "likelihood", "progress": False}
    whole = spd.evaluate(model, tokenizer, task, batch_size=3, **settings)
    assert [each.completion for each in read_generations(out)] == [answer.completion for answer in whole.answers]
    scored = [json.loads(line) for line in out.with_suffix(".scored.jsonl").read_text().splitlines()]
    assert [each["completion"] for each in scored] == [answer.completion for answer in whole.answers]
    assert json.loads(out.with_suffix(".settings.json").read_text())["answer_by"] == "likelihood"

    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:2]) + lines[2][:9])
    passes = []
    handle = model.register_forward_hook(lambda module, args, output: passes.append(len(output.logits)))
    again = spd.evaluate(model, tokenizer, task, batch_size=3, **settings)
    handle.remove()
    assert again == whole
    assert sorted(out.read_bytes().splitlines()) == sorted(line.rstrip() for line in lines)
    assert sum(passes) < sum(len(question.options) for question in task.test())

    with pytest.raises(spd.InputError, match="was made with another"):
        spd.evaluate(model, tokenizer, task, out=out, progress=False)
    with pytest.raises(spd.InputError, match=r"was made with another .*answer_by"):
        other = tmp_path / "generated.jsonl"
        spd.evaluate(model, tokenizer, task, out=other, progress=False)
        spd.evaluate(model, tokenizer, task, **(settings | {"out": other}))
    with pytest.raises(spd.InputError, match=r"was made with another .*options"):
        task.asked = [Question(each.prompt, each.reference, "", each.options[::-1]) for each in Colours.asked]
        spd.evaluate(model, tokenizer, task, **settings)


def test_another_intervention_is_told_apart(model, tokenizer, subspace_of, tmp_path):
    subspace = subspace_of(model)
    settings = {"out": tmp_path / "colours.jsonl", "answer_by": "likelihood", "progress": False}
    with spd.attach(model, subspace, mode="hook"):
        whole = spd.evaluate(model, tokenizer, Colours(), **settings)
        assert spd.evaluate(model, tokenizer, Colours(), **settings) == whole
    with (
        spd.attach(model, subspace.truncate(2), mode="hook"),
        pytest.raises(spd.InputError, match="was made with another intervention"),
    ):
        spd.evaluate(model, tokenizer, Colours(), **settings)


def test_logits_that_are_not_finite_choose_nothing(model, tokenizer):
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(spd.InputError, match=r"^model: expected finite logits, .* question \d, '.*float32"):
        spd.evaluate(model, tokenizer, Colours(), answer_by="likelihood", progress=False)


def test_the_parts_of_options_are_sums(model, tokenizer):
    """The common beginning of options is left out: a constant less than what `completion_nll` finds."""
    prompt, options = "Question: how", (" many apples", " many apple trees", " many")
    (found,) = (each[0] for each in option_nlls(model, [encode_choice(tokenizer, prompt, options)], label="test"))
    whole = completion_nll(model, tokenizer, [(prompt, option) for option in options], progress=False)
    constant = whole[0].nll - found[0]
    assert [each.nll - constant for each in whole] == pytest.approx(found, rel=1e-5)
    assert min(found) > 0


def test_json_lines_with_options(model, tokenizer, tmp_path):
    path = tmp_path / "colours"
    path.mkdir()
    record = {"prompt": "the sky is", "completion": " B", "options": [" A", " B", " C"]}
    (path / "test.jsonl").write_text(json.dumps(record) + "\n" + json.dumps(record | {"prompt": "and grass"}) + "\n")
    task = spd.load_task(str(path), prompts="plain")
    found = spd.evaluate(model, tokenizer, task, answer_by="likelihood", progress=False)
    assert [answer.completion for answer in found.answers] == [
        one_at_a_time(model, tokenizer, question) for question in task.test()
    ]
    for options, message in [
        ([" A"], "options: expected two or more"),
        ([" B", " B"], "options: expected two or more"),
        ([" A", " C"], "options: by the metric 'exact' none of them is right"),
        ([" B", 3], "options: expected str, got 3"),
        (" A", "options: expected list"),
    ]:
        (path / "test.jsonl").write_text(json.dumps(record | {"options": options}) + "\n")
        with pytest.raises(spd.InputError, match=f"line 1: {message}"):
            spd.load_task(str(path)).test()


def test_options_inside_a_chat_template(model, tokenizer):
    talking = copy.deepcopy(tokenizer)
    talking.chat_template = "{% for turn in messages %}Question: {{ turn['content'] }}\nAnswer:\n{% endfor %}"
    task = ChatTask(Colours(), talking)
    first, second = task.test()[:2]
    assert (first.options, second.reference) == (("blue", "red", "green"), "5")
    found = spd.evaluate(model, talking, task, answer_by="likelihood", progress=False)
    assert [answer.completion for answer in found.answers] == [
        one_at_a_time(model, talking, question) for question in task.test()
    ]


def test_questions_too_long_for_the_model_are_left_out(model, tokenizer):
    task = Colours()
    long = Question("~" * 511, "x", "", (" A", " B"))
    task.asked = [long, *Colours.asked, Question("~" * 511, "x", "", (" A",))]
    with pytest.warns(
        UserWarning, match="2 of 6 questions of colours are too long for the model and are left out: 0, 5"
    ):
        found = spd.evaluate(model, tokenizer, task, answer_by="likelihood", progress=False)
    assert list(found.too_long) == [0, 5]
    assert found.n == 4


def test_what_has_no_options_is_refused(model, tokenizer, made_records):
    with pytest.raises(spd.InputError, match=r"^answer_by: 6 of 6 questions of gsm8k have no options"):
        spd.evaluate(model, tokenizer, spd.load_task("gsm8k", made_records), answer_by="likelihood", progress=False)
    with pytest.raises(spd.InputError, match=r"^answer_by: expected one of generation, likelihood, got 'letters'"):
        spd.evaluate(model, tokenizer, Colours(), answer_by="letters")
    with pytest.raises(spd.InputError, match=r"^batch_size"):
        spd.evaluate(model, tokenizer, Colours(), answer_by="likelihood", batch_size=0, progress=False)
