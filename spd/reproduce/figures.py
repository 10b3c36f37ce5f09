"""The figures of a reproduction: every number with its interval, and filled or outlined only what is beyond chance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spd.arms import parse_arm
from spd.plots import ARM_COLOUR, GRID, INK, MUTED, PANELS_A_ROW, arm_colours, blank_figure
from spd.reproduce.findings import OffTarget, metric_of, signed
from spd.reproduce.summary import Entry, Outcomes, Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HATCH = {"projected": "....", "ssd": "////"}
"""Apart from their colours, so that bars can be told apart in grey."""
MARK = {"base": "X", "projected": "P", "ssd": "h", "spd": "o", "self-training": "s"}
LINE = {"spd": "-", "self-training": (0, (4, 2))}
WORSE, SAME, BETTER = "#c2570c", "#f7f8fa", "#1d4ed8"
VERDICT_STYLE = {
    each: {"marker": mark, "color": INK, "markersize": 4} for each, mark in (("better", "^"), ("worse", "v"))
}
LEAST_SCALE = {"accuracy": 10.0, "nll": 0.05}
"""Full colour of a matrix at the least: what is smaller than this stays pale, so that noise does not glare."""
UNIT = {"accuracy": "accuracy, %", "nll": "NLL, nats a token (lower is better)"}
DIVERGENCES = (
    ("projected_base", "projected from base", BETTER, "o"),
    ("projected_tuned", "projected from tuned", WORSE, "D"),
    ("tuned_base", "tuned from base", MUTED, "s"),
)
FLOOR = 1e-7
"""Divergences below this, in nats, are a model's rounding."""

Mark = tuple[str, dict[str, Any]]
"""A line of a legend: what it says, and how it looks."""


def bars_figure(summary: Summary, base: Mapping[str, Outcomes], published: bool) -> Figure:
    """One group of bars a test; tests judged by NLL, whose scale has no useful zero, as points beside them."""
    parts = _by_metric(summary)
    width = min(10.2, 1.5 + 2.9 * len(summary.columns))
    figure, axes = blank_figure(width / len(parts), 3.0, len(parts), sharey=False)
    axes[0].get_gridspec().set_width_ratios([len(indexes) + 0.6 for _, indexes in parts])
    arms = [row.label for row in summary.rows]
    colours, step = arm_colours(arms), 0.8 / len(arms)
    for axis, (metric, indexes) in zip(axes, parts, strict=True):
        for position, index in enumerate(indexes):
            for offset, (arm, line) in enumerate(zip(arms, summary.entries, strict=True)):
                x = position + (offset - (len(arms) - 1) / 2) * step
                if entry := line[index]:
                    label = arm if position == 0 else None
                    _bar(axis, x, entry, arm, published, width=0.88 * step, color=colours[arm], label=label)
        axis.set_xticks(range(len(indexes)), [_test_name(summary, index) for index in indexes], color=INK)
        axis.set_xlim(-0.6, len(indexes) - 0.4)
        axis.set_ylabel(UNIT[metric])
        if metric == "accuracy":
            highest = [max(entry.outcomes.interval[1], entry.published or 0.0) for entry in _entries(summary, indexes)]
            axis.set_ylim(0, min(106, 1.12 * max(highest)))
        else:
            axis.margins(y=0.15)
    found = {entry.verdict for entry in _entries(summary, range(len(summary.columns)))}
    marks: list[Mark] = [(f"{each} beyond chance", style) for each, style in VERDICT_STYLE.items() if each in found]
    marks += [("published", {"marker": "D", "mfc": "none", "mec": INK})] if published else []
    handles, labels = axes[0].get_legend_handles_labels()
    _legend(figure, handles, labels, marks)
    return figure


