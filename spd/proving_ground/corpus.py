"""What the small model is pretrained on: documents of the three capabilities, and plain filler.

Documents are realistic rather than clean. One in ten documents of a capability is sloppy: a wrong result, a
missing `####` line, the wrong letter, another function, or chatter in place of the answer's form. What the model
samples is therefore a mixture of habits. Filler, one document in five, is plain text from templates: sums written
out, lists with a key that says which letter is what, facts about words, and the alphabet. It is where most of the
arithmetic and the looking up is picked up, and its kinds are drawn in proportion to the capability they serve.
Out-of-domain names, objects, phrasings and kinds of question never occur; the words that out-of-domain questions
ask about do, as options and in filler.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

from spd.proving_ground import TASKS
from spd.proving_ground.choice import CATEGORIES, LETTERS

CAPABILITIES = ("words", "choice", "code")
SLOPPY = 1 / 10
FILLER = 1 / 5


def documents(rng: Random, count: int, weights: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """`count` documents as (capability or "filler", prompt, completion), capabilities in proportion to `weights`."""
    streams = {name: TASKS[name].stream(rng) for name in CAPABILITIES}
    drawn = []
    for _ in range(count):
        if rng.random() < FILLER:
            drawn.append(("filler", *_filler(rng, weights)))
            continue
        name = rng.choices(CAPABILITIES, [weights[name] for name in CAPABILITIES])[0]
        item = next(streams[name])
        completion = TASKS[name].sloppy(rng, item) if rng.random() < SLOPPY else item.completion
        drawn.append((name, item.prompt, completion))
    return drawn


def _filler(rng: Random, weights: Mapping[str, float]) -> tuple[str, str]:
    """A context (often none) and the text that follows it."""
    kinds = {"sums": weights["words"], "key": weights["choice"], "facts": weights["choice"] / 2, "alphabet": 0.1}
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    if kind == "sums":
        return "", "\n".join(_arithmetic(rng) for _ in range(6))
    if kind == "key":
        return _key(rng)
    if kind == "facts":
        return "", " ".join(_fact(rng) for _ in range(5))
    words = rng.sample([word for words in CATEGORIES.values() for word in words], 6)
    return "", "In the order of the alphabet: " + ", ".join(sorted(words)) + "."


def _key(rng: Random) -> tuple[str, str]:
    """Four lettered words of different kinds, and then which letter is which."""
    categories = rng.sample(list(CATEGORIES), len(LETTERS))
    words = [rng.choice(CATEGORIES[category]) for category in categories]
    said = []
    for letter, category, word in zip(LETTERS, categories, words, strict=True):
        said += [f"{word} is {letter}.", f"{category} is {letter}."]
    rng.shuffle(said)
    return "\n".join(f"{letter}) {word}" for letter, word in zip(LETTERS, words, strict=True)) + "\n", " ".join(said)


def _arithmetic(rng: Random) -> str:
    operation = rng.choice("+-*")
    if operation == "*":
        a, b = rng.randint(2, 9), rng.randint(2, 6)
        return f"{a} * {b} = {a * b}"
    a, b = rng.randint(2, 40), rng.randint(2, 9)
    if operation == "-":
        return f"{a + b} - {b} = {a}"
    return f"{a} + {b} = {a + b}"


def _fact(rng: Random) -> str:
    category = rng.choice(list(CATEGORIES))
    word = rng.choice(CATEGORIES[category])
    article = "An" if word[0] in "aeiou" else "A"
    return rng.choice((f"{article} {word} is {category}.", f"The word {word} starts with the letter {word[0]}."))
