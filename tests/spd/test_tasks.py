"""The tasks on made and on real records: prompts, spans, splits, what counts as right, and bad records."""

import json
import shutil
from collections import Counter
from decimal import Decimal
from itertools import pairwise
from pathlib import Path

import pytest

import spd
from spd.tasks import DATA_SETS, task_names
from spd.tasks.answers import find_brackets, find_letter, find_number, find_word, find_words
from spd.tasks.bbh import PUBLISHED_NUMBER, SUBTASKS
from spd.tasks.numeric import final_number, marked_span, same_number
from spd.tasks.python_code import extract_code, parses, runnable_code
from spd.tasks.records import round_robin

SUM = "def total(a, b):\n    return a + b"


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def function(number, **changes):
    """A record of MBPP's kind."""
    code = f"def plus_{number}(n):\r\n    return n + {number}"
    tests = [f"assert plus_{number}({n}) == {n + number} " for n in (1, 2, 2)]  # with a blank, and one of them twice
    return {"task_id": number, "text": f"Add {number} to n.", "code": code, "test_list": tests, **changes}


def choice(number, subject="sums", **changes):
    """A record of MMLU's kind."""
    options = [str(number + offset) for offset in range(4)]
    row = {"question": f" What is {number} and one?", "subject": subject, "choices": options, "answer": 1}
    return {**row, **changes}


TARGETS = {"boolean_expressions": "True", "navigate": "No", "sports_understanding": "yes", "dyck_languages": "] )"}


@pytest.fixture(scope="session")
def made(made_records, tmp_path_factory):
    """The data folder of `made_records` with the other four data sets, small."""
    folder = tmp_path_factory.mktemp("data") / "all"
    shutil.copytree(made_records, folder)
    write(folder / "mbpp/train.jsonl", [function(number) for number in range(601, 607)])
    write(folder / "mbpp/validation.jsonl", [function(number) for number in range(511, 514)])
    write(folder / "mbpp/prompt.jsonl", [function(number) for number in range(1, 6)])
    sanitized = [function(number, test_imports=["import math"]) for number in range(11, 15)]
    write(folder / "mbpp_sanitized/test.jsonl", [{**row, "prompt": row.pop("text")} for row in sanitized])
    outputs = [SUM if number % 2 else "<p>sum</p>" for number in range(130)]
    rows = [{"instruction": f"Sum, {n}", "input": "a, b" * (n % 3), "output": text} for n, text in enumerate(outputs)]
    write(folder / "codealpaca/train.jsonl", rows)
    subjects = ("sums", "more_sums", "last_sums")
    for split, count in (("dev", 6), ("validation", 9), ("test", 12)):
        start = {"dev": 0, "validation": 100, "test": 200}[split]
        rows = [choice(start + n, subject) for subject in subjects for n in range(count)]
        write(folder / f"mmlu/{split}.jsonl", rows)
    for subtask in SUBTASKS:
        target = TARGETS.get(subtask, "(B)")
        rows = [{"input": f"{subtask} {number}?\nOptions:\n(A) a\n(B) b", "target": target} for number in range(60)]
        write(folder / f"bbh/{subtask}.jsonl", rows)
    return folder


# What an answer is


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


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *((text, "B") for text in (" B", "B.", "(b)", "b", "b.", "B. Paris", "B) Paris", "**B**", "'B'", "B\n\nA. no")),
        *(
            (text, "A")
            for text in ("A", "A. Paris", "A) Paris", "A: Paris", '"A"', "A, because B is not", "\\boxed{A}")
        ),
        ("The answer is (B).", "B"),
        ("The answer is A because B is wrong", "A"),
        ("the answer is b", "B"),
        ("The correct answer is option A because", "A"),
        ("The answer to this question is B, not C", "B"),
        ("Answer:\n\nC. Paris", "C"),
        ("The best choice is C. Or D?", "C"),
        ("The answer is not B. The answer is C.", "C"),
        ("Neither (A) nor (B): the answer is (D)", "D"),
        ("Option A is wrong, option (B) is wrong. So it is (C).", "C"),
        ("I believe that A is correct, as B fails.", "A"),
        ("A good approach is to think, so D", "D"),  # the article is no answer
        ("A good approach is to think.", None),
        ("The answer is a prime number", None),
        ("The answer is not B.", "B"),  # there is no better one
        ("vitamin C's role, e.g. here", None),
        ("E", None),
        ("ABCD", None),
        ("", None),
    ],
)
def test_the_letter_a_completion_chooses(text, letter):
    assert find_letter(text) == letter


