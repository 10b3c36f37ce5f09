"""Tasks of the user's own: JSON Lines with a few settings, or a class by its name."""

import json
import sys
import textwrap

import pytest

import spd
from spd.tasks.base import Question, Task
from spd.tasks.custom import calibration_by_rule, load_custom
from spd.tasks.jsonl import JsonlTask
from spd.tasks.matching import same_answer

RECORDS = [{"prompt": f"{n} and {n} are", "completion": f" {n} + {n}\n#### {2 * n}"} for n in range(2, 12)]


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [each if isinstance(each, str) else json.dumps(each) for each in records]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture
def folder(tmp_path):
    """A whole task of the user's own."""
    write(tmp_path / "sums" / "train.jsonl", RECORDS[:7])
    write(tmp_path / "sums" / "test.jsonl", [record | {"group": "even"} for record in RECORDS[7:]])
    settings = ('spans = "answer"', 'metric = "number"', "max_new_tokens = 12", "calibration_size = 5", "test_size = 2")
    (tmp_path / "sums" / "task.toml").write_text("\n".join([*settings, r'stop = ["\n\n"]']))
    return tmp_path / "sums"


def test_a_folder_is_a_task(folder):
    task = JsonlTask(folder)
    assert (task.name, task.max_new_tokens, task.calibration_size, task.test_size) == ("sums", 12, 5, 2)
    assert (task.stop, task.metric, task.runs_code) == (("\n\n",), "accuracy", False)
    assert task.training_prompts() == [record["prompt"] for record in RECORDS[:7]]
    for example, record in zip(task.calibration(), RECORDS[:7], strict=True):
        ((start, end),) = example.spans
        assert example.text == record["prompt"] + record["completion"]
        assert example.text[start:end] == record["completion"].rpartition(" ")[2]
    questions = task.test()
    assert questions == [Question(each["prompt"], each["completion"], "even") for each in RECORDS[7:]]
    assert task.judge(["so it is 18.", "#### 20.0", "none"], questions) == [True, True, False]


def test_settings_given_in_the_call_go_first(folder):
    task = JsonlTask(folder, name="mine", stop=["."], spans=r"regex:\+", test_size=None)
    assert (task.name, task.stop, task.test_size, task.max_new_tokens) == ("mine", (".",), None, 12)
    assert [e.text[slice(*e.spans[0])] for e in task.calibration()] == ["+"] * 7


def test_a_file_is_a_task_without_a_test(tmp_path):
    task = JsonlTask(write(tmp_path / "sums.jsonl", RECORDS), spans="completion")
    assert (task.name, len(task.calibration()), len(task.training_prompts())) == ("sums", 10, 10)
    with pytest.raises(spd.InputError, match="sums: a single file has no test split"):
        task.test()


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([[0, 2], [3, 4]], ["ab", "5"]),
        (["5"], ["5"]),
        (["b", [2, 3]], ["b", " "]),
        (["b 5"], ["b 5"]),
        ([], []),
        (None, ["5 5"]),
    ],
)
def test_a_records_own_spans_go_before_the_rule(spans, expected, tmp_path):
    """Pairs, or pieces of the text, of which the last occurrence counts."""
    first = {"prompt": "ab", "completion": " 5 5", "spans": spans}
    task = JsonlTask(write(tmp_path / "a.jsonl", [first, RECORDS[0]]), spans="answer")
    example, other = task.calibration()
    assert [example.text[start:end] for start, end in example.spans] == expected
    assert spans != ["5"] or example.spans == [(5, 6)]
    assert other.text[slice(*other.spans[0])] == "4"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "q", "answer": "a"}, "line 3: prompt, completion missing; it has question, answer"),
        ({"prompt": "q"}, "line 3: completion missing; it has prompt"),
        ({"prompt": "q", "completion": "a", "span": []}, "line 3: unknown field 'span'; did you mean 'spans'"),
        ({"prompt": "q", "completion": "a", "x": 1}, r"line 3: unknown field 'x'; the fields are \['prompt', "),
        ({"prompt": "q", "completion": " \n"}, "line 3: completion: is empty"),
        ({"prompt": "", "completion": "a"}, "line 3: prompt: is empty"),
        ({"prompt": "q", "completion": 5}, "line 3: completion: expected str, got 5"),
        ({"prompt": "q", "completion": "a", "id": 1.5}, "line 3: id: expected str or int, got 1.5"),
        ({"prompt": "q", "completion": "a", "id": True}, "line 3: id: expected str or int, got True"),
        ({"prompt": "q", "completion": "a", "group": 1}, "line 3: group: expected str, got 1"),
        ({"prompt": "q", "completion": "a", "spans": "a"}, "line 3: spans: expected list, got 'a'"),
        ({"prompt": "q", "completion": "a", "spans": [[1, 3]]}, r"line 3: .*\(1, 3\).* inside the text.* 2 characters"),
        ({"prompt": "q", "completion": "a", "spans": [[1]]}, "line 3: .*pairs"),
        ({"prompt": "q", "completion": "a", "spans": ["b"]}, "line 3: spans: 'b' does not occur"),
        ({"prompt": "q", "completion": "a", "spans": [""]}, "line 3: spans: '' does not occur"),
        ({"prompt": "q", "completion": "a\ud800"}, "line 3: not JSON .half of a surrogate pair"),
        ("[]", "line 3: expected an object"),
        ("{", "line 3: not JSON"),
    ],
)
def test_a_bad_record_is_named_by_its_line(record, message, tmp_path):
    path = write(tmp_path / "train.jsonl", [RECORDS[0], "", record])
    with pytest.raises(spd.InputError, match=rf"train\.jsonl, {message}"):
        JsonlTask(path, spans="answer").training_prompts()


