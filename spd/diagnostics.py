"""What training kept of the projection, what it cost elsewhere, and how far a subspace moved."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import fmean

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from spd.comparison import compare_bases
from spd.distillation import adapted
from spd.errors import InputError
from spd.generation import Generation
from spd.intervention import attach
from spd.likelihood import ScoredText, TextNLL, check_texts, length_sorted, scored_logits, text_nll
from spd.progress import bar
from spd.proving_ground.corpus import CAPABILITIES, documents
from spd.stats import holm, paired_mean_test, paired_test, ratio_interval
from spd.subspace import Subspace

GROUP_BYTES = 2**30
"""Of logits that are kept while the model goes from one state to the next; a single batch may take more."""
KL_NUMBERS = 2**18
"""Logits of one state that are compared at once, in float64: what a core's cache holds, five times as fast as 2**24."""

_PAIRS = {
    "projected_tuned": ("projected", "tuned"),
    "projected_base": ("projected", "base"),
    "tuned_base": ("tuned", "base"),
}

RESAMPLES = 2000
"""Of the texts, for the intervals of divergences."""

Interval = tuple[float, float, float]
"""An estimate and the ends of its 95 % interval."""


@dataclass(frozen=True)
class Shift:
    """Divergences between the projected policy, the tuned model and the base, on text the projected policy wrote.

    Each is KL(p || q) = sum_v p(v) log(p(v) / q(v)) in nats a completion token, at temperature 1 and exact over the
    vocabulary: its mean over all tokens, with the percentile bootstrap interval over texts: a few texts carry most of
    a divergence, and an interval by Student's t would reach below zero, where no divergence is.

    Args:
        projected_tuned, projected_base, tuned_base: KL(projected || tuned), KL(projected || base), KL(tuned || base).
        kept: 1 - KL(projected || tuned) / KL(projected || base), how much of what projection did to the distribution
            survives in the tuned model: 1 all, 0 none, below 0 it went elsewhere. None where KL(projected || base) is
            no more than the model's rounding.
        texts: completions.
        tokens: of all of them.
    """

    projected_tuned: Interval
    projected_base: Interval
    tuned_base: Interval
    kept: Interval | None
    texts: int
    tokens: int


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean -log p a token, over all tokens, with a 95 % interval over texts; and each text's own -log p."""

    value: float
    low: float
    high: float
    texts: list[TextNLL]


@dataclass(frozen=True)
class Change:
    """How an arm did on one task off target, beside the base.

    Args:
        task: its name.
        change: mean difference, arm minus base; below 0 the arm is worse.
        p: two-sided, of this task alone.
        adjusted: Holm's p, over all the tasks that were compared.
        fell: whether the arm is worse beyond chance: negative transfer.
    """

    task: str
    change: float
    p: float
    adjusted: float
    fell: bool


def distribution_shift(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    subspace: Subspace,
    adapter: str | Path,
    generations: Sequence[Generation],
    *,
    batch_size: int = 8,
    sides: str = "kv",
    mode: str = "auto",
    a: float = 0.0,
    b: float = 1.0,
    progress: bool = True,
) -> Shift:
    """Whether what the projection does to generation survives training.

    One model cannot be base, projected and tuned at once, so it goes through the three states for one group of batches
    after another; a group's logits, base and projected, are kept within `GROUP_BYTES`.

    Args:
        model: the original model, without an intervention.
        tokenizer: its tokenizer.
        subspace: what K and V were projected on while `generations` were written.
        adapter: folder of the adapter that was trained on them.
        generations: two completions or more, as `spd.generate` returned them.
        batch_size: completions in one forward pass.
        sides, mode, a, b: see `spd.attach`.
        progress: show a progress bar.

    Raises:
        InputError: unusable arguments, too few completions, some without tokens or too long for the model, or a
            subspace or adapter of another model.
    """
    texts = _encode(model, tokenizer, generations)
    sums = {name: [0.0] * len(texts) for name in _PAIRS}
    with bar(total=3 * len(texts), label="distribution shift", unit="texts", show=progress) as shown:

        def logits_of(state: nn.Module, batch: list[int]) -> Tensor:
            shown.update(len(batch))
            return scored_logits(state, [texts[index] for index in batch])[0]

        for group in _groups(model, texts, batch_size):
            of_base = [logits_of(model, batch) for batch in group]
            with attach(model, subspace, mode=mode, sides=sides, a=a, b=b):
                of_projected = [logits_of(model, batch) for batch in group]
            with adapted(model, adapter) as state:
                for batch, projected, base in zip(group, of_projected, of_base, strict=True):
                    tuned = logits_of(state, batch)
                    by_token = divergences({"projected": projected, "tuned": tuned, "base": base}, _PAIRS)
                    for name, found in by_token.items():
                        parts = found.split([texts[index].scored for index in batch])
                        for index, part in zip(batch, parts, strict=True):
                            sums[name][index] = float(part.sum())

    tokens = [text.scored for text in texts]
    per_token = {name: _bootstrapped(of_text, tokens) for name, of_text in sums.items()}
    kept = None
    if per_token["projected_base"][0] > torch.finfo(next(model.parameters()).dtype).eps:
        lost, low, high = _bootstrapped(sums["projected_tuned"], sums["projected_base"])
        kept = 1 - lost, 1 - high, 1 - low
    return Shift(**per_token, kept=kept, texts=len(texts), tokens=sum(tokens))


