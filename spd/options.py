"""Which of a question's options a model, with whatever is attached to it, finds likeliest."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from spd.likelihood import ScoredText, check_batch_size, dealt, encode_pairs, scored_logits, takes_cache

LEAST_SHARED = 32
"""Tokens at the front that texts must share, and half of each, to go through the model once for all of them."""


@dataclass(frozen=True)
class Choice:
    """A prompt followed by each of the completions to choose among, scored from where they part."""

    texts: list[ScoredText]

    @property
    def rows(self) -> list[ScoredText]:
        """What goes through the model: one text for all of them where each is a single token."""
        return self.texts[:1] if all(text.scored == 1 for text in self.texts) else self.texts


def encode_choice(tokenizer: PreTrainedTokenizerBase, prompt: str, options: Sequence[str]) -> Choice:
    """Every option behind the prompt, tokenised as one text with it."""
    texts = encode_pairs("options", tokenizer, [(prompt, option) for option in options])
    columns = zip(*(text.tokens[:-1] for text in texts), strict=False)  # at least the last token is scored
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    start = max(shared, min(text.start for text in texts))
    return Choice([replace(text, start=start) for text in texts])


def option_nlls(
    model: nn.Module,
    choices: Sequence[Choice],
    *,
    done: Collection[int] = (),
    batch_size: int = 32,
    deterministic: bool = False,
    label: str,
) -> Iterator[dict[int, list[float]]]:
    """-log p of every option: the sum over its tokens, without those that all options of a question begin with.

    The least is the option that lm-evaluation-harness counts for `acc`.

    Args:
        model: a causal language model of transformers, with whatever is attached to it, or of peft.
        choices: from `encode_choice`.
        done: positions of choices that need not be scored; a batch of such alone is left out, the others are as ever.
        batch_size: texts in one forward pass (see `Choice.rows`); halved where they do not fit in memory.
        deterministic: refuse a batch that does not fit instead.
        label: who speaks of that.

    Yields:
        Batch after batch, the sums in nats in the order of the options, by the choice's position.
    """

    def score(batch: Sequence[int]) -> dict[int, list[float]]:
        rows = [choices[index].rows for index in batch]
        counts = [sum(row.scored for row in own) for own in rows]
        together = [row for own in rows for row in own]
        logits, targets = scored_logits(model, together, _shared(together) if sharing else 0)
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        split = zip(batch, log_p.split(counts), targets.split(counts), strict=True)
        return {index: _sums(choices[index], own, wanted) for index, own, wanted in split}

    check_batch_size(batch_size)
    sharing = takes_cache(model)
    batches = _batches(choices, batch_size, sharing)
    todo = [batch for batch in batches if not all(index in done for index in batch)]
    yield from dealt(todo, score, model=model, caller=label, unit="questions", fixed=deterministic)


def _sums(choice: Choice, log_p: Tensor, targets: Tensor) -> list[float]:
    if len(targets) == 1:  # the options are what may follow
        return (-log_p[0, [text.tokens[-1] for text in choice.texts]]).tolist()
    losses = -log_p.gather(1, targets[:, None]).double()
    return [float(own.sum()) for own in losses.split([text.scored for text in choice.texts])]


def _batches(choices: Sequence[Choice], batch_size: int, sharing: bool) -> list[list[int]]:
    """Choices of like length, and where it serves, of those whose texts begin alike."""
    batches: list[list[int]] = []
    for family in _families(choices) if sharing else [range(len(choices))]:
        room = 0
        for index in sorted(family, key=lambda index: (len(choices[index].texts[0].tokens), index)):
            rows = len(choices[index].rows)
            if rows > room:
                batches.append([])
                room = batch_size
            batches[-1].append(index)
            room -= rows
    return batches


def _families(choices: Sequence[Choice]) -> list[list[int]]:
    """Choices that share the most of their texts, such as the shots of a subject; and all others as one."""
    families: list[list[int]] = []
    for index in sorted(range(len(choices)), key=lambda index: choices[index].texts[0].tokens):
        if families and _shared([*choices[families[-1][0]].rows, *choices[index].rows]):
            families[-1].append(index)
        else:
            families.append([index])
    alike: list[list[int]] = []
    alone: list[int] = []
    for own in families:
        if len(own) > 1 or _shared(choices[own[0]].rows):
            alike.append(own)
        else:
            alone += own
    return [*alike, alone]


def _shared(texts: Sequence[ScoredText]) -> int:
    """So many tokens at the front are worth a pass of their own."""
    if len(texts) < 2:
        return 0
    tokens = [text.tokens for text in texts]
    ends = zip(min(tokens), max(tokens), strict=False)  # what the first and the last in order share, all share
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ends))
    same = min(same, *(text.start - 1 for text in texts))
    return same if same >= LEAST_SHARED and 2 * same >= max(map(len, tokens)) else 0
