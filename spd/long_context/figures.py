"""The figures of the report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spd.plots import INK, MUTED, blank_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODE_STYLE: dict[str, tuple[str, str]] = {
    "unprojected": ("#616e7c", "-"),
    "static": ("#9aa5b1", "--"),
    "fold": ("#7c9fd6", "-"),
    "hook": ("#e3b36b", "-"),
    "latent_v": ("#d97706", "-"),
    "latent": ("#1d4ed8", "-"),
}
PROJECTION_COLOUR = {"calibrated": "#1d4ed8", "random": "#d97706"}
LAYER_STYLE = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
LAYER_MARK = ("o", "s", "^", "D")


def cache_figure(cells: list[dict[str, Any]]) -> Figure:
    """Bytes of the cache, and milliseconds of a token, against the context; one line a mode."""
    figure, axes = blank_figure(4.2, 3.4, 2, sharey=False)
    modes = [mode for mode in cells[0]["modes"] if "refused" not in cells[0]["modes"][mode]]
    contexts = [cell["context"] for cell in cells]
    ends: list[list[tuple[float, str]]] = [[], []]
    for mode in modes:
        colour, line = MODE_STYLE[mode]
        found = [cell["modes"][mode] for cell in cells]
        megabytes = [each["bytes"] / 2**20 for each in found]
        middle, low, high = zip(*(_milliseconds(each["seconds"]) for each in found), strict=True)
        for axis, values in zip(axes, (megabytes, middle), strict=True):
            axis.plot(contexts, values, color=colour, linestyle=line, linewidth=1.8, marker="o", markersize=3.5)
        axes[1].fill_between(contexts, low, high, color=colour, alpha=0.12, linewidth=0)
        for values, end in zip((megabytes, middle), ends, strict=True):
            end.append((values[-1], mode))
    for axis, title, unit, end in zip(
        axes, ("keys and values in the cache", "one decoded token"), ("MiB", "ms"), ends, strict=True
    ):
        axis.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
        axis.set_ylabel(unit)
        _context_axis(axis, contexts)
        axis.set_ylim(bottom=0)
        _name_ends(axis, contexts[-1], end)
    return figure


def retrieval_figure(cells: list[dict[str, Any]]) -> Figure:
    """Accuracy against rank, one panel a context; the band is the unprojected model's interval."""

    def value(cell: dict[str, Any]) -> tuple[float, float, float]:
        return 100 * cell["accuracy"], 100 * cell["interval_95"][0], 100 * cell["interval_95"][1]

    return _by_rank(cells, "needles retrieved, %", value, (0, 100))


def perplexity_figure(cells: list[dict[str, Any]]) -> Figure:
    """Perplexity against rank, one panel a context."""
    return _by_rank(cells, "perplexity", lambda cell: (cell["perplexity"], *cell["interval_95"]), None)


def position_figure(cells: list[dict[str, Any]]) -> Figure:
    """Loss by position at the longest context: the unprojected model and every rank, one panel a choice of layers."""
    longest = max(cell["context"] for cell in cells)
    cells = [cell for cell in cells if cell["context"] == longest]
    base = next(cell for cell in cells if not cell["rank"])
    choices = list(dict.fromkeys(cell["layers"] for cell in cells if cell["rank"]))
    figure, axes = blank_figure(4.2, 3.2, max(1, len(choices)))
    ranks = sorted({cell["rank"] for cell in cells if cell["rank"]})
    import matplotlib

    shades = matplotlib.colormaps["Blues"]
    for number, axis in enumerate(axes):
        if choices:
            for index, rank in enumerate(ranks):
                cell = next(
                    (
                        c
                        for c in cells
                        if (c["projection"], c["layers"], c["rank"]) == ("calibrated", choices[number], rank)
                    ),
                    None,
                )
                if cell is not None:
                    colour = shades(0.35 + 0.6 * index / max(1, len(ranks) - 1))
                    axis.plot(*_positions(cell), color=colour, linewidth=1.6, label=f"rank {rank}")
            axis.set_title(f"layers: {choices[number]}", loc="left", fontsize=9.5, fontweight="bold")
        axis.plot(*_positions(base), color=MUTED, linewidth=1.6, linestyle=(0, (4, 2)), label="unprojected")
        _context_axis(axis, [part["end"] for part in base["by_position"]])
        axis.set_xlabel("position, up to")
    axes[0].set_ylabel("loss, nats a token")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", frameon=False, fontsize=8, ncols=6)
    return figure