def test_the_pronoun_is_no_letter():
    assert find_letter("I think it is (I)", "ABCDEFGHI") == "I"
    assert find_letter("I think so", "ABCDEFGHI") is None


@pytest.mark.parametrize(
    ("find", "text", "answer"),
    [
        (lambda text: find_word(text, ("yes", "no")), "No, because yes is wrong", "no"),
        (lambda text: find_word(text, ("yes", "no")), "Yes it is, no doubt", "yes"),
        (lambda text: find_word(text, ("yes", "no")), "is it so? The answer is yes. No other", "yes"),
        (lambda text: find_word(text, ("yes", "no")), "no, but none knows nothing", "no"),
        (lambda text: find_word(text, ("yes", "no")), "none knows", None),
        (lambda text: find_word(text, ("true", "false")), "True and False is False", "false"),
        (lambda text: find_word(text, ("valid", "invalid")), "**Invalid**", "invalid"),
        (find_number, " 24.\nNext: 5", 24),
        (find_number, "1. There are 3.\n2. The answer is 8 pens, of 9", 8),
        (find_number, "the answer is 3 - 5 = -2.", -2),
        (find_number, "((3)) = 3 - 4 = -1", -1),
        (find_number, "many", None),
        (find_brackets, " ] ] }", "]]}"),
        (find_brackets, "(as it were) so we close `] )`", "])"),
        (find_brackets, "The answer is: \n] }\nand [ is open", "]}"),
        (find_brackets, "none", None),
        (find_words, "Sorted: ant Bee, cat.", ["ant", "bee", "cat"]),
        (find_words, "The answer is ant bee", ["ant", "bee"]),
        (find_words, "Here:\n1. ant\n2. bee\n\n3. cat", ["ant", "bee", "cat"]),
        (find_words, "ant bee\nThat is the list.", ["ant", "bee"]),
        (find_words, "", []),
    ],
)
def test_other_answers(find, text, answer):
    assert find(text) == answer


@pytest.mark.parametrize(
    "completion",
    [
        SUM,
        f"Here it is:\n```python\n{SUM}\n```\nand a test:\n```\nassert False\n```",
        f"{SUM}\n```\nThe prompt opened that block.\n```python\nassert False\n```",
        f"Cut off:\n```\n{SUM}",
        f"Sure! Here it is:\n\n{SUM}",
        "    " + SUM.replace("\n", "\n    "),
        "```python\n  " + SUM.replace("\n", "\n  ") + "\n```",
    ],
)
def test_code_is_cut_out_of_prose(completion):
    assert extract_code(completion) == SUM


def test_what_parses():
    assert parses(SUM)
    assert parses("x = '\\d'")  # a warning, not an error
    for text in ("def f(:", "", "  \n", "# a remark", "x = '\0'", "9" * 5_000, "[" * 5_000, "x = 1\n" * 100_000):
        assert not parses(text), text[:20]


@pytest.mark.parametrize(
    "text",
    [
        "-" * 90_000 + "1",
        "a" + ".a" * 45_000,
        "1" + "+1" * 45_000,
        "lambda:" * 12_000 + "1",
        "if 1:\n pass\n" + "elif 1:\n pass\n" * 6_000,
    ],
)
def test_deep_code_parses_or_not_but_does_no_harm(text):
    """What is too deep differs between versions of Python."""
    assert parses(text) in (True, False)


# Every data set, on made records


def spans_of(example):
    return [example.text[start:end] for start, end in example.spans]


@pytest.mark.parametrize("name", ["gsm8k", "svamp"])
def test_word_problems(name, made_records):
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