def divergences(logits: Mapping[str, Tensor], pairs: Mapping[str, tuple[str, str]]) -> dict[str, Tensor]:
    """KL(p || q) of every row of (n, vocabulary) logits, summed over the whole vocabulary: (n,) float64.

    Args:
        logits: of several states, by name.
        pairs: which p and q to compare, under the name that each comparison has in what is returned.
    """
    first = next(iter(logits.values()))
    n, vocabulary = first.shape
    found = {name: torch.zeros(n, dtype=torch.float64, device=first.device) for name in pairs}
    step = max(1, KL_NUMBERS // vocabulary)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        log_p = {state: some[rows].double().log_softmax(-1) for state, some in logits.items()}
        for name, (p, q) in pairs.items():
            found[name][rows] = torch.linalg.vecdot(log_p[p].exp(), log_p[p] - log_p[q])
    return found


def neutral_nll(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    label: str = "neutral text",
    progress: bool = True,
) -> Perplexity:
    """Perplexity on texts that no arm was trained for. Two arms are compared by `paired_mean_test`, text by text.

    Args:
        model: a causal language model of transformers, with whatever is attached to it, or of peft.
        tokenizer: its fast tokenizer.
        texts: two or more, such as `neutral_texts`.
        batch_size, max_length, label, progress: see `spd.likelihood.completion_nll`.

    Raises:
        InputError: fewer than two texts, one of fewer than two tokens, or one that is too long.
    """
    if len(texts) < 2:
        raise InputError(f"texts: expected at least two, for an interval, got {len(texts)}")
    found = text_nll(
        model, tokenizer, texts, batch_size=batch_size, max_length=max_length, label=label, progress=progress
    )
    middle, low, high = ratio_interval([text.nll for text in found], [text.tokens for text in found])
    return Perplexity(math.exp(middle), math.exp(low), math.exp(high), found)


def neutral_texts(n: int, seed: int) -> list[str]:
    """`n` plain texts for a model that has no others: the filler of the proving ground's pretraining.

    Sums written out, lettered lists, facts about words, words in the order of the alphabet: what the carried model
    learned beside the forms of its capabilities. For any other model, its user's own texts say more.
    """
    rng = Random(f"neutral/{seed}")
    texts: list[str] = []
    while len(texts) < n:
        drawn = documents(rng, n, dict.fromkeys(CAPABILITIES, 1.0))
        texts += [prompt + completion for kind, prompt, completion in drawn if kind == "filler"]
    return texts[:n]


def overlap(a: Subspace, b: Subspace) -> dict[tuple[int, str], float]:
    """By layer and side, the mean squared cosine of the principal angles between two subspaces, from 0 to 1.

    ||U_a^T U_b||_F^2 / min(r_a, r_b): 1 where one contains the other, `expected_overlap` for random ones.

    Raises:
        InputError: the two differ in layers, widths.
    """
    if a.layers != b.layers:
        raise InputError(f"b: expected the layers of a, {a.layers}, got {b.layers}")
    found = {}
    for layer in a.layers:
        for side in "kv":
            one, other = a.side(side)[layer], b.side(side)[layer]
            if one.width != other.width:
                raise InputError(f"b: expected d = {one.width} at {side.upper()} of layer {layer}, got {other.width}")
            found[layer, side] = compare_bases(layer, side, one, other).overlap
    return found


def expected_overlap(r: int, d: int) -> float:
    """The mean of `overlap` for two independent, uniformly distributed subspaces of rank r in d dimensions: r / d."""
    return r / d


def changes(base: Sequence[bool | None], arms: Sequence[Sequence[bool | None]]) -> list[list[int]]:
    """For every question, over seeds, arm right minus base right; those that either has no verdict on are left out.

    Args:
        base: verdicts of the base on a task's questions.
        arms: for every seed, verdicts of the arm on the same questions.
    """
    by_question = zip(base, *arms, strict=True)
    found = [[each - own for each in others if each is not None] for own, *others in by_question if own is not None]
    return [differences for differences in found if differences]


def regressions(rows: Mapping[str, Sequence[Sequence[float]]], alpha: float = 0.05) -> list[Change]:
    """Flag negative transfer: the tasks off target on which an arm is worse than the base, beyond chance.

    Args:
        rows: by task, for every question and over seeds, by how much the arm is better. Whole numbers (`changes`) take
            the exact `paired_test`, others (of every text, -log p of the base minus that of the arm) the paired t-test.
        alpha: chance of any false flag among all tasks (Holm).

    Raises:
        InputError: a task with nothing to compare.
    """
    for task, differences in rows.items():
        if len(differences) < 2:
            raise InputError(f"rows: expected at least two questions of {task}, got {len(differences)}")
    ps = [_p(differences) for differences in rows.values()]
    found = []
    for (task, differences), p, adjusted in zip(rows.items(), ps, holm(ps), strict=True):
        change = fmean(each for question in differences for each in question)
        found.append(Change(task, change, p, adjusted, change < 0 and adjusted < alpha))
    return found


def _p(differences: Sequence[Sequence[float]]) -> float:
    if all(isinstance(each, int) for question in differences for each in question):
        return paired_test([[int(each) for each in question] for question in differences])
    return paired_mean_test([fmean(question) for question in differences])


def _bootstrapped(numerators: Sequence[float], denominators: Sequence[float]) -> Interval:
    """sum(a) / sum(b), and the ends of its 95 % percentile bootstrap interval over texts (Efron 1979), seeded."""
    a, b = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    drawn = np.random.default_rng(0).integers(len(a), size=(RESAMPLES, len(a)))
    above, below = a[drawn].sum(1), b[drawn].sum(1)
    possible = below > 0  # of texts that projection moves nothing in there is no share
    low, high = np.percentile(above[possible] / below[possible], [2.5, 97.5])
    return float(a.sum() / b.sum()), float(low), float(high)


def _encode(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, generations: Sequence[Generation]
) -> list[ScoredText]:
    """The very tokens that were sampled, behind those of the prompt."""
    if len(generations) < 2:
        raise InputError(f"generations: expected at least two, for an interval, got {len(generations)}")
    prompts = [list(tokens) for tokens in tokenizer([each.prompt for each in generations])["input_ids"]]
    texts = [
        ScoredText(prompt + list(generation.tokens), max(1, len(prompt)))
        for prompt, generation in zip(prompts, generations, strict=True)
    ]
    check_texts("generations", texts, model)
    return texts


def _groups(model: nn.Module, texts: Sequence[ScoredText], batch_size: int) -> Iterator[list[list[int]]]:
    """Batches of like length, as many together as GROUP_BYTES has room for the base's and the projected logits of."""
    vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    bytes_per_token = 2 * vocabulary * next(model.parameters()).element_size()
    group: list[list[int]] = []
    room = GROUP_BYTES
    for batch in length_sorted(texts, batch_size):
        needed = bytes_per_token * sum(texts[index].scored for index in batch)
        if group and needed > room:
            yield group
            group, room = [], GROUP_BYTES
        group.append(batch)
        room -= needed
    yield group
