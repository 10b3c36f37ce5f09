"""One-line Python functions: the asserts are quoted in the prompt, the completion is a `def`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random
from typing import Any

from spd.proving_ground.generated import GeneratedTask, Item, made_up, vocabulary
from spd.proving_ground.interpreter import function, passes
from spd.tasks.base import Question

_FUNCTIONS = ("f", "g", "h", "run", "calc", "solve", "apply", "make")
_STRINGS = vocabulary("sun tree moon lamp door rain frog milk star kite")


@dataclass(frozen=True)
class Program:
    """One function of a family: arguments by name (the name tells the type), body, and how it is described."""

    arguments: str
    body: str
    told: str
    retold: str
    """The same in the other phrasing, used out of domain only."""


PROGRAMS = (
    Program("x", "x + {k}", "adds {k} to x", "takes x and returns x plus {k}"),
    Program("x", "x - {k}", "subtracts {k} from x", "takes x and returns x minus {k}"),
    Program("x", "x * {k}", "multiplies x by {k}", "takes x and returns x times {k}"),
    Program("x", "x % {k}", "finds x modulo {k}", "takes x and returns the rest modulo {k}"),
    Program("x", "x > {k}", "checks that x is greater than {k}", "tells if x is more than {k}"),
    Program("x", "x * {k} + {m}", "multiplies x by {k} and adds {m}", "returns x times {k} plus {m}"),
    Program("a, b", "a + b", "adds a and b", "returns a plus b"),
    Program("a, b", "a - b", "subtracts b from a", "returns a minus b"),
    Program("a, b", "a * b", "multiplies a and b", "returns a times b"),
    Program("a, b", "max(a, b)", "finds the larger of a and b", "returns the greater of a and b"),
    Program("a, b", "min(a, b)", "finds the smaller of a and b", "returns the lesser of a and b"),
    Program("s", "s.upper()", "puts s in upper case", "returns s in upper case letters"),
    Program("s", "s[0]", "finds the first letter of s", "returns the letter that s starts with"),
    Program("s", "s[-1]", "finds the last letter of s", "returns the letter that s ends with"),
    Program("s", "s[::-1]", "reverses s", "returns s reversed"),
    Program("s", "len(s)", "finds the length of s", "returns the length of s"),
    Program("s", "s * {k}", "repeats s {k} times", "returns s {k} times over"),
    Program("s", "s + '{w}'", "adds '{w}' to the end of s", "returns s with '{w}' at the end"),
    Program("s", "s[:{j}]", "finds the first {j} letters of s", "returns the {j} letters that s starts with"),
    Program("xs", "sum(xs)", "adds up xs", "returns the sum of xs"),
    Program("xs", "max(xs)", "finds the largest of xs", "returns the maximum of xs"),
    Program("xs", "min(xs)", "finds the smallest of xs", "returns the minimum of xs"),
    Program("xs", "sorted(xs)", "sorts xs", "returns xs sorted"),
    Program("xs", "xs[0]", "finds the first of xs", "returns the first one of xs"),
    Program("xs", "xs[-1]", "finds the last of xs", "returns the last one of xs"),
    Program("xs", "xs[::-1]", "reverses xs", "returns xs reversed"),
    Program("xs", "max(xs) - min(xs)", "subtracts the smallest of xs from the largest", "returns the range of xs"),
    Program("xs", "sum(xs) + {k}", "adds up xs and adds {k}", "returns the sum of xs plus {k}"),
)
NEW_PROGRAMS = (
    Program("x", "x * x", "", "returns x times x"),
    Program("s", "s[0].upper()", "", "returns the first letter of s in upper case"),
    Program("s", "len(s) + {k}", "", "returns the length of s plus {k}"),
    Program("xs", "max(xs) + {k}", "", "returns the largest of xs plus {k}"),
    Program("xs", "sorted(xs)[::-1]", "", "returns xs sorted and reversed"),
    Program("a, b", "a + b + {k}", "", "returns a plus b plus {k}"),
)
"""Combinations of known parts, never shown in pretraining."""


class Code(GeneratedTask):
    """Write the function that the asserts describe; some prompts also say in words what it does.

    In domain, `told_share` of the prompts carry a description and the rest only the asserts, which have to be
    understood (now and then two functions fit, and only the held-back asserts tell which was meant). Out of domain,
    every prompt is described in words of its own, and a third of the programs are combinations that pretraining
    never shows. Half of the functions have made-up names in domain, all of them out of domain.
    """

    def __init__(self, name: str, out_of_domain: bool, told_share: float) -> None:
        self.name = name
        self.out_of_domain = out_of_domain
        self.told_share = told_share

    def draw(self, rng: Random) -> Item:
        name = rng.choice(_FUNCTIONS)
        if self.out_of_domain or rng.random() < 0.5:
            name = made_up(rng)
        new = self.out_of_domain and rng.random() < 1 / 3
        program = rng.choice(NEW_PROGRAMS if new else PROGRAMS)
        constants = _constants(rng)
        source = f"def {name}({program.arguments}): return {program.body.format(**constants)}"
        defined = function(source)
        asserts: list[str] = []
        while len(asserts) < 5:
            values = _values(rng, program.arguments)
            line = f"assert {name}({', '.join(map(repr, values))}) == {defined(*values)!r}"
            if line not in asserts:
                asserts.append(line)
        quoted, held_back = asserts[:2], asserts[2:]
        told = rng.random() < self.told_share
        if self.out_of_domain:
            head = f"Please define {name}. It {program.retold.format(**constants)}."
        elif told:
            head = f"Write {name} that {program.told.format(**constants)}."
        else:
            head = f"Write {name}."
        prompt = head + "\n" + "\n".join(quoted) + "\n"
        spans = []
        position = len(head) + 1
        for line in quoted:
            spans.append((position, position + len(line)))
            position += len(line) + 1
        return Item(prompt, source, tuple(spans), "\n".join([source, *held_back]))

    def sloppy(self, rng: Random, item: Item) -> str:
        head, _ = item.completion.split(" return ")
        slip = rng.choice(("wrong", "chatter"))
        if slip == "chatter":
            return "Here it is: " + item.completion
        arguments = head[head.index("(") + 1 : head.index(")")]
        other = rng.choice([program for program in PROGRAMS if program.arguments == arguments])
        return f"{head} return {other.body.format(**_constants(rng))}"

    def is_correct(self, completion: str, question: Question) -> bool:
        """Whether the first line that starts with `def` passes the quoted and the held-back asserts."""
        found = re.search(r"^def .*$", completion, re.MULTILINE)
        lines = [*question.prompt.split("\n"), *question.reference.split("\n")]
        return found is not None and passes(found.group(), [line for line in lines if line.startswith("assert ")])


def _constants(rng: Random) -> dict[str, Any]:
    return {"k": rng.randint(2, 9), "m": rng.randint(2, 9), "j": rng.randint(2, 3), "w": rng.choice("aeiou")}


def _values(rng: Random, arguments: str) -> list[Any]:
    if arguments == "s":
        return [rng.choice(_STRINGS)]
    if arguments == "xs":
        return [rng.sample(range(1, 20), 3)]
    return [rng.randint(1, 20) for _ in arguments.split(", ")]
