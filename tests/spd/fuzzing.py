"""Hostile input: mutations of real artefacts, and the rule that every answer to them must keep."""

from __future__ import annotations

import copy
import json
import os
import resource
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from spd.errors import InputError
from spd.shown import LONGEST

EXAMPLES = int(os.environ.get("SPD_FUZZ_EXAMPLES", "25"))
SECONDS = 60
ROOM = 2 << 30
"""Bytes of address space that one case may take beyond what the process has: less than any claim of a hostile file."""

fuzzed = settings(
    max_examples=EXAMPLES,
    derandomize="SPD_FUZZ_EXAMPLES" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

NASTY_TEXT = [
    *("", " ", "\n", "\0", "a\0b", "\ufeff", "\u202eabc\u2066", "\x1b[2J\x1b]8;;http://x\x07", "\r\nx", "é" * 300),
    *("../../../etc/passwd", "/etc/passwd", "..", ".", "-rf", "~", "CON", "a/b", "a\\b", "[red]x[/red]", "[link=x]"),
    *("<script>alert(1)</script>", "{{ 7 * 7 }}", "$\\frac$", "%s%n", "nan", "9" * 5000, "\U0001f600", "\uffff"),
]
NASTY = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, -(10**400), 0.5, 1e308, -0.0),
    *(float("nan"), float("inf"), float("-inf"), [], {}, [[]], [None], {"a": None}, [0] * 1000, *NASTY_TEXT),
]
NASTY_JSON = [
    *("[" * 100_000, '{"a":' * 100_000, "[" * 500 + "]" * 500, "9" * 5000, "-" + "9" * 5000, "1e999", "NaN"),
    *("Infinity", '"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '{"a":1,"a":2}', '"\t"', "", "'x'", "tru", "\ufeff1"),
]
"""Pieces of JSON, or of what looks like it, that no value of Python gives."""


class HangsError(BaseException):
    """No `OSError`, which TimeoutError is: nothing may take it for a file that cannot be read."""


@dataclass
class Tally:
    """What became of the cases of one test. A case is answered, or refused in one line; nothing else."""

    kind: str
    tried: int = 0
    refused: int = 0
    accepted: int = 0
    said: str = ""

    def attempt(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the call returns, or None if it refuses; `said` is then how."""
        self.tried += 1
        self.said = ""
        try:
            with bounded(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = call(*args, **kwargs)
        except InputError as error:
            self.said = str(error)
            self.refused += 1
            check_message(self.said)
            return None
        self.accepted += 1
        return result

    def write(self) -> None:
        if path := os.environ.get("SPD_FUZZ_TALLY"):
            counts = {"tried": self.tried, "refused": self.refused, "accepted": self.accepted}
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": self.kind, **counts}) + "\n")


def check_message(message: str) -> None:
    """One line that a terminal shows as it is."""
    assert message.strip(), "an error says something"
    assert len(message) <= LONGEST + 100
    controls = [each for each in message if ord(each) < 32 or 0x7F <= ord(each) < 0xA0 or "\u202a" <= each <= "\u202e"]
    assert not controls, f"{message!r}"
    message.encode()


@contextmanager
def bounded(seconds: float = SECONDS, room: int = ROOM) -> Iterator[None]:
    """What hangs, or takes memory out of proportion, fails here rather than taking the test run with it."""

    def late(*_: object) -> None:
        raise HangsError(f"not done after {seconds} s")

    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (taken + room, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def places(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a value, its own included."""
    found = [before]
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inside:
        found += places(each, (*before, key))
    return found


def replaced(value: Any, place: tuple[Any, ...], by: Any) -> Any:
    if not place:
        return by
    value = copy.deepcopy(value)
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = by
    return value


def removed(value: Any, place: tuple[Any, ...]) -> Any:
    value = copy.deepcopy(value)
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    del inner[place[-1]]
    return value


@st.composite
def mutated(draw: st.DrawFn, value: Any, most: int = 3) -> Any:
    """A value with a few of its parts replaced by another's type or an extreme, removed, or added."""
    for _ in range(draw(st.integers(1, most))):
        place = draw(st.sampled_from(places(value)))
        how = draw(st.sampled_from(["replace", "replace", "remove", "add", "text"]))
        if how == "remove" and place:
            value = removed(value, place)
        elif how == "add":
            value = (
                replaced(value, (*place, draw(st.sampled_from(NASTY_TEXT))), 1) if _is_table(value, place) else value
            )
        elif how == "text":
            value = replaced(value, place, draw(st.text(max_size=8)))
        else:
            value = replaced(value, place, copy.deepcopy(draw(st.sampled_from(NASTY))))
    return value


@st.composite
def mutated_json(draw: st.DrawFn, value: Any) -> bytes:
    """A mutated value as a file holds it, at times with a piece in it that is no JSON or an odd one."""
    changed = draw(mutated(value))
    if draw(st.booleans()):
        text = json.dumps(changed)
    else:
        place = draw(st.sampled_from(places(value)))
        text = json.dumps(replaced(value, place, "@stand-in@")).replace(
            '"@stand-in@"', draw(st.sampled_from(NASTY_JSON))
        )
    if draw(st.integers(0, 9)) == 0:
        return draw(mutated_bytes(text.encode("utf-8", "surrogatepass")))
    if draw(st.integers(0, 9)) == 0:
        return text.encode(draw(st.sampled_from(["utf-16", "utf-8-sig", "utf-32"])), "surrogatepass")
    return text.encode("utf-8", "surrogatepass")


@st.composite
def mutated_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Flipped, cut, spliced, zeroed, repeated."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        if not data:
            break
        at = draw(st.integers(0, len(data) - 1))
        length = draw(st.integers(1, 64))
        how = draw(st.sampled_from(["flip", "cut", "drop", "zero", "repeat", "insert"]))
        if how == "flip":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del data[at:]
        elif how == "drop":
            del data[at : at + length]
        elif how == "zero":
            data[at : at + length] = bytes(len(data[at : at + length]))
        elif how == "repeat":
            data[at:at] = data[at : at + length]
        else:
            data[at:at] = draw(st.binary(max_size=16))
    return bytes(data)


def _is_table(value: Any, place: tuple[Any, ...]) -> bool:
    for key in place:
        value = value[key]
    return isinstance(value, dict)