def _bar(axis: Any, x: float, entry: Entry, arm: str, published: bool, width: float, **style: Any) -> None:
    """A bar or, for NLL, a point; its interval, its verdict above, and the published value."""
    from matplotlib.transforms import ScaledTranslation

    value, (low, high) = entry.outcomes.value, entry.outcomes.interval
    if entry.outcomes.metric == "accuracy":
        axis.bar(x, value, width, hatch=HATCH.get(arm), ec="white", lw=0, **style)
    else:
        axis.plot(x, value, ls="none", marker=MARK.get(arm, "D"), markersize=6, **style)
    axis.errorbar(x, value, [[max(0.0, value - low)], [max(0.0, high - value)]], color=INK, linewidth=0.9, capsize=2)
    if entry.verdict:
        above = axis.transData + ScaledTranslation(0, 6 / 72, axis.figure.dpi_scale_trans)
        axis.plot(x, high, transform=above, **VERDICT_STYLE[entry.verdict])
    if published and entry.published is not None:
        axis.plot(x, entry.published, "D", mfc="none", mec=INK, mew=1.2, markersize=5, zorder=4)


def dots_figure(summary: Summary, base: Mapping[str, Outcomes], published: bool) -> Figure:
    """One line an arm, one panel a test; the row of comparison as a band."""
    figure, axes = _rows_of_dots([row.label for row in summary.rows], summary)
    against = [row.label for row in summary.rows].index(summary.table.against)
    own = ARM_COLOUR.get(summary.table.against, INK)
    for index, axis in enumerate(axes):
        entries = [line[index] for line in summary.entries]
        reference = entries[against]
        if reference is not None:
            axis.axvspan(*reference.outcomes.interval, color=own, alpha=0.1, lw=0)
            axis.axvline(reference.outcomes.value, color=own, lw=1, ls=(0, (3, 3)))
        for y, entry in enumerate(entries):
            if entry is None:
                continue
            colour = own if y == against else INK
            low, high = entry.outcomes.interval
            axis.plot((low, high), (y, y), color=colour, lw=1.2, solid_capstyle="round")
            _point(axis, entry.outcomes.value, y, colour, entry, y == against)
            if published and entry.published is not None:
                axis.plot(entry.published, y, "D", mfc="none", mec=MUTED, mew=1.2, markersize=6, zorder=2)
        _title(axis, _test_name(summary, index, ", "))
        axis.set_xlabel(UNIT[metric_of(summary, index)])
    for metric, indexes in _by_metric(summary):
        _same_span([axes[index] for index in indexes], LEAST_SCALE[metric])
    band = (f"{summary.table.against}, with its interval", {"marker": "D", "color": own, "ls": (0, (3, 3))})
    _legend(figure, [], [], [band, *_point_marks(published)])
    return figure


def matrix_figure(summary: Summary, base: Mapping[str, Outcomes], published: bool) -> Figure:
    """Differences from the row of comparison, one row an arm and one column a test."""
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.patches import Rectangle

    colours = LinearSegmentedColormap.from_list("worse to better", [WORSE, SAME, BETTER])
    parts = _by_metric(summary)
    rows = [i for i, row in enumerate(summary.rows) if row.label != summary.table.against]
    widths = [len(indexes) for _, indexes in parts]
    total = 1.9 + 1.15 * sum(widths)
    figure, axes = blank_figure(total / len(parts), 1.0 + 0.46 * len(rows), len(parts))
    axes[0].get_gridspec().set_width_ratios(widths)
    for axis, (metric, indexes) in zip(axes, parts, strict=True):
        axis.grid(False)
        limit = max([LEAST_SCALE[metric], *(abs(entry.difference or 0.0) for entry in _entries(summary, indexes))])
        scale = Normalize(-limit, limit)
        for y, i in enumerate(rows):
            for x, index in enumerate(indexes):
                entry = summary.entries[i][index]
                if entry is None:
                    axis.text(x, y, "–", ha="center", va="center", color=MUTED)
                    continue
                difference = entry.difference or 0.0
                edge: dict[str, Any] = (
                    {"ec": INK, "lw": 2.2, "zorder": 3} if entry.verdict else {"ec": "white", "lw": 2}
                )
                size = 0.9 if entry.verdict else 1.0
                corner = (x - size / 2, y - size / 2)
                axis.add_patch(Rectangle(corner, size, size, fc=colours(scale(difference)), **edge))
                text = signed(difference, 3 if metric == "nll" else 1)
                ink = "white" if abs(difference) > 0.6 * limit else INK
                axis.text(x, y, text, ha="center", va="center", color=ink, zorder=4, fontsize=9)
                if _own(summary, i, index):
                    axis.plot(x - 0.4, y - 0.36, "o", color=ink, markersize=2.5, zorder=4)
        axis.set_xlim(-0.5, len(indexes) - 0.5)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_xticks(range(len(indexes)), [_test_name(summary, index) for index in indexes], color=INK)
        axis.set_yticks(range(len(rows)), [summary.rows[i].label for i in rows], color=INK)
        axis.xaxis.tick_top()
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    units = {"accuracy": "points", "nll": "nats"}
    said = " and ".join(units[metric] for metric, _ in parts)
    title = f"better (blue) or worse (orange) than {summary.table.against}, in {said}"
    figure.suptitle(
        f"{title}\noutlined: beyond chance; dot: its own domain", x=0.01, ha="left", fontsize=8, color=MUTED
    )
    return figure


