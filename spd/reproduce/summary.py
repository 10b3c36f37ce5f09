"""From outcomes to entries: values, intervals, paired tests, and which differences are beyond chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from spd.diagnostics import changes
from spd.reproduce.tables import Cell, Column, Layout, Row, Table
from spd.stats import holm, mean_interval, paired_mean_test, paired_test, wilson_interval

ALPHA = 0.05


@dataclass(frozen=True)
class Outcomes:
    """One cell over its seeds.

    Args:
        metric: "accuracy" or "nll".
        correct: for every seed, a verdict for every question (None: none).
        nlls: for every seed, the NLL a token of every reference.
        changed: share of the answers that read otherwise than the base's, over seeds.
        too_long: questions left out.
        left_out: their numbers.
    """

    metric: str
    correct: list[list[bool | None]]
    nlls: list[list[float]]
    changed: float
    too_long: int
    left_out: tuple[int, ...] = ()

    @classmethod
    def read(cls, outcomes: Sequence[Mapping[str, Any]]) -> Outcomes:
        marks = {"1": True, "0": False, "-": None}
        return cls(
            outcomes[0]["metric"],
            [[marks[mark] for mark in each["correct"]] for each in outcomes],
            [each["nll"] for each in outcomes],
            fmean(each["changed"] for each in outcomes),
            len(outcomes[0]["too_long"]),
            tuple(outcomes[0]["too_long"]),
        )

    @property
    def seeds(self) -> int:
        return len(self.correct)

    @property
    def n(self) -> int:
        """Questions, each counted once however many seeds answered it."""
        if self.metric == "nll":
            return len(self.nlls[0])
        return sum(verdict is not None for verdict in self.correct[0])

    @property
    def value(self) -> float:
        """Accuracy in %, or NLL in nats a token; the mean over seeds."""
        if self.metric == "nll":
            return fmean(map(fmean, self.nlls))
        return 100 * self._mean_correct() / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 %. Seeds answer the same questions, so they do not make the interval over questions narrower.

        The NLL of a single text has none: both ends are the value itself.
        """
        if self.metric == "nll" and self.n < 2:
            return self.value, self.value
        if self.metric == "nll":
            _, low, high = mean_interval([fmean(text) for text in zip(*self.nlls, strict=True)])
            return low, high
        low, high = wilson_interval(self._mean_correct(), self.n)
        return 100 * low, 100 * high

    @property
    def parse_rate(self) -> float | None:
        """For NLL tasks, the share in % of the completions that were judged right."""
        if self.metric != "nll" or not any(verdict is not None for verdict in self.correct[0]):
            return None
        judged = [verdict for seed in self.correct for verdict in seed if verdict is not None]
        return 100 * fmean(judged)

    def _mean_correct(self) -> float:
        return fmean(sum(bool(verdict) for verdict in seed) for seed in self.correct)


def better_by(arm: Outcomes, other: Outcomes) -> float:
    """By how much an arm is better: points of accuracy, or nats a token less."""
    return other.value - arm.value if arm.metric == "nll" else arm.value - other.value


def paired_p(arm: Outcomes, other: Outcomes) -> float:
    """Two-sided p that two arms are equally good on a test's questions.

    Accuracies: the exact sign-flip test over questions, McNemar's where there is one seed. NLLs: the paired t-test over
    the references' means over seeds. Seeds are paired in order; what does not depend on the seed stands for each.
    """
    if arm.metric == "nll":
        mine, theirs = ([fmean(text) for text in zip(*each.nlls, strict=True)] for each in (arm, other))
        return paired_mean_test([b - a for a, b in zip(mine, theirs, strict=True)]) if len(mine) > 1 else 1.0
    if other.seeds == 1:
        return paired_test(changes(other.correct[0], arm.correct))
    if arm.seeds == 1:
        return paired_test(changes(arm.correct[0], other.correct))
    by_seed = [changes(theirs, [mine]) for mine, theirs in zip(arm.correct, other.correct, strict=True)]
    return paired_test([[d for (d,) in question] for question in zip(*by_seed, strict=True)])


@dataclass(frozen=True)
class Entry:
    """One entry of a table. `p` is against the table's row of comparison, `adjusted` Holm's over the table."""

    cell: Cell
    outcomes: Outcomes
    published: float | None
    difference: float | None
    p: float | None
    adjusted: float | None

    @property
    def verdict(self) -> str:
        """ "better", "worse", or "" where the difference is within chance."""
        if self.adjusted is None or self.adjusted >= ALPHA or not self.difference:
            return ""
        return "better" if self.difference > 0 else "worse"


@dataclass(frozen=True)
class Contrast:
    """Two rows compared on one column."""

    column: Column
    row: str
    other: str
    difference: float
    p: float


@dataclass(frozen=True)
class Summary:
    """A table with its entries: `entries[row][column]`, None where there is none."""

    table: Table
    columns: list[Column]
    rows: list[Row]
    entries: list[list[Entry | None]]
    contrasts: list[Contrast]


def _reference(against: str, labels: Sequence[str]) -> str:
    """The row of comparison; where it is missing, the one of the nearest number, or else the first."""
    numbers = [label for label in labels if label.isdecimal()]
    if against in labels or not (numbers and against.isdecimal()):
        return against if against in labels else labels[0]
    return min(numbers, key=lambda label: abs(int(label) - int(against)))


def summarise(table: Table, layout: Layout, outcomes: Mapping[Cell, Outcomes]) -> Summary:
    """The entries of one table."""
    columns = layout.columns(table)
    filled = [(row, [layout.cell(row, column) for column in columns]) for row in layout.rows(table)]
    filled = [each for each in filled if any(each[1])] or filled  # what the records are too few for is no row
    rows, cells = [row for row, _ in filled], [line for _, line in filled]
    labels = [row.label for row in rows]
    table = replace(table, against=_reference(table.against, labels))
    reference = cells[labels.index(table.against)]

    compared: dict[tuple[int, int], float] = {}
    for i, line in enumerate(cells):
        for j, cell in enumerate(line):
            against = reference[j]
            if cell is not None and against is not None and cell != against:
                compared[i, j] = paired_p(outcomes[cell], outcomes[against])
    adjusted = dict(zip(compared, holm(list(compared.values())), strict=True))

    def entry(i: int, j: int) -> Entry | None:
        cell, against = cells[i][j], reference[j]
        if cell is None:
            return None
        difference = better_by(outcomes[cell], outcomes[against]) if (i, j) in compared and against else None
        published = layout.published(rows[i], columns[j])
        return Entry(cell, outcomes[cell], published, difference, compared.get((i, j)), adjusted.get((i, j)))

    contrasts = []
    for row, other in table.contrasts:
        for column, mine, theirs in zip(columns, cells[labels.index(row)], cells[labels.index(other)], strict=True):
            if mine is not None and theirs is not None:
                a, b = outcomes[mine], outcomes[theirs]
                contrasts.append(Contrast(column, row, other, better_by(a, b), paired_p(a, b)))
    entries = [[entry(i, j) for j in range(len(columns))] for i in range(len(rows))]
    return Summary(table, columns, rows, entries, contrasts)
