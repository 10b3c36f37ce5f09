"""Word problems: the completion shows the arithmetic and ends with `#### n`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

from spd.proving_ground.generated import GeneratedTask, Item, made_up, vocabulary
from spd.tasks.base import Question

_ANSWER = re.compile(r"####\s*(-?\d+)")


@dataclass(frozen=True)
class Cast:
    """Who and what a problem is about, and the templates it is told in."""

    people: tuple[tuple[str, str], ...]
    """Names with their pronoun."""
    things: tuple[str, ...]
    made_up: float
    """Share of the problems whose first person and things have made-up names."""
    templates: tuple[tuple[str, str], ...]
    """Text and arithmetic: `+`, `-` and `*` applied from left to right to the numbers a, b, c."""


IN_DOMAIN = Cast(
    people=(
        *((name, "He") for name in vocabulary("Tom Ben Sam Max Leo Paul Mark Jack")),
        *((name, "She") for name in vocabulary("Ann Mia Eva Lily Rosa Kate Nina Emma")),
    ),
    things=vocabulary("apples books coins cards pens shells cakes eggs balls keys"),
    made_up=1 / 3,
    templates=(
        ("{name} has {a} {things}. {he} buys {b} more. How many {things} does {name} have now?", "+"),
        ("There are {a} {things} in a box. {name} puts in {b} more. How many {things} are in the box?", "+"),
        ("{name} has {a} {things} and {other} has {b} {things}. How many {things} do they have together?", "+"),
        ("{name} finds {a} {things} on Monday and {b} {things} on Friday. How many {things} is that?", "+"),
        ("{name} has {a} {things}. {he} gives {b} to {other}. How many {things} are left?", "-"),
        ("{name} had {a} {things} and lost {b}. How many {things} does {name} have now?", "-"),
        ("{name} has {a} {things}. {other} has {b} fewer. How many {things} does {other} have?", "-"),
        ("There are {a} {things} in a box. {name} takes out {b}. How many {things} are in the box?", "-"),
        ("{name} has {a} bags with {b} {things} each. How many {things} is that?", "*"),
        ("{name} buys {a} {things} every day for {b} days. How many {things} does {name} have now?", "*"),
        ("{name} has {a} {things}. {he} buys {b} more and gives away {c}. How many {things} are left?", "+-"),
        ("{name} had {a} {things} and lost {b}. {other} gives {name} {c} more. How many {things} is that?", "-+"),
        ("{name} has {a} bags with {b} {things} each and finds {c} more. How many {things} is that?", "*+"),
        ("{name} buys {a} bags with {b} {things} each. {he} gives {c} to {other}. How many {things} are left?", "*-"),
    ),
)

OUT_OF_DOMAIN = Cast(
    people=(
        *((name, "He") for name in vocabulary("Omar Hugo Ivan Ravi Kofi Pedro")),
        *((name, "She") for name in vocabulary("Zoe Uma Ines Yuki Petra Wanda")),
    ),
    things=vocabulary("tickets marbles lemons flowers bricks candles spoons ribbons"),
    made_up=0.0,
    templates=(
        ("{name} picks {a} {things} in the morning and {b} {things} at night. How many {things} is that?", "+"),
        ("A shop has {a} {things}. {name} brings {b} more. How many {things} does the shop have now?", "+"),
        ("In a room are {a} {things}. {name} takes {b} home. How many {things} are left?", "-"),
        ("A shop had {a} {things} and sold {b}. How many {things} does the shop have now?", "-"),
        ("There are {a} shelves with {b} {things} each. How many {things} is that?", "*"),
        ("A shop had {a} {things} and sold {b}. {name} brings {c} more. How many {things} is that?", "-+"),
    ),
)


class Words(GeneratedTask):
    """One- and two-step problems over small numbers."""

    def __init__(self, name: str, cast: Cast) -> None:
        self.name = name
        self.cast = cast

    def draw(self, rng: Random) -> Item:
        text, operations = rng.choice(self.cast.templates)
        (name, he), (other, _) = rng.sample(self.cast.people, 2)
        while True:
            numbers = _numbers(rng, operations)
            lines, result = _work(numbers, operations)
            if result > 0:
                break
        a, b, c = (*numbers, 0)[:3]
        things = rng.choice(self.cast.things)
        if rng.random() < self.cast.made_up:
            name, things = made_up(rng).title(), made_up(rng) + "s"
        prompt = text.format(name=name, he=he, other=other, things=things, a=a, b=b, c=c) + "\n"
        completion = "\n".join([*lines, f"#### {result}"])
        end = len(prompt) + len(completion)
        return Item(prompt, completion, ((end - len(str(result)), end),), str(result))

    def sloppy(self, rng: Random, item: Item) -> str:
        *lines, _ = item.completion.split("\n")
        slip = rng.choice(("wrong", "bare", "chatter"))
        if slip == "wrong":
            return "\n".join([*lines, f"#### {rng.randint(2, 59)}"])
        if slip == "bare":
            return "\n".join(lines)
        return "Let me think. " + lines[-1]

    def is_correct(self, completion: str, question: Question) -> bool:
        """Whether the first number after `####` is the reference."""
        found = _ANSWER.search(completion)
        return found is not None and int(found.group(1)) == int(question.reference)


def _numbers(rng: Random, operations: str) -> list[int]:
    """Factors stay in the multiplication table, everything after the first number has one digit."""
    first = [rng.randint(2, 9), rng.randint(2, 6)] if operations[0] == "*" else [rng.randint(3, 30), rng.randint(2, 9)]
    return first + [rng.randint(2, 9) for _ in operations[1:]]


def _work(numbers: list[int], operations: str) -> tuple[list[str], int]:
    """The lines of arithmetic and their result (0, that is none, when a step leaves the natural numbers)."""
    total = numbers[0]
    lines = []
    for operation, number in zip(operations, numbers[1:], strict=True):
        after = {"+": total + number, "-": total - number, "*": total * number}[operation]
        if after <= 0:
            return [], 0
        lines.append(f"{total} {operation} {number} = {after}")
        total = after
    return lines, total