def test_duplicate_ids_are_named_by_both_lines(tmp_path):
    records = [{"id": 1}, {"id": "1"}, "", {"id": 2}, {}, {"id": None}, {"id": None}, {"id": 1}]
    records = [each if each == "" else {"prompt": "q", "completion": "a"} | each for each in records]
    with pytest.raises(spd.InputError, match=r"train\.jsonl, lines 1 and 8: have the same id 1"):
        JsonlTask(write(tmp_path / "train.jsonl", records)).training_prompts()
    write(tmp_path / "train.jsonl", records[:-1])
    write(tmp_path / "test.jsonl", [{"id": 1, "prompt": "r", "completion": "a"}])
    assert len(JsonlTask(tmp_path).training_prompts()) == 6, "ids are unique in a file, not across the splits"


def test_a_missing_split_matters_when_it_is_asked_for(folder):
    (folder / "test.jsonl").unlink()
    task = JsonlTask(folder)
    assert len(task.calibration()) == len(task.training_prompts()) == 7
    with pytest.raises(spd.InputError, match=r"sums: .*test\.jsonl is missing"):
        task.test()
    write(folder / "test.jsonl", RECORDS[7:])
    (folder / "train.jsonl").unlink()
    task = JsonlTask(folder)
    assert len(task.test()) == 3
    with pytest.raises(spd.InputError, match=r"sums: .*train\.jsonl is missing"):
        task.calibration()
    (folder / "test.jsonl").unlink()
    with pytest.raises(spd.InputError, match=r"holds neither train\.jsonl nor test\.jsonl"):
        JsonlTask(folder)
    with pytest.raises(spd.InputError, match="there is no file or folder"):
        JsonlTask(folder / "nowhere")


def test_questions_that_are_training_prompts_are_refused_whatever_is_asked_for(folder):
    write(folder / "test.jsonl", [RECORDS[8], RECORDS[3] | {"prompt": f" {RECORDS[3]['prompt']}\n"}, RECORDS[1]])
    for use in ("training_prompts", "calibration", "test"):
        with pytest.raises(
            spd.InputError, match=r"2 of 3 test questions are also .*test\.jsonl, line 2: ' 5 and 5 are"
        ):
            getattr(JsonlTask(folder), use)()


def test_a_record_needs_spans_only_for_calibration(tmp_path):
    task = JsonlTask(write(tmp_path / "a.jsonl", [RECORDS[0] | {"spans": [[0, 1]]}, RECORDS[1]]))
    assert len(task.training_prompts()) == 2
    with pytest.raises(spd.InputError, match=r"a\.jsonl, line 2: has no spans, and no rule .* spans = \"answer\""):
        task.calibration()
    task = JsonlTask(tmp_path / "a.jsonl", spans="regex:[+]|zzz")
    assert [len(example.spans) for example in task.calibration()] == [1, 1]
    write(tmp_path / "a.jsonl", RECORDS)
    with pytest.raises(spd.InputError, match="a: spans: nothing is marked in any of the 10 records"):
        JsonlTask(tmp_path / "a.jsonl", spans="asserts").calibration()