def test_mbpp(made):
    task = spd.load_task("mbpp", made)
    calibration, prompts = task.calibration(), task.training_prompts()
    assert [example.prompt for example in calibration] == prompts
    assert len(prompts) == 9
    first = calibration[0]
    lines = [f"assert plus_601({n}) == {n + 601}" for n in (1, 2, 2)]
    assert spans_of(first) == lines == [line for line in first.prompt.splitlines() if line.startswith("assert")]
    assert all(end <= len(first.prompt) for _, end in first.spans)
    assert len(set(first.spans)) == 3
    assert first.completion == "def plus_601(n):\n    return n + 601"
    question = task.test()[0]
    assert question.prompt.startswith("Task: Add 11 to n.\n")
    assert question.reference.splitlines()[0] == "import math"
    assert task.runs_code
    assert (task.test_size, len(task.test())) == (None, 4)


def test_mbpp_is_judged_by_running_it(made):
    task = spd.load_task("mbpp", made)
    question, other = task.test()[:2]
    right = "def plus_11(n):\n    return n + 11"
    assert task.is_correct(f"Here:\n```python\n{right}\n```", question)
    completions = [right, right, "def plus_11(n):\n    return n", "import sys\nsys.exit(0)", ""]
    verdicts = task.judge(completions, [question, other, question, question, question])
    assert verdicts == [True, False, False, False, False]


def test_codealpaca(made):
    task = spd.load_task("codealpaca", made)
    calibration, test = task.calibration(), task.test()
    assert (task.metric, len(calibration), len(test)) == ("nll", 30, 100)
    assert not {example.prompt for example in calibration} & {question.prompt for question in test}
    assert all(spans_of(example) == [example.completion] for example in calibration)
    verdicts = task.judge(["x = 1"] * 50 + ["x ="] * 50, test)
    assert verdicts == [None, True] * 25 + [None, False] * 25


def test_mmlu(made):
    task = spd.load_task("mmlu", made)
    test, calibration = task.test(), task.calibration()
    assert [question.group for question in test[:4]] == ["sums", "more_sums", "last_sums", "sums"]
    assert len(test) == 36
    assert test[0].prompt == "Question: What is 200 and one?\nA. 200\nB. 201\nC. 202\nD. 203\nAnswer:"
    assert task.judge([" B", " (C)", "none"], test[:3]) == [True, False, False]
    assert len(calibration) == 27  # of validation, since there is no auxiliary_train
    assert all(spans_of(example) == ["B"] and example.spans[0][0] > len(example.prompt) for example in calibration)


def test_mmlu_trains_on_the_auxiliary_split_where_it_is(made, tmp_path):
    write(tmp_path / "mmlu/auxiliary_train.jsonl", [choice(number, subject="") for number in range(2100)])
    (tmp_path / "mmlu/test.jsonl").write_text((made / "mmlu/test.jsonl").read_text())
    task = spd.load_task("mmlu", tmp_path)
    prompts = task.training_prompts()
    assert (len(prompts), len(set(prompts)), len(task.calibration())) == (2000, 2000, 2000)
    assert prompts == spd.load_task("mmlu", tmp_path).training_prompts()
    assert not set(prompts) & {question.prompt for question in task.test()}  # twelve of them are in both files


def test_bbh(made):
    task = spd.load_task("bbh", made)
    test, calibration = task.test(), task.calibration()
    groups = [question.group for question in test]
    assert groups[:300] == list(PUBLISHED_NUMBER) * 50
    assert Counter(groups) == dict.fromkeys(SUBTASKS, 60)
    assert len(calibration) == 60
    assert [example.prompt.split()[1] for example in calibration[:6]] == list(PUBLISHED_NUMBER)
    assert not {example.prompt for example in calibration} & {question.prompt for question in test[:300]}
    assert {*map(str, (spans_of(example)[0] for example in calibration))} == {"True", "No", "yes", "(B)"}
    for question in test:
        assert task.is_correct(f" {question.reference}", question)
        assert not task.is_correct(" maybe", question)


