"""The proving ground: its sets are fixed and kept apart, its interpreter is safe, its model is as documented."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from itertools import combinations
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spd.proving_ground import TASKS, checkpoint
from spd.proving_ground.build import rate, score, settled, steer
from spd.proving_ground.corpus import CAPABILITIES, documents
from spd.proving_ground.generated import SIZES, GeneratedTask, split_of
from spd.proving_ground.interpreter import MAX_LENGTH, MAX_SOURCE, Refused, function, passes
from spd.tasks.base import Question

NAMES = ("words", "words-ood", "choice", "choice-ood", "code", "code-ood")

FINGERPRINTS: dict[str, str] = {
    "words": "6a8b84856e73",
    "words-ood": "4f8d867ff958",
    "choice": "7eb31d08c66d",
    "choice-ood": "12b23f94141e",
    "code": "871403adc9cd",
    "code-ood": "9afd80b7b9f7",
}


def fingerprint(task: GeneratedTask) -> str:
    items = [item for split in SIZES for item in task.items(split)]
    return hashlib.sha256(repr(items).encode()).hexdigest()[:12]


def wrong(name: str, question: Question) -> list[str]:
    """Completions that must not count."""
    right = question.reference
    if name.startswith("words"):
        return [
            "",
            right,
            "####",
            f"#### {int(right) + 1}",
            f"#### {right}0",
            f"#### -{right}",
            f"#### 0\n#### {right}",
        ]
    if name.startswith("choice"):
        other = "ABCD".replace(right, "")[0]
        return ["", f" {other}", f" {other} {right}", f" {right}{right}", f" I think {right}", f" {right.lower()}"]
    source = right.split("\n")[0]
    head, body = source.split(" return ")
    return [
        "",
        body,
        f"{head} return None",
        f"{head} return str({body}) + 'x'",
        f"{head} pass",
        source.replace("def ", "def not_", 1),
        f"{head} return __import__('os').getpid()",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_sets_are_the_pinned_ones(name: str) -> None:
    """The interpreter's hash seed differs from run to run, so this also shows that no set order leaks in."""
    assert TASKS[name].name == name
    assert fingerprint(TASKS[name]) == FINGERPRINTS[name]


def test_tasks_come_without_torch() -> None:
    program = "import sys, spd.proving_ground as p; p.TASKS['code'].test(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize("name", NAMES)
def test_sizes(name: str) -> None:
    task = TASKS[name]
    assert (len(task.calibration()), len(task.training_prompts()), len(task.test())) == (100, 300, 200)
    assert task.calibration_size <= 100
    assert task.test_size == 200


def test_splits_are_disjoint_also_between_a_task_and_its_sibling() -> None:
    prompts = {
        (name, split): {item.prompt for item in task.items(split)} for name, task in TASKS.items() for split in SIZES
    }
    assert all(len(prompts[name, split]) == SIZES[split] for name, split in prompts)
    assert all(a.isdisjoint(b) for a, b in combinations(prompts.values(), 2))


def test_pretraining_has_none_of_the_prompts() -> None:
    held = {item.prompt for task in TASKS.values() for split in SIZES for item in task.items(split)}
    drawn = documents(Random(3), 3000, dict.fromkeys(CAPABILITIES, 1.0))
    assert {kind for kind, _, _ in drawn} == {*CAPABILITIES, "filler"}
    assert held.isdisjoint(prompt for _, prompt, _ in drawn)
    assert all(split_of(prompt) != "pretraining" for prompt in held)


def test_out_of_domain_is_out_of_domain() -> None:
    """No question of a sibling task, with its numbers, names and options blanked, opens a pretraining document."""
    texts = [
        prompt + completion for _, prompt, completion in documents(Random(4), 3000, dict.fromkeys(CAPABILITIES, 1.0))
    ]
    seen = {word for text in texts for word in text.split()}
    casts = [TASKS[name].cast for name in ("words", "words-ood")]  # type: ignore[attr-defined]
    assert not {name for name, _ in casts[0].people} & {name for name, _ in casts[1].people}
    assert not seen & {name for name, _ in casts[1].people}
    assert not seen & set(casts[1].things)
    phrases = ("Please define", "It returns", "Find a", "is even", "Pick the", "In a room", "A shop", "shelves")
    assert not [phrase for phrase in phrases if any(phrase in text for text in texts)]
    assert not any(line.endswith(" is a fruit?") for text in texts for line in text.split("\n"))


@pytest.mark.parametrize("name", NAMES)
def test_spans_are_what_defines_correctness(name: str) -> None:
    for example in TASKS[name].calibration():
        marked = [example.text[start:end] for start, end in example.spans]
        if name.startswith("words"):
            assert example.text.endswith(f"#### {marked[0]}") and marked[0].isdigit() and len(marked) == 1
        elif name.startswith("choice"):
            assert example.text.endswith(f"Answer: {marked[0]}") and marked[0] in "ABCD" and len(marked) == 1
        else:
            assert marked == [line for line in example.prompt.split("\n") if line.startswith("assert ")]
            assert len(marked) == 2