def test_a_rule_can_be_tried_on_records_with_spans_or_without(tmp_path):
    task = JsonlTask(write(tmp_path / "a.jsonl", [RECORDS[0] | {"spans": [[0, 1]]}, RECORDS[1]]))
    assert [e.text[slice(*e.spans[0])] for e in calibration_by_rule(task, "answer")] == ["4", "6"]
    words = spd.load_task("words")
    assert calibration_by_rule(words, "answer") == words.calibration()
    assert calibration_by_rule(words, "completion") != words.calibration()


def test_no_record_is_no_task(tmp_path):
    with pytest.raises(spd.InputError, match=r"a\.jsonl: holds no record"):
        JsonlTask(write(tmp_path / "a.jsonl", ["", ""])).training_prompts()


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ('metrics = "number"', "unknown key 'metrics'; did you mean 'metric'"),
        ("colour = 1", "unknown key 'colour'; the keys are"),
        ('metric = "nubmer"', "metric: there is no 'nubmer', only exact, number, .*; did you mean 'number'"),
        ('metric = "nl"', "metric: .*did you mean 'nll'"),
        ('metric = "regex:("', r"metric: 'regex:\(' is no regular expression"),
        ('spans = "anser"', "spans: rule: there is no 'anser'.*did you mean 'answer'"),
        ("max_new_tokens = 0", "max_new_tokens: .*greater than or equal to 1, got 0"),
        ('calibration_size = "5"', "calibration_size: .*integer, got '5'"),
        ('stop = "."', "stop: .*list, got '.'"),
        ('stop = [""]', r"stop\.0: .*at least 1 character, got ''"),
        ('name = "a/b"', "name: expected a name that a file can have, got 'a/b'"),
        ("name =", "not a TOML file"),
    ],
)
def test_bad_settings_are_named(toml, message, folder):
    (folder / "task.toml").write_text(toml)
    with pytest.raises(spd.InputError, match=rf"task\.toml: {message}"):
        JsonlTask(folder)


@pytest.mark.parametrize(
    ("rule", "reference", "right", "wrong"),
    [
        ("exact", " yes\n", ["yes", " yes "], ["Yes", "yes.", ""]),
        ("number", "so\n#### 1,000", ["it is $1000.00", "#### 1000 of 2"], ["1001", "none", ""]),
        ("contains", " red ", ["a red one", "red"], ["Red", ""]),
        ("letter", " B", ["B", " (B) it", "B. Red", "I think it is B", "**B**", "No, the answer is B", "Answer:\n(b)"],
         ["A", "Because", "The answer is C, not B", "", "ABBA", "I'm not sure"]),
        ("letter", "The answer is (I).", ["(I)", "Answer: I."], ["I think", "A"]),
        (r"regex:= (\d+)", "x = 12", ["y = 12", "a = 12, b = 3"], ["12", "a = 3, b = 12", ""]),
        (r"regex:^\w+$", "yes", ["no, or\nyes\nno"], ["no\nyes", ""]),
    ],
)  # fmt: skip
def test_ways_to_compare(rule, reference, right, wrong):
    for completion in right:
        assert same_answer(rule, completion, reference), completion
    for completion in wrong:
        assert not same_answer(rule, completion, reference), completion


@pytest.mark.parametrize("metric", ["number", "letter", r"regex:(\d)"])
def test_a_reference_without_an_answer_is_refused(metric, folder):
    write(folder / "test.jsonl", [{"prompt": "q", "completion": " (B) is 5"}, {"prompt": "r", "completion": " none"}])
    with pytest.raises(
        spd.InputError, match=r"test\.jsonl, line 2: completion: the metric .* finds no answer in ' none'"
    ):
        JsonlTask(folder, metric=metric).test()


def test_a_task_judged_by_likelihood_calls_nothing_right_or_wrong(folder):
    task = JsonlTask(folder, metric="nll")
    assert task.metric == "nll"
    assert task.judge(["a", "b", "c"], task.test()) == [None] * 3
    with pytest.raises(spd.InputError, match="sums: is judged by nll"):
        task.is_correct("a", task.test()[0])


def test_the_whole_method_runs_on_a_folder(folder, model, tokenizer):
    task = load_custom(str(folder))
    subspace = spd.calibrate(model, tokenizer, task.calibration(), progress=False)
    with spd.attach(model, subspace):
        found = spd.evaluate(model, tokenizer, task, max_new_tokens=3, progress=False)
    assert found.n == 2


