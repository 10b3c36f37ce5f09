"""Files of records and settings that someone made wrong on purpose: used rightly, or refused in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from fuzzing import NASTY, NASTY_JSON, NASTY_TEXT, Tally, fuzzed, mutated, mutated_bytes, mutated_json
from hypothesis import given
from hypothesis import strategies as st

import spd
from spd.config import load_config, parse_config
from spd.files import read_json, read_jsonl, write_json
from spd.reproduce.settings import load_settings
from spd.tasks.jsonl import JsonlTask
from spd.tasks.markers import mark
from spd.tasks.matching import same_answer

RECORD: dict[str, Any] = {
    "prompt": "Q: 2 and 3?\nA:",
    "completion": " they are\n#### 5",
    "spans": [[3, 9], "5"],
    "id": 7,
    "group": "sums",
}
MMLU = {"question": "Which?", "choices": ["one", "two", "three", "four"], "answer": 2, "subject": "numbers"}
DATA = {
    "gsm8k": {"question": "How many are 2 and 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"},
    "svamp": {"Body": "Ann has 2 pens", "Question": "How many pens?", "Equation": "( 2.0 )", "Answer": "2"},
    "codealpaca": {"instruction": "Add.", "input": "", "output": "1 + 1"},
    "mbpp": {
        "task_id": 700,
        "text": "Write a function to add.",
        "code": "def add(a, b):\n    return a + b",
        "test_list": ["assert add(1, 2) == 3"],
        "test_setup_code": "",
        "challenge_test_list": [],
    },
}
CONFIG: dict[str, Any] = {
    "model": "proving-ground",
    "tasks": ["words"],
    "evaluate": ["words", "code"],
    "arms": ["base", "spd:rank=4"],
    "seed": 1,
    "calibration": {"examples": 5, "layers": [1, 2], "rank": "energy:0.5"},
    "generation": {"prompts": 4, "temperature": 0.7, "top_p": 0.5},
    "training": {"epochs": 1, "learning_rate": 0.1, "batch_size": 2},
    "evaluation": {"questions": 3},
}


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Any:
    counted = Tally(request.node.name)
    yield counted
    counted.write()


def all_of(task: Any) -> Any:
    return task.training_prompts(), task.calibration(), task.unmarked() if hasattr(task, "unmarked") else None


# JSON and JSON Lines


@fuzzed
@given(content=mutated_json({"a": [1, {"b": "text"}], "c": None}))
def test_json(content: bytes, tmp_path: Path, tally: Tally) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    tally.attempt(read_json, path)
    assert not tally.said or str(path) in tally.said
    path.write_bytes(content.replace(b"\n", b" "))
    for record in tally.attempt(read_jsonl, path) or []:
        assert isinstance(record, dict)
    assert not tally.said or f"{path}, line 1: " in tally.said


@pytest.mark.parametrize("piece", NASTY_JSON, ids=lambda piece: repr(piece[:12]))
def test_odd_json_is_the_same_value_or_refused(piece: str, tmp_path: Path, tally: Tally) -> None:
    (tmp_path / "a.json").write_text(piece, encoding="utf-8")
    found = tally.attempt(read_json, tmp_path / "a.json")
    if not tally.said:
        assert repr(found) == repr(json.loads(piece.removeprefix("\ufeff")))


def test_a_name_twice_in_an_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": "b", "x": {"y": 1, "y": 2}}\n')
    with pytest.raises(spd.InputError, match=r"a\.jsonl, line 3: not JSON \(it has two of 'y'\)"):
        read_jsonl(tmp_path / "a.jsonl")


def test_what_people_write_by_accident_is_read(tmp_path: Path) -> None:
    """A byte order mark, lines that end in CRLF, blank ones, right-to-left text, a zero byte as JSON writes it."""
    path = tmp_path / "a.jsonl"
    lines = [{"prompt": "שלום عالم", "completion": " 5"}, {"prompt": "a\0b", "completion": "\U0001f600"}]
    written = "\r\n \r\n".join(json.dumps(line, ensure_ascii=number == 1) for number, line in enumerate(lines))
    path.write_bytes(b"\xef\xbb\xbf" + written.encode())
    assert read_jsonl(path) == lines
    assert JsonlTask(path, spans="completion").training_prompts() == ["שלום عالم", "a\0b"]


@pytest.mark.parametrize(
    "filler", ["a", "\\boxed{", "#### ", "```\n", "answer is ", "\U0001f600", "(A) ", "[[", "9", "\n"]
)
def test_a_line_of_megabytes(filler: str, tmp_path: Path, tally: Tally) -> None:
    """No time or memory out of proportion: ten megabytes of plain text, one of what a rule looks for."""
    text = "q" + filler * ((10_000_000 if filler == "a" else 1_000_000) // len(filler))
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": text, "completion": "5"}) + "\n")
    assert tally.attempt(JsonlTask(path).training_prompts) == [text]
    path.write_text(json.dumps({"prompt": "q", "completion": text}) + "\n")
    for rule in ("answer", "code", "asserts", "completion"):
        assert tally.attempt(JsonlTask(path, spans=rule).calibration) or "nothing is marked" in tally.said
    for metric in ("exact", "number", "letter", "contains"):
        assert tally.attempt(same_answer, metric, text, "5") in (True, False)


# Tasks


@fuzzed
@given(content=mutated_json(RECORD))
def test_records_of_the_users_own(content: bytes, tmp_path: Path, tally: Tally) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(json.dumps(RECORD | {"id": 8}).encode() + b"\n" + content)
    task = tally.attempt(JsonlTask, tmp_path, spans="answer")
    found = tally.attempt(all_of, task)
    if found is None:
        assert str(path) in tally.said and "line" in tally.said
        return
    for example in found[1]:
        assert isinstance(example.text, str) and all(0 <= s < e <= len(example.text) for s, e in example.spans)


@fuzzed
@given(data=st.data(), name=st.sampled_from(sorted(DATA)))
def test_records_of_data_sets(data: st.DataObject, name: str, tmp_path: Path, tally: Tally) -> None:
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    rest = [json.dumps(DATA[name] | ({"task_id": 601 + n} if name == "mbpp" else {})) for n in range(3)]
    lines = "\n".join(rest).encode() + b"\n" + data.draw(mutated_json(DATA[name]))
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_bytes(lines)
    task = tally.attempt(spd.load_task, name, tmp_path)
    tally.attempt(lambda: (task.calibration(), task.training_prompts()))
    tally.attempt(lambda: task.test())


@fuzzed
@given(
    rule=st.sampled_from(["answer", "code", "asserts", "completion", "regex:(a)|b", "prompt-regex:^."]),
    prompt=st.text() | st.sampled_from(NASTY_TEXT),
    completion=st.text(alphabet="a5#\\boxed{}`~\n\r \tanswer is:.,*é\u202e\0") | st.sampled_from(NASTY_TEXT),
)
def test_any_text_has_its_spans(rule: str, prompt: str, completion: str, tally: Tally) -> None:
    spans = tally.attempt(mark, rule, prompt, completion)
    text = prompt + completion
    assert all(0 <= start < end <= len(text) for start, end in spans)
    for metric in ("exact", "number", "letter", "contains", "regex:(a)|5"):
        assert tally.attempt(same_answer, metric, completion, prompt) in (True, False)


# Settings


def toml(values: dict[str, Any], name: str = "") -> str:
    """TOML with whatever the values are: json.dumps writes what TOML reads, but for null and odd floats."""
    plain = {key: value for key, value in values.items() if not isinstance(value, dict)}
    lines = [f"[{name}]"] if name else []
    for key, value in plain.items():
        lines.append(f"{json.dumps(key)} = {json.dumps(value).replace('NaN', 'nan').replace('Infinity', 'inf')}")
    for key, value in values.items():
        if isinstance(value, dict):
            lines.append(toml(value, f"{name}.{json.dumps(key)}" if name else json.dumps(key)))
    return "\n".join(lines) + "\n"


@fuzzed
@given(data=st.data())
def test_run_configurations(data: st.DataObject, tmp_path: Path, tally: Tally) -> None:
    path = tmp_path / "run.toml"
    values = data.draw(mutated(CONFIG).filter(lambda value: isinstance(value, dict)))
    content = toml(values).encode("utf-8", "surrogatepass")
    path.write_bytes(data.draw(mutated_bytes(content)) if data.draw(st.integers(0, 4)) == 0 else content)
    config = tally.attempt(load_config, path)
    if config is not None:
        assert tally.attempt(parse_config, json.loads(json.dumps(config.as_dict()))) == config
    tally.attempt(load_settings, path, {})


@pytest.mark.parametrize(
    "content",
    [
        *("model = " + "[" * 5000, "model = " + "{a=" * 5000, ".".join("a" * 300) + " = 1", "seed = " + "9" * 5000),
        *(".".join("a" * 8000) + "=1", "a" * 100_000, "[a]\n[a]", "model = 1\nmodel = 2", "\0", "\ufeffmodel = 1"),
        *("model = '\x1b[2J'", "\ufeff", "model.a = 1\nmodel.b = 2", "training = []", "[[training]]", "training.x = 1"),
        *(
            "seed = 1979-05-27",
            "seed = nan",
            "[training]\nlearning_rate = " + "9" * 400,
            "tasks = [[]]",
            "tasks = [{}]",
        ),
    ],
    ids=lambda content: repr(content[:16]),
)
def test_odd_toml(content: str, tmp_path: Path, tally: Tally) -> None:
    (tmp_path / "task.toml").write_text(content, encoding="utf-8")
    (tmp_path / "train.jsonl").write_text(json.dumps(RECORD) + "\n")
    for load in (load_config, lambda path: load_settings(path, {}), lambda path: JsonlTask(path.parent)):
        assert tally.attempt(load, tmp_path / "task.toml") is None or content == "\ufeff"
        assert not tally.said or "task.toml" in tally.said


@pytest.mark.parametrize("stored", [value for value in NASTY if not isinstance(value, str)], ids=lambda v: repr(v)[:12])
def test_a_stored_configuration_may_be_anything(stored: Any, tally: Tally) -> None:
    assert tally.attempt(parse_config, stored) is None
    for key in CONFIG:
        tally.attempt(parse_config, CONFIG | {key: stored})


@fuzzed
@given(values=mutated({"name": "a", "spans": "answer", "metric": "number", "max_new_tokens": 5, "stop": ["x"]}))
def test_settings_of_a_task(values: Any, tmp_path: Path, tally: Tally) -> None:
    if not isinstance(values, dict):
        return
    (tmp_path / "train.jsonl").write_text(json.dumps(RECORD) + "\n")
    (tmp_path / "task.toml").write_bytes(toml(values).encode("utf-8", "surrogatepass"))
    task = tally.attempt(JsonlTask, tmp_path)
    if task is not None:
        assert task.name.isprintable() and "/" not in task.name and not task.name.startswith(".")


# What is no file


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "loop", "forbidden", "missing", "long", "nul", "endless"])
def test_what_is_no_file_is_refused_at_once(kind: str, tmp_path: Path, tally: Tally) -> None:
    path = tmp_path / "train.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/full")
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "forbidden":
        path.write_text("{}")
        path.chmod(0)
    elif kind == "long":
        path = tmp_path / ("a" * 300 + ".jsonl")
    elif kind == "nul":
        path = tmp_path / "a\0b.jsonl"
    readers = (read_json, read_jsonl, load_config, lambda at: JsonlTask(at), lambda at: spd.load_task(str(at)))
    with not_root():
        for read in readers:
            tally.attempt(lambda read=read: all_of(found) if isinstance(found := read(path), JsonlTask) else found)
            assert tally.said, f"{read} took {kind}"
        for name in (str(path), str(path / "x"), f"{path}:x"):
            tally.attempt(spd.load_task, "gsm8k", name)
            assert tally.said


class not_root:
    """As a user without privileges, where the tests run as root, to whom nothing is forbidden."""

    def __enter__(self) -> None:
        self.root = os.geteuid() == 0
        if self.root:
            os.seteuid(65534)

    def __exit__(self, *_: object) -> None:
        if self.root:
            os.seteuid(0)


@pytest.mark.parametrize("name", [text for text in NASTY_TEXT if text], ids=lambda text: repr(text[:16]))
def test_names_of_tasks(name: str, tmp_path: Path, tally: Tally) -> None:
    tally.attempt(spd.load_task, name)
    tally.attempt(spd.load_task, name, tmp_path)
    tally.attempt(spd.load_task, name + ".jsonl", tmp_path)
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(RECORD) + "\n")
    task = tally.attempt(JsonlTask, tmp_path, name=name)
    if task is not None:
        out = tmp_path / "run" / f"{task.name}.json"
        write_json(out, {})
        assert out.resolve().parent == tmp_path / "run"