def _by_rank(cells: list[dict[str, Any]], label: str, value: Any, limits: tuple[float, float] | None) -> Figure:
    contexts = sorted({cell["context"] for cell in cells})
    choices = list(dict.fromkeys(cell["layers"] for cell in cells if cell["rank"]))
    ranks = sorted({cell["rank"] for cell in cells if cell["rank"]})
    figure, axes = blank_figure(3.2, 3.0, len(contexts))
    for axis, context in zip(axes, contexts, strict=True):
        here = [cell for cell in cells if cell["context"] == context]
        middle, low, high = value(next(cell for cell in here if not cell["rank"]))
        axis.axhline(middle, color=MUTED, linewidth=1.4, linestyle=(0, (4, 2)), label="unprojected")
        axis.axhspan(low, high, color=MUTED, alpha=0.14, linewidth=0)
        for number, layers in enumerate(choices):
            for projection, colour in PROJECTION_COLOUR.items():
                of_line = [c for c in here if (c["projection"], c["layers"]) == (projection, layers)]
                if not of_line:
                    continue
                of_line.sort(key=lambda cell: cell["rank"])
                points = [value(cell) for cell in of_line]
                at = [ranks.index(cell["rank"]) + 0.05 * (number - (len(choices) - 1) / 2) for cell in of_line]
                whiskers = [[p[0] - p[1] for p in points], [p[2] - p[0] for p in points]]
                axis.errorbar(
                    at,
                    [p[0] for p in points],
                    [[max(0.0, each) for each in side] for side in whiskers],
                    color=colour,
                    linestyle=LAYER_STYLE[number % len(LAYER_STYLE)],
                    marker=LAYER_MARK[number % len(LAYER_MARK)],
                    markersize=4,
                    linewidth=1.5,
                    elinewidth=0.8,
                    capsize=2,
                    label=f"{projection}, layers: {layers}",
                )
        axis.set_title(f"{context:,} tokens", loc="left", fontsize=9.5, fontweight="bold")
        axis.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
        axis.set_xlabel("rank")
        if limits:
            axis.set_ylim(limits[0], limits[1] + 2)
    axes[0].set_ylabel(label)
    if limits is None:
        highest = max(value(cell)[0] for cell in cells)
        lowest = min(value(cell)[0] for cell in cells)
        if highest > 4 * lowest:
            for axis in axes:
                axis.set_yscale("log")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside upper left", frameon=False, fontsize=8, ncols=1 + len(axes)
    )
    return figure


def _milliseconds(seconds: list[float]) -> tuple[float, float, float]:
    from spd.long_context.report import spread

    return tuple(1e3 * each for each in spread(seconds))  # type: ignore[return-value]


def _positions(cell: dict[str, Any]) -> tuple[list[int], list[float]]:
    return [part["end"] for part in cell["by_position"]], [part["loss"] for part in cell["by_position"]]


def _context_axis(axis: Any, contexts: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(contexts, [f"{each // 1024}k" if each % 1024 == 0 else str(each) for each in contexts])
    axis.minorticks_off()
    axis.set_xlabel("context, tokens")


def _name_ends(axis: Any, x: float, ends: list[tuple[float, str]]) -> None:
    """Names at the ends of the lines, moved apart where they would overlap; lines of one height share a name."""
    low, high = axis.get_ylim()
    gap = 0.062 * (high - low)
    groups: list[tuple[float, list[str]]] = []
    for height, mode in sorted(ends):
        if groups and height - groups[-1][0] < 0.004 * (high - low):
            groups[-1][1].append(mode)
        else:
            groups.append((height, [mode]))
    last = -gap
    for height, modes in groups:
        at = max(height, last + gap)
        last = at
        colour = MODE_STYLE[modes[0]][0] if len(modes) == 1 else INK
        axis.annotate(
            ", ".join(modes),
            (x, height),
            xytext=(1.03, at),
            textcoords=axis.get_yaxis_transform(),
            color=colour,
            fontsize=8,
            va="center",
            annotation_clip=False,
        )