def test_one_subtask_of_bbh(made):
    task = spd.load_task("bbh-dyck_languages", made)
    assert (task.name, task.test_size, len(task.test()), len(task.calibration())) == ("bbh-dyck_languages", 50, 60, 10)
    assert task.test()[0].prompt.startswith("Q: dyck_languages 0?")
    assert task.training_prompts()[0].startswith("Q: dyck_languages 50?")
    assert task.judge([" ])", "the answer is ] )", "] ]"], task.test()[:3]) == [True, True, False]


def test_answers_of_bbh(made):
    def right(completion, target):
        return spd.load_task("bbh", made).is_correct(completion, spd.Question("", target))

    assert right("The argument is not valid.", "invalid")
    assert not right("It is deductively valid", "invalid")
    assert right("TRUE", "True")
    assert right("The total is 1,204", "1204")
    assert right("ant, bee and co", "ant, bee and co")


def test_round_robin():
    assert round_robin([[1, 2, 3], [4], [5, 6]]) == [1, 4, 5, 2, 6, 3]
    assert round_robin([]) == []


def test_names(made):
    assert list(DATA_SETS) == ["gsm8k", "svamp", "mbpp", "codealpaca", "mmlu", "bbh"]
    assert len(SUBTASKS) == 27
    for name in (*DATA_SETS, *(f"bbh-{subtask}" for subtask in SUBTASKS)):
        assert name in task_names()
        assert spd.load_task(name, made).name == name
    for wrong, message in (("gsm8", "did you mean 'gsm8k'"), ("bbh-snark", "did you mean 'bbh-snarks'")):
        with pytest.raises(spd.InputError, match=message):
            spd.load_task(wrong, made)


# On the real records


@pytest.mark.parametrize(
    ("name", "training", "test", "size"),
    [
        ("gsm8k", 7473, 1319, 100),
        ("svamp", 700, 300, 100),
        ("mbpp", 464, 257, None),
        ("codealpaca", 900, 100, None),
        ("mmlu", 1504, 14042, 200),  # validation without the 27 questions that the test has too
        ("bbh", 1199, 6511, 300),  # from the 51st on, without one that stands twice
        *((f"bbh-{subtask}", None, None, 50) for subtask in SUBTASKS),
    ],
)
def test_tasks_on_the_real_records(name, training, test, size, records):
    task = spd.load_task(name, records)
    calibration, prompts, questions = task.calibration(), task.training_prompts(), task.test()
    if name.startswith("bbh-"):
        test = {"causal_judgement": 187, "snarks": 178, "penguins_in_a_table": 146}.get(name[4:], 250)
        training = test - 50 - {"sports_understanding": 1, "causal_judgement": 2}.get(name[4:], 0)  # stand twice
    assert (len(calibration), len(prompts), len(questions)) == (training, training, test)
    assert [example.prompt for example in calibration] == prompts
    assert not set(prompts) & {question.prompt for question in questions[:size]}
    assert task.test_size == size
    for example in calibration:
        assert all(span.strip() == span for span in spans_of(example)) or name == "codealpaca"
    if name != "mbpp":  # which is run below
        verdicts = task.judge([question.reference for question in questions], questions)
        assert False not in verdicts
        assert verdicts.count(True) == (44 if name == "codealpaca" else test)


def test_spans_lie_on_what_they_should(records):
    for name in ("gsm8k", "svamp"):
        for example in spd.load_task(name, records).calibration():
            (span,) = spans_of(example)
            assert final_number(span) == final_number(example.completion)
    for example in spd.load_task("mbpp", records).calibration():
        lines = [line for line in example.prompt.splitlines() if line.startswith("assert")]
        assert spans_of(example) == lines
        assert len(lines) == 3
    for name in ("codealpaca", "mmlu", "bbh", *(f"bbh-{subtask}" for subtask in SUBTASKS)):
        for example in spd.load_task(name, records).calibration():
            assert "".join(spans_of(example)) == example.completion.removeprefix(" ")
            assert all(start >= len(example.prompt) for start, _ in example.spans)