def curves_figure(summary: Summary, base: Mapping[str, Outcomes], published: bool) -> Figure:
    """Values against a setting, one panel a test, with the base as a line and a band."""
    label, ticks, series = _series(summary)
    columns = summary.columns
    same = len({metric_of(summary, index) for index in range(len(columns))}) == 1
    figure, axes = blank_figure(_panel(len(columns)), 2.9, len(columns), sharey=same)
    at = {tick: position for position, tick in enumerate(ticks)}
    for index, (axis, column) in enumerate(zip(axes, columns, strict=True)):
        own = base[column.test]
        axis.axhline(own.value, color=MUTED, lw=1.2, ls=(0, (1, 1.5)))
        axis.axhspan(*own.interval, color=MUTED, alpha=0.12, lw=0)
        for number, (arm, points) in enumerate(series.items()):
            shift = 0.12 * (number - (len(series) - 1) / 2)
            found = [(at[tick] + shift, i, entry) for tick, i in points if (entry := summary.entries[i][index])]
            colour = ARM_COLOUR.get(arm, INK)
            values = [entry.outcomes.value for *_, entry in found]
            axis.plot([x for x, *_ in found], values, color=colour, lw=1.4, ls=LINE.get(arm, "-"), zorder=2)
            for x, i, entry in found:
                low, high = entry.outcomes.interval
                axis.plot((x, x), (low, high), color=colour, lw=0.9, zorder=2)
                reference = summary.rows[i].label == summary.table.against
                _point(axis, x, entry.outcomes.value, colour, entry, reference, MARK.get(arm, "o"))
                if published and entry.published is not None:
                    axis.plot(x, entry.published, "D", mfc="none", mec=MUTED, mew=1.2, markersize=6)
        _title(axis, _test_name(summary, index, ", "))
        axis.set_xticks(range(len(ticks)), ticks, fontsize=8)
        axis.set_xlim(-0.4, len(ticks) - 0.6)
        axis.set_xlabel(label)
        if not same or index % PANELS_A_ROW == 0:
            axis.set_ylabel(UNIT[metric_of(summary, index)])
    marks: list[Mark] = [("base, with its interval", {"color": MUTED, "ls": (0, (1, 1.5))})]
    for arm in series:
        style = {"color": ARM_COLOUR.get(arm, INK), "ls": LINE.get(arm, "-"), "marker": MARK.get(arm, "o")}
        marks.append((arm, style | {"mfc": "white"}))
    _legend(figure, [], [], marks + _point_marks(published))
    return figure


