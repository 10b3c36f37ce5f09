"""What the generated capabilities share: how items are drawn, and how the splits are kept apart.

A capability is an endless seeded source of items. Which split an item may enter is decided by a checksum of its
prompt, so calibration, training prompts, test, the steering set of `build` and the pretraining documents are
disjoint by construction, with no list of what has been seen.
"""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from random import Random

from spd.example import Example
from spd.tasks.base import Question, Task

SPLITS: dict[str, tuple[int, ...]] = {
    "calibration": (0,),
    "training": (1,),
    "test": (2,),
    "steering": (3,),
    "pretraining": (4, 5, 6, 7, 8, 9),
}
"""Remainders, modulo 10, of the prompt's checksum that belong to each split."""

SIZES = {"calibration": 100, "training": 300, "test": 200, "steering": 96}


def vocabulary(words: str) -> tuple[str, ...]:
    """Words written as one string, which reads better than sixteen pairs of quotes."""
    return tuple(words.split())


def made_up(rng: Random) -> str:
    """A pronounceable word that means nothing, so that names have to be read and cannot all be learned by heart."""
    return "".join(rng.choice("bdklmnrst") + rng.choice("aeiou") for _ in range(2))


def split_of(prompt: str) -> str:
    """The one split in which this prompt may appear."""
    remainder = zlib.crc32(prompt.encode()) % 10
    return next(name for name, remainders in SPLITS.items() if remainder in remainders)


@dataclass(frozen=True)
class Item:
    """One generated record: what is asked, the right answer, where in the text it lies, and how it is checked."""

    prompt: str
    completion: str
    spans: tuple[tuple[int, int], ...]
    reference: str


class GeneratedTask(Task):
    """A task whose records are drawn from `draw` with seeds fixed by the names of the task and the split."""

    max_new_tokens = 48
    calibration_size = 50
    test_size = 200

    @abstractmethod
    def draw(self, rng: Random) -> Item:
        """One item. Everything random comes from `rng`."""

    @abstractmethod
    def sloppy(self, rng: Random, item: Item) -> str:
        """A careless completion of the item, as some pretraining documents have it."""

    def items(self, split: str) -> list[Item]:
        """The items of one split, without repetition, in their fixed order."""
        return list(_items(self, split))

    def stream(self, rng: Random) -> Iterator[Item]:
        """Endless items of the pretraining split."""
        while True:
            item = self.draw(rng)
            if split_of(item.prompt) == "pretraining":
                yield item

    def calibration(self) -> list[Example]:
        return [Example(item.prompt, item.completion, list(item.spans)) for item in self.items("calibration")]

    def training_prompts(self) -> list[str]:
        return [item.prompt for item in self.items("training")]

    def test(self) -> list[Question]:
        return self.questions("test")

    def questions(self, split: str) -> list[Question]:
        return [Question(item.prompt, item.reference) for item in self.items(split)]


class Steering(Task):
    """A generated task tested on questions set aside for choosing settings, so that its test questions stay unseen."""

    def __init__(self, task: GeneratedTask) -> None:
        self.name = f"{task.name}-steering"
        self.task = task
        self.max_new_tokens = task.max_new_tokens
        self.calibration_size = task.calibration_size

    def calibration(self) -> list[Example]:
        return self.task.calibration()

    def training_prompts(self) -> list[str]:
        return self.task.training_prompts()

    def test(self) -> list[Question]:
        return self.task.questions("steering")

    def is_correct(self, completion: str, question: Question) -> bool:
        return self.task.is_correct(completion, question)


@cache
def _items(task: GeneratedTask, split: str) -> tuple[Item, ...]:
    rng = Random(f"{task.name}/{split}")
    items: dict[str, Item] = {}
    for _ in range(1000 * SIZES[split]):
        item = task.draw(rng)
        if split_of(item.prompt) == split:
            items.setdefault(item.prompt, item)
        if len(items) == SIZES[split]:
            return tuple(items.values())
    raise AssertionError(f"{task.name} has too few distinct prompts for its {split} split")