def test_names_of_files_and_folders(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_custom("sums").name == load_custom("./sums").name == "sums"
    assert load_custom("sums/train.jsonl").name == "train"
    monkeypatch.chdir(folder)
    assert load_custom(".").name == "sums"
    assert load_custom("sums") is None, "no such folder here"
    assert load_custom("sums", tmp_path).name == "sums"
    assert load_custom("sums/train.jsonl", tmp_path).name == "train"
    assert load_custom("gsm8k") is load_custom("no.such/thing") is None
    (tmp_path / "empty").mkdir()
    assert load_custom(str(tmp_path / "empty")) is None
    (tmp_path / "empty" / "task.toml").touch()
    with pytest.raises(spd.InputError, match="holds neither"):
        load_custom(str(tmp_path / "empty"))
    with pytest.raises(spd.InputError, match=r"there is no file x\.jsonl or .*x\.jsonl"):
        load_custom("x.jsonl", tmp_path)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """`module(source)` puts a module of the user's own into the working folder and names it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    made = []

    def make(source):
        made.append(f"my_tasks_{tmp_path.name.replace('-', '_')}_{len(made)}")
        (tmp_path / f"{made[-1]}.py").write_text(textwrap.dedent(source))
        return made[-1]

    yield make
    for name in made:
        sys.modules.pop(name, None)


def test_the_class_of_the_documentation_works(module):
    from spd.tasks import custom

    imports = """
        from spd import Example
        from spd.tasks.base import Question, Task
        from spd.tasks.markers import mark
        from spd.tasks.numeric import same_number
        """
    source = custom.__doc__.partition(":\n\n")[2]
    task = load_custom(f"{module(textwrap.dedent(imports) + textwrap.dedent(source))}:Sums")
    assert isinstance(task, Task)
    assert not {question.prompt for question in task.test()} & set(task.training_prompts())
    assert [e.text[slice(*e.spans[0])] for e in task.calibration()[:2]] == ["1", "2"]
    assert all(task.is_correct(question.reference, question) for question in task.test())


OWN = """
    from spd.tasks.base import Task
    class Mine(Task):
        name = "mine"
        def calibration(self): return []
        def training_prompts(self): return []
        def test(self): return []
        def is_correct(self, completion, question): return True
    """


def test_classes_and_objects_by_name(module, tmp_path):
    name = module(
        OWN
        + """
    class WithData(Mine):
        def __init__(self, data=None): self.name = str(data).rpartition('/')[2]
    class NeedsData(Mine):
        def __init__(self, data): self.name = str(data).rpartition('/')[2]
    class Outer:
        Inner = Mine
    ready = WithData("ready")
    """
    )
    assert load_custom(f"{name}:Mine", tmp_path).name == "mine"
    assert load_custom(f"{name}:WithData").name == "None"
    assert load_custom(f"{name}:WithData", tmp_path).name == load_custom(f"{name}:NeedsData", tmp_path).name
    assert load_custom(f"{name}:ready", tmp_path).name == "ready"
    assert load_custom(f"{name}:Outer.Inner").name == "mine"


def test_what_is_no_task_is_refused(module):
    name = module(
        OWN
        + """
    class Half(Task):
        name = "half"
        def calibration(self): return []
        def training_prompts(self): return []
    class Greedy(Mine):
        def __init__(self, path, data=None): pass
    class Nameless(Mine):
        name = None
    class Other: pass
    number = 5
    """
    )
    for path, message in (
        ("Mien", rf"there is no 'Mien' in {name}; did you mean 'Mine'"),
        ("Mine.x", rf"there is no 'x' in {name}"),
        ("Half", "Half lacks is_correct, test"),
        ("Greedy", "Greedy is called without arguments, or with data alone, but missing .* argument: 'path'"),
        ("Nameless", "Nameless has no name"),
        ("Other", "Other is no subclass of spd.tasks.base.Task"),
        ("number", "number is no spd.tasks.base.Task but of type int"),
    ):
        with pytest.raises(spd.InputError, match=message):
            load_custom(f"{name}:{path}")
    for other, message in (
        ("no_such_module:Task", "there is no module 'no_such_module'"),
        ("spd.tasks.no_such:Task", r"there is no module 'spd\.tasks\.no_such'"),
        (f"{module('import no_such_module')}:A", "could not be imported .*No module named 'no_such_module'"),
        (f"{module('1 / 0')}:A", "could not be imported .*ZeroDivisionError: division by zero"),
        (f"{module('def')}:A", "could not be imported .*SyntaxError"),
    ):
        with pytest.raises(spd.InputError, match=message):
            load_custom(other)