def shift_figure(diagnostics: Mapping[str, Mapping[str, Any]], order: Mapping[str, int]) -> Figure:
    """Divergences a token on a logarithmic axis: where the two first marks of a line meet, training kept nothing."""
    parts = [(capability, found["shift"]) for capability, found in diagnostics.items() if found["shift"]]
    arms = sorted({arm for _, shift in parts for arm in shift}, key=lambda arm: order.get(arm, len(order)))
    figure, axes = _rows_of_dots(arms, panels=len(parts))
    for axis, (capability, shift) in zip(axes, parts, strict=True):
        axis.set_xscale("log")
        for arm, found in shift.items():
            y = arms.index(arm)
            for name, _, colour, mark in DIVERGENCES:
                middle, low, high = found[name]
                if middle > FLOOR:
                    axis.plot((max(low, FLOOR), max(high, FLOOR)), (y, y), color=colour, lw=0.8, alpha=0.45)
                    filled = "none" if name == "projected_tuned" else colour
                    axis.plot(middle, y, mark, mfc=filled, mec=colour, mew=1.3, markersize=7 if filled == "none" else 4)
        _title(axis, f"made for {capability}")
        axis.set_xlabel("KL divergence, nats a token")
    highest = max(axis.get_xlim()[1] for axis in axes)
    for axis in axes:
        axis.set_xlim(FLOOR, highest)
    marks = [
        (label, {"marker": mark, "mfc": "none" if name == "projected_tuned" else colour, "mec": colour})
        for name, label, colour, mark in DIVERGENCES
    ]
    _legend(figure, [], [], marks)
    return figure


def perplexity_figure(found: Sequence[OffTarget], order: Mapping[str, int]) -> Figure:
    """By how much an arm's perplexity on neutral text is above the base's, with intervals over texts."""
    capabilities = list(dict.fromkeys(each.capability for each in found))
    arms = sorted({each.arm for each in found}, key=lambda arm: order.get(arm, len(order)))
    figure, axes = _rows_of_dots(arms, panels=len(capabilities))
    for axis, capability in zip(axes, capabilities, strict=True):
        axis.axvline(0, color=MUTED, lw=1, ls=(0, (3, 3)))
        for each in found:
            if each.capability == capability:
                y = arms.index(each.arm)
                ratio, low, high = (100 * (value - 1) for value in each.ratio)
                axis.plot((low, high), (y, y), color=INK, lw=1.1)
                axis.plot(ratio, y, "o", mfc=INK if each.verdict else "white", mec=INK, mew=1.2, markersize=5)
        _title(axis, f"made for {capability}")
        axis.set_xlabel("perplexity against the base's, %")
    low, high = (pick(end for axis in axes for end in axis.get_xlim()) for pick in (min, max))
    for axis in axes:
        axis.set_xlim(min(-1.0, low), max(1.0, high))
    _legend(figure, [], [], _point_marks(False))
    return figure


Draw = Callable[[Summary, Mapping[str, Outcomes], bool], "Figure"]
OF_TABLE: dict[str, Draw] = {
    **dict.fromkeys(("1", "2", "3"), bars_figure),
    **dict.fromkeys(("4", "controls"), dots_figure),
    **dict.fromkeys(("5", "transfer"), matrix_figure),
    **dict.fromkeys(("rounds", "calibration-size", "rank", "layers", "learning-rate"), curves_figure),
}


def _series(summary: Summary) -> tuple[str, list[str], dict[str, list[tuple[str, int]]]]:
    """The horizontal axis, its ticks, and for every line the ticks and rows of its points."""
    if summary.table.sweep:
        ticks = [row.label for row in summary.rows]
        return summary.table.sweep, ticks, {"spd": [(row.label, i) for i, row in enumerate(summary.rows)]}
    series: dict[str, list[tuple[str, int]]] = {}
    label = "round"
    for i, row in enumerate(summary.rows):
        arm = parse_arm(row.arm)
        if arm.trained:
            label = "learning rate" if arm.learning_rate else label
            tick = f"{arm.learning_rate:g}" if arm.learning_rate else str(arm.rounds)
            series.setdefault(arm.name.partition(":")[0], []).append((tick, i))
    return label, sorted({tick for points in series.values() for tick, _ in points}, key=float), series


