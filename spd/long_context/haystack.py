"""Long texts with facts in them, as tokens of any tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

from spd.errors import InputError
from spd.example import Example
from spd.proving_ground.recall import NAMES, NUMBERS, Sentence, fact, filler, question, stream


@dataclass(frozen=True)
class Needle:
    """One fact in a haystack: how deep it lies (0: at the beginning, 1: at the end), and how it is asked for."""

    depth: float
    question: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Haystack:
    """At most `context` tokens, the longest question and its answer behind them included."""

    tokens: list[int]
    needles: list[Needle]


class Texts:
    """The texts of one tokenizer. Everything follows from the seed."""

    def __init__(self, tokenizer: Any, seed: int = 0) -> None:
        self._tokenizer, self._seed = tokenizer, seed
        self._encode = cache(self._encoded)
        empty = tokenizer("")["input_ids"]
        self._start: list[int] = empty[:1] if empty and empty[0] == tokenizer.bos_token_id else []

    def haystack(self, number: int, context: int, needles: int) -> Haystack:
        """Plain sentences with so many facts evenly spread, each moved at random within its share.

        Raises:
            InputError: `context` has no room for the facts.
        """
        rng = Random(f"haystack/{self._seed}/{number}/{context}")
        names, numbers = rng.sample(NAMES, needles), [rng.choice(NUMBERS) for _ in range(needles)]
        facts = [self._sentence(fact(*told)) for told in zip(names, numbers, strict=True)]
        questions = [self._encode(question(name)) for name in names]
        answers = [self._encode(f" {number}") for number in numbers]
        room = context - len(self._start) - max(map(len, questions)) - max(map(len, answers))
        left = room - sum(map(len, facts))
        plain: list[list[int]] = []
        while left > 0:
            plain.append(self._sentence(filler(rng)))
            left -= len(plain[-1])
        if left < 0 and plain:
            plain.pop()
        if len(plain) < needles:
            raise InputError(f"context: {context} tokens have no room for {needles} needles and as many sentences")
        after = [int(len(plain) * (n + rng.random()) / needles) for n in range(needles)]
        tokens, placed = list(self._start), []
        for index, sentence in enumerate(plain):
            for n in (n for n in range(needles) if after[n] == index):
                placed.append(Needle(len(tokens) / room, questions[n], answers[n]))
                tokens += facts[n]
            tokens += sentence
        return Haystack(tokens, placed)

    def window(self, number: int, context: int) -> list[int]:
        """`context` tokens of text in which one sentence in five repeats a fact that was told before."""
        rng = Random(f"window/{self._seed}/{number}")
        tokens = list(self._start)
        for sentence in stream(rng):
            tokens += self._sentence(sentence)
            if len(tokens) >= context:
                return tokens[:context]
        raise AssertionError("the stream is endless")

    def examples(self, count: int, context: int) -> list[Example]:
        """For `spd.calibrate`: a haystack of one fact and its question; the number is what correctness is.

        Drawn apart from what is measured.
        """
        made = []
        for number in range(count):
            rng = Random(f"calibration/{self._seed}/{number}")
            told = fact(rng.choice(NAMES), rng.choice(NUMBERS))
            assert told.name is not None
            left = context - 3 * len(self._sentence(told))
            sentences: list[str] = []
            while left > 0:
                sentences.append(filler(rng).text)
                left -= len(self._encode(sentences[-1]))
            sentences.insert(rng.randrange(len(sentences) + 1), told.text)
            prompt = "".join(sentences) + question(told.name)
            answer = f" {told.number}"
            made.append(Example(prompt, answer, [(len(prompt) + 1, len(prompt) + len(answer))]))
        return made

    def _sentence(self, sentence: Sentence) -> list[int]:
        if sentence.name is None:
            return self._encode(sentence.text)
        return self._encode(question(sentence.name)) + self._encode(f" {sentence.number}") + self._encode(".")

    def _encoded(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def windows_of(tokens: list[int], context: int, count: int) -> Iterator[list[int]]:
    """Windows of a given text, each half a window behind the one before."""
    stride = context // 2
    if len(tokens) < context + (count - 1) * stride:
        raise InputError(
            f"text: {len(tokens)} tokens are too few for {count} windows of {context} tokens, each half a window on"
        )
    for number in range(count):
        yield tokens[number * stride : number * stride + context]
