"""`report.md` and its figures, from what `results.json` holds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spd.files import atomic_file, read_json, write_text
from spd.shown import markdown
from spd.stats import holm, mean_interval, paired_test

DPI = 130


def write_report(out: str | Path) -> Path:
    """Write the figures, and `report.md` which shows them; returns its path."""
    from spd.long_context import figures

    out = Path(out)
    results = read_json(out / "results.json")
    cells: dict[str, list[dict[str, Any]]] = {"decode": [], "retrieval": [], "perplexity": []}
    for key, cell in results["cells"].items():
        cells[key.split("/")[0]].append(cell)
    draw = {
        "cache.png": (figures.cache_figure, cells["decode"]),
        "retrieval.png": (figures.retrieval_figure, cells["retrieval"]),
        "perplexity.png": (figures.perplexity_figure, cells["perplexity"]),
        "position.png": (figures.position_figure, cells["perplexity"]),
    }
    for name, (figure, of_part) in draw.items():
        if of_part:
            with atomic_file(out / name) as temporary:
                figure(of_part).savefig(temporary, format="png", dpi=DPI)
    sections = [_head(results)]
    sections += [_decode(results["settings"], cells["decode"])] if cells["decode"] else []
    sections += [_retrieval(results, cells["retrieval"])] if cells["retrieval"] else []
    sections += [_perplexity(results["settings"], cells["perplexity"])] if cells["perplexity"] else []
    write_text(out / "report.md", "\n\n".join(sections) + "\n")
    return out / "report.md"


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and most: rounds are too few for percentiles."""
    return statistics.median(values), min(values), max(values)


def _head(results: dict[str, Any]) -> str:
    settings = results["settings"]
    subject = markdown(settings["model"] or f"{settings['shape']}, random weights")
    lines = [f"# Long contexts: {subject}"]
    for environment in results["environments"]:
        libraries = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
        said = f"{environment['dtype']}, {environment['attention']} attention. {environment['device']}; {libraries}."
        lines.append(f"{environment['parameters'] / 1e6:,.1f} M parameters, {markdown(said)}")
    return "\n\n".join(lines)


def _decode(settings: dict[str, Any], cells: list[dict[str, Any]]) -> str:
    onto = f"Random subspace of rank {settings['decode_rank']} at all layers"
    if settings["subspace"]:
        onto = f"Subspace {markdown(settings['subspace'])}, its first {settings['decode_rank']} directions"
    lines = [
        "## Memory and time",
        f"{onto}, batch {settings['batch']}. The last "
        f"{settings['tokens']} tokens of the context are decoded over a cache that was filled without a prefill; "
        f"median of {settings['rounds']} paired rounds [least, most]. `unprojected` is the model as it is "
        "over the growing cache that `generate` makes; `static` over one of fixed length, which is not copied token by "
        "token. Eager PyTorch: on a GPU the time of launching is in it. Faster: unprojected time over this mode's, in "
        "the same round.",
        "![cache and latency](cache.png)",
        _table(
            ("context", "mode", "cache, MiB", "share", "ms a token", "faster", "peak memory, MiB"),
            [row for cell in cells for row in _decode_rows(cell)],
            left=2,
        ),
    ]
    refused = {mode: found["refused"] for cell in cells for mode, found in cell["modes"].items() if "refused" in found}
    lines += [f"- {markdown(mode)} is refused: {markdown(reason)}." for mode, reason in refused.items()]
    return "\n\n".join(lines)


def _decode_rows(cell: dict[str, Any]) -> list[list[str]]:
    modes = {mode: found for mode, found in cell["modes"].items() if "refused" not in found}
    base = modes.get("unprojected")
    rows = []
    for mode, found in modes.items():
        middle, low, high = (1e3 * each for each in spread(found["seconds"]))
        share = faster = ""
        if base is not None:
            share = f"{found['bytes'] / base['bytes']:.3f}"
            ratios = [b / own for b, own in zip(base["seconds"], found["seconds"], strict=True)]
            faster = "{:.2f} [{:.2f}, {:.2f}]".format(*spread(ratios))
        peak = "" if found["peak_bytes"] is None else f"{found['peak_bytes'] / 2**20:,.0f}"
        rows.append(
            [
                f"{cell['context']:,}",
                mode,
                f"{found['bytes'] / 2**20:,.2f}",
                share,
                f"{middle:.2f} [{low:.2f}, {high:.2f}]",
                "" if mode == "unprojected" else faster,
                peak,
            ]
        )
    return rows


def _retrieval(results: dict[str, Any], cells: list[dict[str, Any]]) -> str:
    settings = results["settings"]
    n = max(cell["n"] for cell in cells)
    lines = [
        "## Needle retrieval",
        f'{settings["needles"]} facts ("bako is 17.") in each of {settings["haystacks"]} haystacks of plain sentences, '
        f"n = {n} a cell; each is asked for by itself, and right is what greedy decoding writes word for word. "
        "Accuracy in % with its 95 % Wilson interval. Calibrated: the subspace of the gradients at a needle's number, "
        "from other haystacks; random: the same rank, the control.",
        "![retrieval against rank](retrieval.png)",
        _rank_table(cells, _accuracy),
        _tested(cells) if all("verdicts" in cell for cell in cells) else _apart(cells),
        "By depth, the unprojected model, first to last quarter of the context: " + _depths(cells) + ".",
    ]
    if "energies" in results:
        least = "; ".join(
            f"layers {layers}: " + ", ".join(f"r = {rank} {100 * share:.1f}" for rank, share in of_rank.items())
            for layers, of_rank in results["energies"].items()
        )
        lines.append(f"Least share of the gradients' energy that a rank keeps, in %: {least}.")
    return "\n\n".join(lines)


