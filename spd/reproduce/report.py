"""`tables.md`, `tables.json`, `report.html` and the figures, from what `results.json` holds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spd.files import atomic_file, read_json, write_json, write_text
from spd.plots import svg_text
from spd.report import page_environment
from spd.reproduce import figures
from spd.reproduce.findings import conclude, negative_transfer, off_target
from spd.reproduce.sections import (
    ARRANGED,
    CHOSEN,
    HOW_TO_READ,
    PUBLISHED_FOR,
    Section,
    Shown,
    arm_meanings,
    drift_section,
    facts,
    perplexity_section,
    shift_section,
    table_section,
    transfer_section,
)
from spd.reproduce.settings import ReproduceSettings, parse_settings
from spd.reproduce.summary import Entry, Outcomes, Summary, summarise
from spd.reproduce.tables import PUBLISHED_TEST, TABLES, Cell, Column, Layout
from spd.shown import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 130
TITLE = "The tables of arXiv 2605.22675"


def write_report(out: str | Path) -> Path:
    """Write the report of a folder whose `results.json` is there.

    Returns:
        The path of the tables in Markdown.
    """
    out = Path(out)
    results = read_json(out / "results.json")
    environments = read_json(out / "environment.json") if (out / "environment.json").is_file() else []
    settings = parse_settings(results["settings"])
    layout = _layout(results, settings)
    outcomes = {
        Cell(each["capability"], each["arm"], each["test"]): Outcomes.read(each["outcomes"])
        for each in results["cells"]
    }
    base = {cell.test: of_cell for cell, of_cell in outcomes.items() if cell.capability is None}
    order = {arm: place for place, arm in enumerate(dict.fromkeys(cell.arm for cell in outcomes))}
    summaries = [summarise(TABLES[name], layout, outcomes) for name in results["tables"]]
    diagnostics = results["diagnostics"]
    perplexities = off_target(diagnostics)
    transfers = [each for summary in summaries for each in negative_transfer(summary, outcomes)]
    conclusion = conclude(summaries)

    drawn: dict[str, Figure] = {}
    for summary in summaries:
        draw = figures.OF_TABLE[summary.table.name]
        drawn[f"table-{summary.table.name}"] = draw(summary, base, settings.suite == "paper")
    if any(found["shift"] for found in diagnostics.values()):
        drawn["shift"] = figures.shift_figure(diagnostics, order)
    if perplexities:
        drawn["perplexity"] = figures.perplexity_figure(perplexities, order)

    optional = [
        transfer_section(transfers, {test: of_base.metric for test, of_base in base.items()}),
        shift_section(diagnostics, order),
        perplexity_section(perplexities, diagnostics, order),
        drift_section(diagnostics, outcomes, layout.domains),
    ]
    page = {
        "title": f"{TITLE} on {settings.model}",
        "conclusion": conclusion,
        "facts": facts(settings, layout, environments, results.get("prompts", {}), diagnostics),
        "command": results.get("command"),
        "guide": [PUBLISHED_FOR[settings.suite] + ARRANGED + CHOSEN[settings.suite], *HOW_TO_READ],
        "arms": arm_meanings(summaries),
        "sections": [*(table_section(summary, settings.suite) for summary in summaries), *filter(None, optional)],
    }
    data = {
        "command": results.get("command"),
        "settings": results["settings"],
        "environments": environments,
        "conclusion": asdict(conclusion),
        "tables": [_table_data(summary) for summary in summaries],
        "negative_transfer": [asdict(row) | {"tests": [asdict(each) for each in tested]} for row, tested in transfers],
        "perplexity": [asdict(each) | {"verdict": each.verdict} for each in perplexities],
        "shift": {capability: found["shift"] for capability, found in diagnostics.items()},
        "drift": {capability: found["drift"] for capability, found in diagnostics.items()},
    }
    for name, figure in drawn.items():
        with atomic_file(out / "figures" / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=DPI, bbox_inches="tight")
    svgs = {name: svg_text(figure) for name, figure in drawn.items()}
    template = page_environment().get_template("reproduce.html")
    write_json(out / "tables.json", data)
    write_text(out / "report.html", template.render(**page, figures=svgs))
    write_text(out / "tables.md", visible(_markdown(page, drawn)))
    return out / "tables.md"


def _layout(results: Mapping[str, Any], settings: ReproduceSettings) -> Layout:
    if "layout" in results:
        return Layout(settings.suite_domains, **results["layout"])
    from spd.reproduce.experiment import layout_of

    return layout_of(settings)


def _table_data(summary: Summary) -> dict[str, Any]:
    table = summary.table
    return {
        "table": table.name,
        "title": table.title,
        "against": table.against,
        "columns": [_column_data(column) for column in summary.columns],
        "rows": [
            {
                "label": row.label,
                "arm": row.arm,
                "trained_for": row.trained_for,
                "entries": list(map(_entry_data, line)),
            }
            for row, line in zip(summary.rows, summary.entries, strict=True)
        ],
        "contrasts": [
            {
                "row": each.row,
                "against": each.other,
                "test": each.column.test,
                "difference": each.difference,
                "p": each.p,
            }
            for each in summary.contrasts
        ],
    }


def _column_data(column: Column) -> dict[str, Any]:
    return {
        "test": column.test,
        "domain": column.domain.name,
        "role": column.role,
        "published_test": PUBLISHED_TEST.get((column.domain.name, column.role)),
    }


def _entry_data(entry: Entry | None) -> dict[str, Any] | None:
    if entry is None:
        return None
    outcomes = entry.outcomes
    return {
        **asdict(entry.cell),
        "metric": outcomes.metric,
        "value": outcomes.value,
        "interval_95": None if outcomes.metric == "nll" and outcomes.n < 2 else list(outcomes.interval),
        "n": outcomes.n,
        "seeds": outcomes.seeds,
        "too_long": outcomes.too_long,
        "parse_rate": outcomes.parse_rate,
        "changed": outcomes.changed,
        "published": entry.published,
        "difference": entry.difference,
        "p": entry.p,
        "adjusted_p": entry.adjusted,
        "verdict": entry.verdict,
    }


def _markdown(page: Mapping[str, Any], drawn: Mapping[str, Any]) -> str:
    parts = [f"# {_plain(page['title'])}"]
    parts.append("\n".join(f"- {name}: {_plain(value)}" for name, value in page["facts"]))
    if page["command"]:
        parts.append("Made by\n\n" + "\n".join(f"    {line}" for line in page["command"].splitlines()))
    parts += ["## How to read the tables", *map(_plain, page["guide"])]
    parts.append("\n".join(f"- {name}: {_plain(meaning)}" for name, meaning in page["arms"]))
    for section in page["sections"]:
        parts += [f"## {_plain(section.title)}", *map(_plain, section.text)]
        if section.name in drawn:
            parts.append(f"![{_plain(section.title)}](figures/{section.name}.png)")
        parts.append(_markdown_table(section))
        if section.notes:
            parts.append("\n".join(f"- {_plain(note)}" for note in section.notes))
    conclusion = page["conclusion"]
    parts += ["## What differs beyond chance", conclusion.said]
    if conclusion.beyond:
        parts.append("\n".join(f"- {_plain(each)}" for each in conclusion.beyond))
    parts.append(conclusion.chance)
    return "\n\n".join(parts) + "\n"


def _markdown_table(section: Section) -> str:
    rule = ["---"] * section.labels + ["---:"] * (len(section.head) - section.labels)
    head = [", ".join(filter(None, (_plain(cell.text), _plain(cell.interval)))) for cell in section.head]
    rows = [head, rule, *([_markdown_cell(cell) for cell in row] for row in section.rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _markdown_cell(cell: Shown) -> str:
    text = {"better": f"**{_plain(cell.text)}**", "worse": f"{_plain(cell.text)}▾"}.get(cell.verdict, _plain(cell.text))
    return " ".join(filter(None, (text, cell.interval, ", ".join(cell.notes))))


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*|]|<(?=[\w/!?])|(?<!\w)_|_(?!\w))", r"\\\1", text)