def test_a_wrong_answer_of_bbh_and_mmlu_is_wrong(records):
    """A neighbour's answer, which is of the same kind, and prose that holds every word."""
    for name in ("mmlu", "bbh"):
        task = spd.load_task(name, records)
        by_group: dict[str, list[spd.Question]] = {}
        for question in task.test():
            by_group.setdefault(question.group, []).append(question)
        for questions in by_group.values():
            for question, neighbour in pairwise(questions):
                assert task.is_correct(neighbour.reference, question) == (neighbour.reference == question.reference)
            assert not any(task.judge(["A completion that says nothing."] * len(questions), questions))


def test_every_prefix_of_mmlu_is_spread_over_the_subjects(records):
    test = spd.load_task("mmlu", records).test()
    counts = Counter(question.group for question in test[:200])
    assert len(counts) == 57
    assert set(counts.values()) == {3, 4}


def reference_solutions(records, step):
    task = spd.load_task("mbpp", records)
    rows = read(records / "mbpp_sanitized" / "test.jsonl")
    return task, [row["code"] for row in rows][::step], task.test()[::step]


def test_solutions_of_mbpp_pass(records):
    task, solutions, questions = reference_solutions(records, step=13)
    assert task.judge(solutions, questions) == [True] * 20
    assert task.judge([f"Here:\n```python\n{code}\n```" for code in solutions[:3]], questions[:3]) == [True] * 3
    assert not any(task.judge(solutions[1:], questions[:-1]))


@pytest.mark.slow
def test_all_solutions_of_mbpp_pass(records):
    task, solutions, questions = reference_solutions(records, step=1)
    assert task.judge(solutions, questions) == [True] * 257


# As lm-evaluation-harness asks


def test_harness_prompts_on_made_records(made):
    def asked(name):
        return spd.load_task(name, made, prompts="harness").test()

    gsm8k = [question.prompt for question in asked("gsm8k")]
    assert all(prompt.count("\n\nQuestion: ") == 5 for prompt in gsm8k)
    assert len({prompt.partition("\n\n")[0] for prompt in gsm8k}) > 1  # shots are drawn anew
    assert asked("mmlu")[1].prompt.startswith(
        "The following are multiple choice questions (with answers) about more sums.\n\nWhat is 0 and one?\nA. 0\n"
    )
    assert asked("mmlu")[1].prompt.count("Answer: B\n\n") == 5
    mbpp = asked("mbpp")[0].prompt
    assert [mbpp.index(f"Add {number} to n.") for number in (2, 3, 4, 11)] == sorted(
        mbpp.index(f"Add {number} to n.") for number in (2, 3, 4, 11)
    )
    assert (mbpp.count("[BEGIN]\n"), mbpp.count("\n[DONE]\n\n")) == (4, 3)
    for name in ("bbh", "bbh-navigate"):
        for question in asked(name):
            shots = question.prompt.split("\n\n")
            assert len(shots) == 4
            assert shots[3].removesuffix("A:") not in "".join(shots[:3])  # never its own shot
    for name, plain in ((name, spd.load_task(name, made)) for name in ("gsm8k", "mmlu", "mbpp", "bbh")):
        harness = spd.load_task(name, made, prompts="harness")
        assert harness.training_prompts() == plain.training_prompts()
        assert harness.calibration() == plain.calibration()
        assert [question.reference for question in harness.test()] == [question.reference for question in plain.test()]
        assert harness.stop != plain.stop


def test_what_the_harness_does_not_have(made, tmp_path):
    for name in ("svamp", "codealpaca", task_names()[-1]):  # the last one is the proving ground's
        with pytest.raises(spd.InputError, match=f"prompts: lm-evaluation-harness does not have {name}"):
            spd.load_task(name, made, prompts="harness")
    with pytest.raises(spd.InputError, match="prompts: expected one of plain, chat, harness, got 'few'"):
        spd.load_task("gsm8k", made, prompts="few")
    with pytest.raises(spd.InputError, match="tokenizer: chat prompts need one, whose template they take, got None"):
        spd.load_task("gsm8k", made, prompts="chat")
    write(tmp_path / "gsm8k/train.jsonl", [{"question": "q", "answer": "#### 1"}] * 4)
    write(tmp_path / "gsm8k/test.jsonl", [{"question": "q", "answer": "#### 1"}])
    with pytest.raises(spd.InputError, match="need 5 records for shots, there are 4"):
        spd.load_task("gsm8k", tmp_path, prompts="harness").test()