@pytest.mark.parametrize("name", NAMES)
def test_references_are_right_and_slips_are_not(name: str) -> None:
    task = TASKS[name]
    for item, question in zip(task.items("test"), task.test(), strict=True):
        assert task.is_correct(item.completion, question)
        assert not [text for text in wrong(name, question) if task.is_correct(text, question)]


@pytest.mark.parametrize("name", ["words", "choice", "code"])
def test_all_answers_are_met(name: str) -> None:
    """No constant answer scores: the letters are even, the results spread, the functions many."""
    answers = [question.reference.split("\n")[0] for question in TASKS[name].test()]
    most = max(answers.count(answer) for answer in answers) / len(answers)
    assert most < (0.35 if name == "choice" else 0.08)


def test_code_needs_the_held_back_asserts() -> None:
    """A function that only looks up the two quoted results passes those and is still not correct."""
    task = TASKS["code"]
    caught = 0
    for question in task.test():
        quoted = [line for line in question.prompt.split("\n") if line.startswith("assert ")]
        (call, first), (_, second) = (line.removeprefix("assert ").split(" == ") for line in quoted)
        name, argument = call.rstrip(")").split("(")
        table = f"def {name}(x): return {first} if x == {argument} else {second}"
        if question.reference.startswith(f"def {name}(x)"):
            assert passes(table, quoted)
            caught += not task.is_correct(table, question)
    assert caught > 10


HOSTILE = (
    "def f(x): return 9**9**9",
    "def f(x): return 'a' * 10**9",
    "def f(x): return 'a' * 1000000000",
    "def f(x): return [0] * 1000000000",
    "def f(x): return 1000000000 * (0,)",
    "def f(x): return 999999999999 * 999999999999 * 999999999999",
    "def f(x): return 1 << 1000000000",
    "def f(x): return '%1000000000d' % x",
    "def f(x): return f'{x:1000000000}'",
    "def f(x): return ('a' * 256).replace('a', 'b' * 256)",
    "def f(x): return [[0] * 250, [0] * 250]",
    "def f(x): return [[[x]]] * 250",
    "def f(x): return __import__('os').system('true')",
    "def f(x): return open('/etc/passwd').read()",
    "def f(x): return eval('1')",
    "def f(x): return x.__class__",
    "def f(x): return x.__class__.__mro__[1].__subclasses__()",
    "def f(x): return ''.join(['a'])",
    "def f(x): return '{0.__class__}'.format(x)",
    "def f(x): return getattr(x, '__class__')",
    "def f(x): return str.upper",
    "def f(x): return len",
    "def f(x): return f(x)",
    "def f(x): return (lambda y: y)(x)",
    "def f(x): return (y := x)",
    "def f(x): return [y for y in x]",
    "def f(x): return sum(y for y in range(10**9))",
    "def f(x): return [a for a in range(9999) for b in range(9999) for c in range(9999)]",
    "def f(x): return list(range(10**9))",
    "def f(x): return sorted(x, key=len)",
    "def f(x): return max(x, key=f)",
    "def f(x): return max(*x)",
    "def f(x): return {1: 2}",
    "def f(x): return {1, 2}",
    "def f(x): return b'a' * 100",
    "def f(x): return 1j",
    "def f(x): return ...",
    "def f(x): return x is x",
    "def f(x): return await x",
    "def f(x): return (yield x)",
    "def f(x): return int('9' * 200)",
    "def f(x): return 1 // 0",
    "def f(x): return x[99]",
    "def f(x): return 'a' + 1",
    "def f(x): return",
    "def f(x): pass",
    "def f(x): x = 1; return x",
    "def f(x):\n    while True: pass",
    "def f(x=9**9): return x",
    "def f(x: int): return x",
    "def f(*x): return x",
    "def f(x, *, y): return x",
    "def f(x, x): return x",
    "@print\ndef f(x): return x",
    "async def f(x): return x",
    "class f: pass",
    "import os",
    "f = 1",
    "def f(x): return x\ndef g(x): return x",
    "def f(x): return " + "(" * 250 + "x",
    "def f(x): return " + "-" * 300 + "x",
    "def f(x): return " + "+".join(["x"] * 150),
    "def f(x): return x" + " " * MAX_SOURCE,
    "def f(x): return '\0'",
    "def f(x): return '\ud800' + 1",
    "def f(x)",
    "",
)


@pytest.mark.parametrize("source", HOSTILE, ids=range(len(HOSTILE)))
def test_interpreter_refuses_quickly(source: str) -> None:
    started = time.perf_counter()
    with pytest.raises(Refused):
        function(source)([3, 1, 2])
    assert not passes(source, ["assert f([3, 1, 2]) == 3"])
    assert time.perf_counter() - started < 0.5


