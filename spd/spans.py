"""From character spans to the tokens S that the correctness loss is taken over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from spd.errors import InputError
from spd.example import Example


@dataclass(frozen=True)
class EncodedExample:
    """Tokens of one example, cut at the maximum length.

    Args:
        index: the example's position in what the user passed.
        tokens: token ids of prompt + completion.
        targets: positions t in S, ascending; never 0, which nothing predicts.
        straddling: how many tokens in S reach over the edge of their span.
        cut: how many spans lost characters to the maximum length.
    """

    index: int
    tokens: list[int]
    targets: list[int]
    straddling: int
    cut: int


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, max_length: int, full: bool = False
) -> list[EncodedExample]:
    """Tokenise and mark S: every token that shares a character with a span, or with `full` every token but the first.

    Raises:
        InputError: the tokenizer cannot tell which characters a token stands for.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"tokenizer: {type(tokenizer).__name__} does not report character offsets; a fast tokenizer is needed"
        )
    encoded = []
    for index, example in enumerate(examples):
        batch = tokenizer(example.text, return_offsets_mapping=True, truncation=True, max_length=max_length)
        tokens, offsets = list(batch["input_ids"]), list(batch["offset_mapping"])
        if full:
            encoded.append(EncodedExample(index, tokens, list(range(1, len(tokens))), straddling=0, cut=0))
            continue
        text = example.text
        kept = [offset for offset in offsets if offset[0] < offset[1]]
        start_of_text = min((start for start, _ in kept), default=0)  # not 0 where the tokenizer cuts on the left
        end_of_text = max((end for _, end in kept), default=0)
        targets, straddling = [], 0
        for position, (start, end) in enumerate(offsets):
            overlaps = [(s, e) for s, e in example.spans if start < e and s < end]
            if position == 0 or not overlaps:
                continue
            targets.append(position)
            outside = [c for c in range(start, end) if not any(s <= c < e for s, e in overlaps)]
            straddling += any(not text[c].isspace() for c in outside)
        cut = sum(
            bool(text[s : min(e, start_of_text)].strip() or text[max(s, end_of_text) : e].strip())
            for s, e in example.spans
        )
        encoded.append(EncodedExample(index, tokens, targets, straddling, cut))
    return encoded