def harness_contexts(file, rows, folder, monkeypatch, **changes):
    """What lm-evaluation-harness itself asks, with one of its task files on these rows."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness (lm_eval) is not installed")
    import evaluate
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    class Metric:
        compute = dict

    monkeypatch.setattr(evaluate, "load", lambda *_: Metric())  # mbpp's file fetches one when it is read
    for split, split_rows in rows.items():
        write(folder / f"{split}.jsonl", split_rows)
    files = {split: str(folder / f"{split}.jsonl") for split in rows}
    config = {
        **load_yaml(Path(lm_eval.tasks.__path__[0]) / file),
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder)},
        **changes,
    }
    task = ConfigurableTask(config=config)
    task.set_fewshot_seed(1234)
    return [task.fewshot_context(document, task.config.num_fewshot) for document in task.test_docs()]


def test_harness_prompts_are_the_harnesss_own(records, tmp_path, monkeypatch):
    def asked(name, group=""):
        questions = spd.load_task(name, records, prompts="harness").test()
        return [question.prompt for question in questions if question.group == group]

    rows = {split: read(records / f"gsm8k/{split}.jsonl") for split in ("train", "test")}
    assert asked("gsm8k") == harness_contexts("gsm8k/gsm8k.yaml", rows, tmp_path / "gsm8k", monkeypatch)

    mbpp = [{**row, "text": row["prompt"]} for row in read(records / "mbpp_sanitized/test.jsonl")]
    assert asked("mbpp") == harness_contexts("mbpp/mbpp.yaml", {"test": mbpp}, tmp_path / "mbpp", monkeypatch)

    for subject in ("anatomy", "us_foreign_policy"):
        rows = {
            split: [row for row in read(records / f"mmlu/{split}.jsonl") if row["subject"] == subject]
            for split in ("dev", "test")
        }
        file = f"mmlu/default/mmlu_{subject}.yaml"
        contexts = harness_contexts(file, rows, tmp_path / subject, monkeypatch, num_fewshot=5)
        assert asked("mmlu", subject) == contexts

    rows = read(records / "bbh/snarks.jsonl")
    ours = {"description": "", "fewshot_config": {"sampler": "first_n", "samples": rows[:-4:-1]}}
    contexts = harness_contexts("bbh/fewshot/snarks.yaml", {"test": rows}, tmp_path / "bbh", monkeypatch, **ours)
    assert asked("bbh-snarks", "snarks")[:-3] == contexts[:-3]


# Where records come from, and what is wrong with them


HUB = {
    "gsm8k": {("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")},
    "svamp": {("ChilleD/SVAMP", None, "train"), ("ChilleD/SVAMP", None, "test")},
    "mbpp": {
        ("google-research-datasets/mbpp", "full", "train"),
        ("google-research-datasets/mbpp", "full", "validation"),
        ("google-research-datasets/mbpp", "sanitized", "test"),
    },
    "codealpaca": {("sahil2801/CodeAlpaca-20k", None, "train")},
    "mmlu": {("cais/mmlu", "all", "auxiliary_train"), ("cais/mmlu", "all", "test")},
    "bbh": {("SaylorTwift/bbh", subtask, "test") for subtask in SUBTASKS},
}


@pytest.mark.parametrize("name", HUB)
def test_records_from_the_hub(name, made, monkeypatch):
    """What is asked of `datasets`, which itself is not reached; the rows come from the made folder."""
    asked = set()

    def load_dataset(repository, configuration, *, split):
        asked.add((repository, configuration, split))
        folder = "mbpp_sanitized" if configuration == "sanitized" else name
        file = {"bbh": configuration, "mmlu": "dev" if split == "auxiliary_train" else split}.get(name, split)
        return read(made / folder / f"{file}.jsonl")

    monkeypatch.setattr(pytest.importorskip("datasets"), "load_dataset", load_dataset)
    task, local = spd.load_task(name), spd.load_task(name, made)
    assert task.test() == local.test()
    assert len(task.training_prompts()) == (18 if name == "mmlu" else len(local.training_prompts()))
    assert asked == HUB[name]


def test_the_hub_out_of_reach(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route to host\nwith details")

    monkeypatch.setattr(pytest.importorskip("datasets"), "load_dataset", load_dataset)
    with pytest.raises(spd.InputError, match=r"openai/gsm8k could not be loaded from the hub \(no route to host\)$"):
        spd.load_task("gsm8k").test()


@pytest.mark.parametrize(
    ("name", "file", "record", "message"),
    [
        ("gsm8k", "train", {"question": "q"}, "record 1: answer missing; it has question"),
        ("gsm8k", "train", {"question": "q", "answer": "5"}, "record 1: the answer does not end in '#### n'"),
        ("gsm8k", "train", {"question": " ", "answer": "#### 5"}, "record 1: question: is empty"),
        ("gsm8k", "train", {"question": None, "answer": "#### 5"}, "record 1: question: expected str, got None"),
        ("gsm8k", "train", {"question": "q", "answer": 5}, "record 1: answer: expected str, got 5"),
        ("gsm8k", "train", {"question": "q", "answer": ["#### 5"]}, "record 1: answer: expected str, got"),
        ("mbpp", "train", function(1, test_list=[]), "record 1: test_list: expected assert statements, got \\[\\]"),
        ("mbpp", "train", function(1, test_list=["print(1)"]), "record 1: test_list: expected assert statements"),
        ("mbpp", "train", function(1, code="\n"), "record 1: code: is empty"),
        ("mbpp", "train", function(1, prompt="Else."), "record 1: prompt and text mean the same field but differ"),
        ("mmlu", "dev", choice(1, choices=["1", "2", "3"]), r"record 1: choices: expected four texts, got \['1'"),
        ("mmlu", "dev", choice(1, choices=["1", "2", "3", 4]), "record 1: choices: expected four texts"),
        (
            "mmlu",
            "dev",
            choice(1, choices=["1", " ", "3", "4"]),
            "record 1: choices: the right one, number 1, is empty",
        ),
        ("mmlu", "dev", choice(1, answer=4), "record 1: answer: expected 0, 1, 2 or 3, got 4"),
        ("mmlu", "dev", choice(1, answer=-1), "record 1: answer: expected 0, 1, 2 or 3, got -1"),
        ("mmlu", "dev", choice(1, answer="B"), "record 1: answer: expected int, got 'B'"),
        ("bbh-navigate", "navigate", {"input": "q", "target": ""}, "record 1: target: is empty"),
    ],
)
def test_a_bad_record_is_named(name, file, record, message, tmp_path):
    folder = name.partition("-")[0]
    write(tmp_path / folder / f"{file}.jsonl", [record])
    with pytest.raises(spd.InputError, match=rf"{folder}/{file}\.jsonl, {message}"):
        spd.load_task(name, tmp_path).calibration()


def test_empty_outputs_of_codealpaca_are_counted_and_named(tmp_path):
    records = [{"instruction": f"i{n}", "input": "", "output": f"print({n})"} for n in range(104)]
    records[1]["output"] = " "
    write(tmp_path / "codealpaca/train.jsonl", records)
    with pytest.warns(UserWarning, match=r"codealpaca: 1 of 104 records have an empty output and are left out: \[2\]"):
        assert len(spd.load_task("codealpaca", tmp_path).training_prompts()) == 3
    records[50]["output"] = ""
    write(tmp_path / "codealpaca/train.jsonl", records)
    with pytest.raises(spd.InputError, match="record 51: output: is empty, and it is a test question"):
        spd.load_task("codealpaca", tmp_path).test()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no record"),
        ('{"question": "q", "answer": "#### 5"}\n[]\n', "line 2: expected an object"),
        ('{"question": "q", \n', "line 1: not JSON"),
        ('{"question": "q", "answer": "#### 5"}\n{"question": "\xe9"}\n', r"train\.jsonl, line 2: not JSON .*utf-8"),
        ('{"question": "q", "answer": "#### 5"}\n{"question": "q"}\n', r"train\.jsonl, record 2: answer missing"),
    ],
)
def test_a_bad_file_is_named(content, message, tmp_path):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "train.jsonl").write_text(content, encoding="latin-1")
    with pytest.raises(spd.InputError, match=message):
        spd.load_task("gsm8k", tmp_path).calibration()


def test_a_bad_test_record_is_named(tmp_path):
    write(tmp_path / "mbpp_sanitized/test.jsonl", [function(11, test_imports=[]), function(12)])
    with pytest.raises(spd.InputError, match=r"test\.jsonl, record 2: test_imports missing"):
        spd.load_task("mbpp", tmp_path).test()
    write(tmp_path / "mbpp_sanitized/test.jsonl", [function(11, test_imports=[1])])
    with pytest.raises(spd.InputError, match=r"record 1: test_imports: expected import statements, got \[1\]"):
        spd.load_task("mbpp", tmp_path).test()


def test_duplicate_ids_are_named(tmp_path):
    write(tmp_path / "mbpp/train.jsonl", [function(1), function(2), function(1, text="Else.")])
    with pytest.raises(spd.InputError, match=r"mbpp/train\.jsonl, record 3: task_id 1 is record 1's too"):
        spd.load_task("mbpp", tmp_path).training_prompts()
    row = {"ID": "chal-1", "Body": "b", "Question": "q?", "Equation": "( 1.0 )", "Answer": "1"}
    write(tmp_path / "svamp/test.jsonl", [row, row])
    with pytest.raises(spd.InputError, match=r"svamp/test\.jsonl, record 2: ID 'chal-1' is record 1's too"):
        spd.load_task("svamp", tmp_path).test()


def test_half_the_splits(made, tmp_path):
    """Each use asks only for the files it needs, and names the one that is missing."""
    halves = {"gsm8k": "train", "svamp": "train", "mbpp": "train", "mmlu": "dev"}
    with pytest.raises(spd.InputError, match="not a folder"):
        spd.load_task("gsm8k", tmp_path / "nowhere")
    for name, training in halves.items():
        test = "mbpp_sanitized" if name == "mbpp" else name
        task = spd.load_task(name, tmp_path)
        with pytest.raises(spd.InputError, match=rf"{test}/test\.jsonl is missing"):
            task.test()
        with pytest.raises(spd.InputError, match=rf"{training}\.jsonl is missing|mmlu holds none of auxiliary_train, "):
            task.calibration()
        write(tmp_path / test / "test.jsonl", read(made / test / "test.jsonl"))
        assert spd.load_task(name, tmp_path).test() == spd.load_task(name, made).test()
        (tmp_path / test / "test.jsonl").unlink()
        for split in {training, "validation"} if name == "mbpp" else {training}:
            write(tmp_path / name / f"{split}.jsonl", read(made / name / f"{split}.jsonl"))
        assert spd.load_task(name, tmp_path).training_prompts()
    write(tmp_path / "bbh/snarks.jsonl", read(made / "bbh/snarks.jsonl"))
    assert len(spd.load_task("bbh-snarks", tmp_path).test()) == 60
    with pytest.raises(spd.InputError, match=r"bbh/boolean_expressions\.jsonl is missing"):
        spd.load_task("bbh", tmp_path).test()


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


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("def f(x):\n    return x\n\nThis function returns x.\nIt does.", "def f(x):\n    return x\n"),
        ("def f(x):\n    return x", "def f(x):\n    return x"),
        ("no code at all", "no code at all"),
    ],
)
def test_prose_behind_code_is_not_run(completion, code):
    assert runnable_code(completion).strip() == code.strip()