@pytest.mark.parametrize(
    ("body", "argument", "value"),
    [
        ("x * 3 - 1", 4, 11),
        ("-x // 2 % 5", 7, 1),
        ("x / 4", 2, 0.5),
        ("x if 3 < x <= 5 else 0", 6, 0),
        ("x > 3 and x < 9 or not x", 0, True),
        ("x and 5", 0, 0),
        ("x[1:] + x[::-1]", "abc", "bccba"),
        ("x[-1]", [4, 5], 5),
        ("sorted(x, reverse=True)[0]", [4, 6, 5], 6),
        ("max(x) - min(x) + sum(x) + len(x)", [4, 6, 5], 20),
        ("'a' in x", "cat", True),
        ("x.upper().count('A')", "banana", 3),
        ("str(abs(int(x))) * 2", "-4", "44"),
        ("max(x, 3)", 1, 3),
        ("[x, x]", 1, [1, 1]),
    ],
)
def test_interpreter_agrees_with_python(body: str, argument: Any, value: Any) -> None:
    result = function(f"def f(x): return {body}")(argument)
    assert result == value and type(result) is type(value)
    assert passes(f"def f(x): return {body}", [f"assert f({argument!r}) == {value!r}"])
    assert not passes(f"def f(x): return {body}", [f"assert f({argument!r}) == {value!r}", "assert f(3) == None"])


def test_interpreter_bounds_and_strictness() -> None:
    assert len(function("def f(x): return x * 2")("a" * (MAX_LENGTH // 2))) == MAX_LENGTH
    with pytest.raises(Refused, match="too long"):
        function("def f(x): return x * 2")("a" * (MAX_LENGTH // 2 + 1))
    with pytest.raises(Refused, match="takes 1 arguments, got 2"):
        function("def f(x): return x")(1, 2)
    assert not passes("def f(x): return x > 0", ["assert f(3) == 1"]), "True is not 1 here"
    assert not passes("def f(x): return x", ["assert f(3) == 3 == 3"])
    assert not passes("def f(x): return x", ["assert f(x=3) == 3"])
    assert not passes("def f(x): return x", ["assert f(3)"])


def test_steering_practises_what_is_not_known() -> None:
    weights = steer({"words": 0.1, "choice": 0.4, "code": 0.9})
    assert weights["words"] == 1.0
    assert weights["words"] > weights["choice"] > weights["code"] > 0
    assert not settled({"words": 0.1, "choice": 0.5, "code": 0.5})
    assert not settled({"words": 0.5, "choice": 0.5, "code": 0.9})
    assert settled({"words": 0.5, "choice": 0.5, "code": 0.5})


def test_learning_rate_rises_and_falls() -> None:
    rates = [rate(step, 1000) for step in range(1000)]
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < rates[-1] < 0.1 * rates[top]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(checkpoint())


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint())


def test_checkpoint_is_small_and_of_the_stated_shape(model: Any) -> None:
    assert (checkpoint() / "model.safetensors").stat().st_size <= 10_000_000
    assert sum(p.numel() for p in model.parameters()) <= 4_000_000
    config = model.config
    assert config.model_type == "qwen3"
    assert 1 < config.num_key_value_heads < config.num_attention_heads
    assert all(hasattr(layer.self_attn, "k_norm") for layer in model.model.layers)
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in model.parameters())


def test_checkpoint_says_how_it_was_made() -> None:
    record = json.loads((checkpoint() / "build.json").read_text())
    assert {"steps", "seed", "seconds", "parameters", "versions", "test"} <= set(record)
    assert set(record["test"]) == set(NAMES)
    for name in CAPABILITIES:
        assert 0.3 <= record["test"][name]["accuracy"] <= 0.7
    assert "/" not in (checkpoint() / "build.json").read_text(), "a path of the machine it was built on"


def test_tokenizer_splits_digits_and_knows_every_byte(tokenizer: Any) -> None:
    assert len(tokenizer) == 640
    assert tokenizer.padding_side == "left"
    assert {tokenizer.eos_token, tokenizer.pad_token} == {"<|end|>", "<|pad|>"}
    every_byte = "".join(map(chr, range(256))) + "é漢🙂 1234567 \n\n  def f(x): return x"
    assert tokenizer.decode(tokenizer(every_byte)["input_ids"]) == every_byte
    text = "Tom has 123 apples, 45 + 678 = 723\n#### 723"
    encoded = tokenizer(text, return_offsets_mapping=True)
    pieces = [text[start:end] for start, end in encoded["offset_mapping"]]
    assert "".join(pieces) == text
    assert [piece for piece in pieces if any(c.isdigit() for c in piece)] == [c for c in text if c.isdigit()]


@pytest.mark.parametrize("name", NAMES)
def test_no_token_straddles_prompt_and_completion_or_leaves_the_length(name: str, tokenizer: Any) -> None:
    """Prompt and completion tokenise apart as they do together, and every reference fits into `max_new_tokens`."""
    for item in TASKS[name].items("test"):
        prompt, completion = (tokenizer(part)["input_ids"] for part in (item.prompt, item.completion))
        assert prompt + completion == tokenizer(item.prompt + item.completion)["input_ids"]
        assert len(completion) < TASKS[name].max_new_tokens
        assert len(prompt + completion) <= 256


@pytest.mark.parametrize("name", CAPABILITIES)
def test_base_leaves_something_to_gain(name: str, model: Any, tokenizer: Any) -> None:
    """60 questions: three standard deviations around the 30 to 70 % that hold for all 200."""
    assert 0.2 <= score(model, tokenizer, TASKS[name], TASKS[name].test()[:60]) <= 0.8