def _rows_of_dots(labels: Sequence[str], summary: Summary | None = None, panels: int = 1) -> tuple[Figure, list[Any]]:
    """Panels that share their rows, whose names stand at the left."""
    panels = len(summary.columns) if summary else panels
    figure, axes = blank_figure(_panel(panels), 1.3 + 0.24 * len(labels), panels)
    for axis in axes:
        axis.grid(False)
        axis.grid(axis="x", color=GRID, linewidth=0.8)
        axis.set_yticks(range(len(labels)), labels, color=INK)
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
    axes[0].set_ylim(len(labels) - 0.4, -0.6)
    return figure, axes


def _panel(panels: int) -> float:
    """The width of one of so many, in inches: a single one needs room for the legend."""
    return 2.3 + 3.3 / min(panels, 3)


def _title(axis: Any, text: str) -> None:
    axis.set_title(text, loc="left", fontsize=9.5, fontweight="bold")


def _same_span(axes: Sequence[Any], least: float) -> None:
    """As many units to the inch in every panel, whatever the values, so that distances can be compared."""
    from matplotlib.ticker import MaxNLocator

    limits = [axis.get_xlim() for axis in axes]
    span = max([least, *(high - low for low, high in limits)])
    for axis, (low, high) in zip(axes, limits, strict=True):
        axis.set_xlim((low + high - span) / 2, (low + high + span) / 2)
        axis.xaxis.set_major_locator(MaxNLocator(5))


def _by_metric(summary: Summary) -> list[tuple[str, list[int]]]:
    """The columns that have a scale in common."""
    metrics = [metric_of(summary, index) for index in range(len(summary.columns))]
    return [(each, [i for i, metric in enumerate(metrics) if metric == each]) for each in dict.fromkeys(metrics)]


def _entries(summary: Summary, indexes: Iterable[int]) -> list[Entry]:
    """What there is in these columns."""
    return [entry for line in summary.entries for index in indexes if (entry := line[index])]


def _own(summary: Summary, row: int, index: int) -> bool:
    """Whether a row was made for the domain of a column."""
    domain, made = summary.columns[index].domain, summary.rows[row]
    entry = summary.entries[row][index]
    if made.trained_for:
        return made.trained_for == domain.name
    return entry is not None and "from=" in made.arm and "from=" not in entry.cell.arm


def _test_name(summary: Summary, index: int, between: str = "\n") -> str:
    n = max((entry.outcomes.n for entry in _entries(summary, [index])), default=0)
    return f"{summary.columns[index].test}{between}n = {n}"


def _point(axis: Any, x: float, y: float, colour: str, entry: Entry, reference: bool, mark: str = "o") -> None:
    filled = colour if entry.verdict or reference else "white"
    axis.plot(x, y, "D" if reference else mark, mfc=filled, mec=colour, mew=1.3, markersize=5.5, zorder=3)


def _point_marks(published: bool) -> list[Mark]:
    marks: list[Mark] = [
        ("differs beyond chance", {"marker": "o", "mfc": INK, "mec": INK}),
        ("within chance", {"marker": "o", "mfc": "white", "mec": INK}),
    ]
    return marks + ([("published", {"marker": "D", "mfc": "none", "mec": MUTED})] if published else [])


def _legend(figure: Figure, handles: list[Any], labels: list[str], marks: Sequence[Mark]) -> None:
    """Above the panels, in as many columns as the figure has room for."""
    from matplotlib.lines import Line2D

    plain: dict[str, Any] = {"color": "none", "ls": "none", "markersize": 5}
    handles = [*handles, *(Line2D([], [], **(plain | style)) for _, style in marks)]
    labels = [*labels, *(label for label, _ in marks)]
    columns = next(n for n in range(len(labels), 0, -1) if n == 1 or _inches(labels, n) < figure.get_figwidth())
    figure.legend(handles, labels, loc="outside upper left", frameon=False, fontsize=8, ncols=columns)


def _inches(labels: Sequence[str], columns: int) -> float:
    """About how wide a legend is."""
    split = np.array_split([len(label) for label in labels], columns)  # as matplotlib does
    return float(sum(0.65 + 0.065 * max(lengths) for lengths in split))
