"""What the entries and the diagnostics allow to be said: which differences are beyond chance, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spd.diagnostics import Change, Interval, changes, regressions
from spd.reproduce.summary import ALPHA, Entry, Outcomes, Summary
from spd.reproduce.tables import Cell, Row
from spd.stats import holm, paired_mean_test, ratio_interval


@dataclass(frozen=True)
class OffTarget:
    """Perplexity on neutral text of an arm, beside the base on the same texts.

    Args:
        capability: which the arm was made for.
        arm: its name.
        perplexity: its own.
        ratio: to the base's, with a 95 % interval over texts.
        p: of the paired t-test, text by text.
        adjusted: Holm's p over all arms of all capabilities.
    """

    capability: str
    arm: str
    perplexity: float
    ratio: Interval
    p: float
    adjusted: float

    @property
    def verdict(self) -> str:
        """ "better" (lower), "worse", or "" where the difference is within chance."""
        if self.adjusted >= ALPHA:
            return ""
        return "better" if self.ratio[0] < 1 else "worse"


@dataclass(frozen=True)
class Comparison:
    """An entry and the arm that its table compares it with."""

    table: str
    arm: str
    against: str
    entry: Entry


def off_target(diagnostics: Mapping[str, Mapping[str, Any]]) -> list[OffTarget]:
    """Every diagnosed arm's perplexity, in the order of the diagnostics."""
    found = []
    for capability, diagnosed in diagnostics.items():
        base = diagnosed["perplexity"].get("base")
        for arm, own in diagnosed["perplexity"].items():
            if arm != "base":
                texts = list(zip(own["texts"], base["texts"], strict=True))
                more = [mine["nll"] - theirs["nll"] for mine, theirs in texts]
                middle, low, high = ratio_interval(more, [mine["tokens"] for mine, _ in texts])
                ratio = math.exp(middle), math.exp(low), math.exp(high)
                found.append((capability, arm, own["value"], ratio, paired_mean_test(more)))
    adjusted = holm([p for *_, p in found])
    return [OffTarget(*each, of_all) for each, of_all in zip(found, adjusted, strict=True)]


def negative_transfer(summary: Summary, outcomes: Mapping[Cell, Outcomes]) -> list[tuple[Row, list[Change]]]:
    """Every row that is trained for one domain, on the tests of the others, beside the base. Holm's p is over a row."""
    found = []
    for row, line in zip(summary.rows, summary.entries, strict=True):
        others = [
            (column.test, entry.outcomes)
            for column, entry in zip(summary.columns, line, strict=True)
            if entry is not None and row.trained_for not in (None, column.domain.name)
        ]
        gains = {test: _gains(arm, outcomes[Cell(None, "base", test)]) for test, arm in others}
        comparable = {test: of_test for test, of_test in gains.items() if len(of_test) > 1}
        if comparable:
            found.append((row, regressions(comparable, ALPHA)))
    return found


def _gains(arm: Outcomes, base: Outcomes) -> Sequence[Sequence[float]]:
    """For every question, over seeds, by how much the arm is better than the base."""
    if arm.metric == "accuracy":
        return changes(base.correct[0], arm.correct)
    by_text = zip(base.nlls[0], *arm.nlls, strict=True)
    return [[own - each for each in seeds] for own, *seeds in by_text]


def comparisons(summaries: Iterable[Summary]) -> list[Comparison]:
    """Every entry that has a p."""
    found = []
    for summary in summaries:
        against = next(row.arm for row in summary.rows if row.label == summary.table.against)
        for row, line in zip(summary.rows, summary.entries, strict=True):
            name = row.label if row.trained_for else row.arm
            found += [
                Comparison(summary.table.name, name, against, entry)
                for entry in line
                if entry is not None and entry.p is not None
            ]
    return found


@dataclass(frozen=True)
class Conclusion:
    """How many comparisons there were, those beyond chance one by one, and how many chance alone would show."""

    said: str
    beyond: list[str]
    chance: str


def conclude(summaries: Sequence[Summary]) -> Conclusion:
    """What all tables together say. A comparison that stands in several tables is counted, and named, once."""
    found = comparisons(summaries)
    if not found:
        return Conclusion("No two arms were compared.", [], "")
    ps = list({(each.entry.cell, each.against): each.entry.p or 0.0 for each in found}.values())
    beyond: dict[tuple[Cell, str], Comparison] = {}
    for each in found:
        if each.entry.verdict:
            beyond.setdefault((each.entry.cell, each.against), each)
    unadjusted, together = (sum(p < ALPHA for p in of) for of in (ps, holm(ps)))
    return Conclusion(
        f"Of {len(ps)} comparisons of an arm with its table's row of comparison, each counted once, "
        f"{len(beyond) or 'none'} {'differs' if len(beyond) < 2 else 'differ'} beyond chance"
        + (":" if beyond else "."),
        [_said(each) for each in beyond.values()],
        f"Before any adjustment {unadjusted or 'none'} of them {'have' if unadjusted > 1 else 'has'} p < .05, where "
        f"chance alone is expected to show at most {math.ceil(ALPHA * len(ps))}. Adjusted over all of them together, "
        f"and not table by table, {together or 'none'} would remain.",
    )


def _said(each: Comparison) -> str:
    entry = each.entry
    assert entry.difference is not None and entry.adjusted is not None
    return (
        f"{each.arm} on {entry.cell.test} {points(abs(entry.difference), entry.outcomes.metric, sign=False)} "
        f"{entry.verdict} than {each.against} ({holm_text(entry.adjusted)}, table {each.table})"
    )


def points(difference: float, metric: str, *, sign: bool = True) -> str:
    """A difference with its unit: +0.5 points, or −0.004 nats."""
    decimals, unit = (3, "nats") if metric == "nll" else (1, "points")
    return f"{signed(difference, decimals) if sign else f'{difference:.{decimals}f}'} {unit}"


def signed(value: float, decimals: int) -> str:
    """With its sign, and none where it is rounded to zero."""
    rounded = round(value, decimals) + 0.0
    text = f"{abs(rounded):.{decimals}f}"
    return text if rounded == 0 else ("+" if rounded > 0 else "−") + text


def p_text(p: float) -> str:
    """p .31, p .012, p < .001; never rounded across the level of significance."""
    if p < 0.001:
        return "p < .001"
    text = f"{p:.{2 if p >= 0.1 else 3}f}"
    if float(text) == ALPHA and p < ALPHA:
        text = f"{math.floor(1e3 * p) / 1e3:.3f}"
    return "p 1" if float(text) == 1 else f"p {text.removeprefix('0')}"


def holm_text(adjusted: float) -> str:
    return p_text(adjusted).replace("p", "Holm", 1)


def metric_of(summary: Summary, index: int) -> str:
    """What a column is measured in."""
    return next((entry.outcomes.metric for line in summary.entries if (entry := line[index])), "accuracy")
