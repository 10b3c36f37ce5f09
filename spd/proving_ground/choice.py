"""Multiple choice: four options and a letter."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from random import Random

from spd.proving_ground.generated import GeneratedTask, Item, vocabulary
from spd.tasks.base import Question

LETTERS = "ABCD"

CATEGORIES: dict[str, tuple[str, ...]] = {
    "an animal": vocabulary("dog cat cow fox bear duck goat lion"),
    "a colour": vocabulary("red blue green black white brown pink grey"),
    "a tool": vocabulary("saw rake axe drill spade hook clamp file"),
    "a fruit": vocabulary("apple pear plum grape lemon peach melon fig"),
    "a garment": vocabulary("shirt coat hat sock scarf glove skirt boot"),
    "a vehicle": vocabulary("car bus train boat truck bike ship van"),
}
"""Words a question may ask for by kind. Which kinds are asked for where is decided by the two tasks."""

Options = tuple[str, list[str], int]
"""The question, its four options in order, and the index of the right one."""


def _numbers(rng: Random) -> list[int]:
    return rng.sample(range(2, 100), 4)


def _words(rng: Random) -> list[str]:
    """Four words of any kind with different first letters."""
    words: dict[str, str] = {}
    while len(words) < 4:
        word = rng.choice(CATEGORIES[rng.choice(list(CATEGORIES))])
        words.setdefault(word[0], word)
    return list(words.values())


def _largest(text: str) -> Callable[[Random], Options]:
    def kind(rng: Random) -> Options:
        numbers = _numbers(rng)
        return text, [str(n) for n in numbers], numbers.index(max(numbers))

    return kind


def _smallest(text: str) -> Callable[[Random], Options]:
    def kind(rng: Random) -> Options:
        numbers = _numbers(rng)
        return text, [str(n) for n in numbers], numbers.index(min(numbers))

    return kind


def _first_in_alphabet(text: str) -> Callable[[Random], Options]:
    def kind(rng: Random) -> Options:
        words = _words(rng)
        return text, words, words.index(min(words))

    return kind


def _starts_with(text: str) -> Callable[[Random], Options]:
    def kind(rng: Random) -> Options:
        words = _words(rng)
        answer = rng.randrange(4)
        return text.format(letter=words[answer][0]), words, answer

    return kind


def _is_a(text: str, categories: tuple[str, ...]) -> Callable[[Random], Options]:
    def kind(rng: Random) -> Options:
        category = rng.choice(categories)
        words = [rng.choice(CATEGORIES[c]) for c in rng.sample([c for c in CATEGORIES if c != category], 3)]
        answer = rng.randrange(4)
        words.insert(answer, rng.choice(CATEGORIES[category]))
        return text.format(category=category), words, answer

    return kind


def _odd_one_out(text: str) -> Callable[[Random], Options]:
    def kind(rng: Random) -> Options:
        common, odd = rng.sample(list(CATEGORIES), 2)
        words = rng.sample(CATEGORIES[common], 3)
        answer = rng.randrange(4)
        words.insert(answer, rng.choice(CATEGORIES[odd]))
        return text, words, answer

    return kind


def _even(text: str) -> Callable[[Random], Options]:
    def kind(rng: Random) -> Options:
        numbers = rng.sample(range(3, 100, 2), 3)
        answer = rng.randrange(4)
        numbers.insert(answer, rng.randrange(2, 100, 2))
        return text, [str(n) for n in numbers], answer

    return kind


IN_DOMAIN = (
    *[_is_a("Which word is {category}?", ("an animal",))] * 4,
    *[_is_a("Which word is {category}?", ("a colour",))] * 2,
    _is_a("Which word is {category}?", ("a tool",)),
    _is_a("Which word is {category}?", ("a vehicle",)),
    _starts_with("Which word starts with the letter {letter}?"),
    _first_in_alphabet("Which word comes first in the alphabet?"),
    _odd_one_out("Which word does not belong?"),
    *[_largest("Which number is the largest?")] * 2,
    _smallest("Which number is the smallest?"),
)
"""Kinds of question, as often as they are asked."""

OUT_OF_DOMAIN = (
    _largest("Here are some numbers. Find the largest of them."),
    _smallest("Pick the number that is smaller than the rest."),
    _starts_with("Find a word with the first letter {letter}."),
    _is_a("Which of these is {category}?", ("a fruit", "a garment")),
    _is_a("Find {category}.", ("an animal", "a colour", "a tool", "a vehicle")),
    _even("Which number is even?"),
)


class Choice(GeneratedTask):
    """Questions a reader of the text can answer, in kinds of very different difficulty."""

    max_new_tokens = 8

    def __init__(self, name: str, kinds: tuple[Callable[[Random], Options], ...]) -> None:
        self.name = name
        self.kinds = kinds

    def draw(self, rng: Random) -> Item:
        question, options, answer = rng.choice(self.kinds)(rng)
        lines = [f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=True)]
        prompt = "\n".join([question, *lines, "Answer:"])
        completion = f" {LETTERS[answer]}"
        end = len(prompt) + len(completion)
        return Item(prompt, completion, ((end - 1, end),), LETTERS[answer])

    def questions(self, split: str) -> list[Question]:
        options = tuple(f" {letter}" for letter in LETTERS)
        return [replace(question, options=options) for question in super().questions(split)]

    def sloppy(self, rng: Random, item: Item) -> str:
        if rng.random() < 0.5:
            return f" {rng.choice(LETTERS)}"
        return f" I think {item.reference}"

    def is_correct(self, completion: str, question: Question) -> bool:
        """Whether the completion opens with the reference letter, standing alone."""
        found = re.match(r"\s*([A-D])\b", completion)
        return found is not None and found.group(1) == question.reference
