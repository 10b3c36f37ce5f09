"""Text in which a number that was said long ago decides a word now: for contexts of thousands of tokens.

Facts, "bako is 17.", stand in plain sentences about nothing in particular. Plain English words, so that
any tokenizer takes it; the carried recall model reads each word as one token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from spd.proving_ground.generated import vocabulary

SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou")
# Names of two different syllables, one in sixteen of all: as many as a small model learns to tell apart quickly.
NAMES = tuple(
    first + second for n, first in enumerate(SYLLABLES) for second in SYLLABLES[n % 16 :: 16] if first != second
)
NUMBERS = tuple(str(number) for number in range(10, 60))
ADJECTIVES = vocabulary("old young tired happy quiet clever hungry careful lucky busy proud gentle")
PEOPLE = vocabulary("farmer sailor baker teacher doctor singer painter soldier hunter gardener tailor miller")
VERBS = vocabulary("carries brings sends takes pulls sells")
COLOURS = vocabulary("red blue green yellow white black brown grey")
THINGS = vocabulary("basket lamp ladder barrel wagon letter blanket kettle mirror hammer")
PLACES = vocabulary("river market forest village harbour bridge tower garden mill station")


@dataclass(frozen=True)
class Sentence:
    """Its text, beginning with a space as most tokenizers want it; name and number of a fact."""

    text: str
    name: str | None = None
    number: str | None = None
    repeated: bool = False


def question(name: str) -> str:
    """What the fact's number follows."""
    return f" {name} is"


def fact(name: str, number: str, *, repeated: bool = False) -> Sentence:
    return Sentence(f"{question(name)} {number}.", name, number, repeated)


def filler(rng: Random) -> Sentence:
    adjective, person, verb = rng.choice(ADJECTIVES), rng.choice(PEOPLE), rng.choice(VERBS)
    thing, place = f"{rng.choice(COLOURS)} {rng.choice(THINGS)}", rng.choice(PLACES)
    return Sentence(f" The {adjective} {person} {verb} a {thing} to the {place}.")


def stream(rng: Random, *, facts: float = 0.1, repeats: float = 0.2, names: int = 64) -> Iterator[Sentence]:
    """Endless sentences: so many of them new facts, so many facts that were told before, the rest filler.

    At most `names` facts are told; then only repeats and filler follow.
    """
    told: dict[str, str] = {}
    left = rng.sample(NAMES, names)
    while True:
        kind = rng.random()
        if kind < facts and left:
            name = left.pop()
            told[name] = rng.choice(NUMBERS)
            yield fact(name, told[name])
        elif kind < facts + repeats and told:
            name = rng.choice(list(told))
            yield fact(name, told[name], repeated=True)
        else:
            yield filler(rng)