def _accuracy(cell: dict[str, Any]) -> str:
    return "{:.1f} [{:.0f}, {:.0f}]".format(*(100 * value for value in (cell["accuracy"], *cell["interval_95"])))


def paired(cell: dict[str, Any], base: dict[str, Any]) -> float:
    """Two-sided p that a projection answers as many as the unprojected model, on the same questions.

    What is flipped is a haystack, since questions behind one text are not independent.
    """
    return paired_test(
        [
            [int(one) - int(other) for one, other in zip(of_cell, of_base, strict=True)]
            for of_cell, of_base in zip(cell["verdicts"], base["verdicts"], strict=True)
        ]
    )


def _tested(cells: list[dict[str, Any]]) -> str:
    """Every cell beside the unprojected model at its context, by the paired test."""
    base = {cell["context"]: cell for cell in cells if not cell["rank"]}
    projected = [cell for cell in cells if cell["rank"]]
    ps = [paired(cell, base[cell["context"]]) for cell in projected]
    tested = {id(cell): found for cell, *found in zip(projected, ps, holm(ps), strict=True)}

    def show(cell: dict[str, Any]) -> str:
        p, adjusted = tested[id(cell)]
        change = 100 * (cell["accuracy"] - base[cell["context"]]["accuracy"])
        return f"{change:+.1f} ({_p(p)}, {_p(adjusted)})"

    least = 2 / 2 ** len(projected[0]["verdicts"])
    return (
        "Percentage points beside the unprojected model on the same questions; in brackets p of the exact paired "
        "sign-flip test, in which a haystack's questions share a sign since they are behind one text (so many "
        f"haystacks give no p below {_p(least)}), and p adjusted by Holm over all {len(ps)} comparisons:\n\n"
        + _rank_table(projected, show)
    )


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def _apart(cells: list[dict[str, Any]]) -> str:
    """What the intervals allow to be said, and nothing else: for results that hold no verdicts."""
    said = []
    for context in sorted({cell["context"] for cell in cells}):
        here = [cell for cell in cells if cell["context"] == context]
        base = next(cell for cell in here if not cell["rank"])
        for projection, layers in dict.fromkeys((c["projection"], c["layers"]) for c in here if c["rank"]):
            line = [c for c in here if (c["projection"], c["layers"]) == (projection, layers)]
            below = [c["rank"] for c in line if c["interval_95"][1] < base["interval_95"][0]]
            above = [c["rank"] for c in line if c["interval_95"][0] > base["interval_95"][1]]
            rest = [c["rank"] for c in line if c["rank"] not in (*below, *above)]
            parts = [
                f"{what} at rank {', '.join(map(str, sorted(ranks)))}"
                for what, ranks in (("below", below), ("above", above), ("no difference shown", rest))
                if ranks
            ]
            said.append(f"- {context:,} tokens, {projection}, layers {layers}: {'; '.join(parts)}.")
    return "Beside the unprojected model, by intervals that do not overlap:\n\n" + "\n".join(said)


def _depths(cells: list[dict[str, Any]]) -> str:
    return "; ".join(
        f"{cell['context']:,} tokens: "
        + ", ".join(f"{part['correct']} of {part['n']}" for part in cell["by_depth"] if part["n"])
        for cell in cells
        if not cell["rank"]
    )


def _perplexity(settings: dict[str, Any], cells: list[dict[str, Any]]) -> str:
    text = markdown(settings["text"] or "") or "generated text in which one sentence in five repeats an earlier fact"
    base = {cell["context"]: cell["windows"] for cell in cells if not cell["rank"]}

    def show(cell: dict[str, Any]) -> str:
        found = "{:.3f} [{:.3f}, {:.3f}]".format(cell["perplexity"], *cell["interval_95"])
        if not cell["rank"]:
            return found
        return found + " ×{:.3f} [{:.3f}, {:.3f}]".format(*ratio(cell["windows"], base[cell["context"]]))

    lines = [
        "## Perplexity",
        f"{settings['windows']} windows of {text}; over the second half of each, where every token has at least half a "
        "window before it. 95 % interval over the windows; behind ×, the ratio to the unprojected model on the same "
        "windows, whose interval is the one to compare by.",
        "![perplexity against rank](perplexity.png)",
        _rank_table(cells, show),
        "![loss by position](position.png)",
    ]
    return "\n\n".join(lines)


def ratio(losses: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Of two perplexities on the same windows, with its 95 % interval."""
    middle, low, high = mean_interval([one - other for one, other in zip(losses, base, strict=True)])
    return math.exp(middle), math.exp(low), math.exp(high)


def _rank_table(cells: list[dict[str, Any]], show: Any) -> str:
    contexts = sorted({cell["context"] for cell in cells})
    rows: dict[tuple[str, str, int], dict[int, str]] = {}
    for cell in cells:
        rows.setdefault((cell["projection"], cell["layers"], cell["rank"]), {})[cell["context"]] = show(cell)
    return _table(
        ("projection", "layers", "rank", *(f"{context:,} tokens" for context in contexts)),
        [
            [projection, layers, str(rank or ""), *(of_context.get(context, "") for context in contexts)]
            for (projection, layers, rank), of_context in rows.items()
        ],
        left=2,
    )


def _table(head: Sequence[str], rows: list[list[str]], left: int) -> str:
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))
