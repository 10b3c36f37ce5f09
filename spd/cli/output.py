"""What commands print: tables as wide as the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from spd.shown import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from spd.evaluation import Evaluation
    from spd.intervention.planner import Plan
    from spd.recalibration import Drift
    from spd.stages import Score
    from spd.subspace import Subspace

UNBOUNDED = 10_000  # columns


def print_evaluation(evaluation: Evaluation) -> None:
    low, high = evaluation.interval
    task = visible(evaluation.task)
    if evaluation.metric == "nll":
        ends = "{:.3f} to {:.3f}".format(*evaluation.value_interval)
        typer.echo(f"{task}: NLL {evaluation.value:.3f} a token, {len(evaluation.nlls)} texts, 95 % interval {ends}")
    if evaluation.n:
        how = ", by likelihood" if evaluation.answer_by == "likelihood" else ""
        typer.echo(
            f"{task}{how}: {100 * evaluation.accuracy:.1f} % ({evaluation.correct} of {evaluation.n}), "
            f"95 % interval {100 * low:.1f} to {100 * high:.1f}"
        )


def print_scores(scores: list[Score], folder: Path) -> None:
    tests = list(dict.fromkeys(score.evaluation.task for score in scores))
    console = wide_console()
    for columns in range(len(tests), 0, -1):  # as many tests side by side as the terminal has room for
        groups = [tests[start : start + columns] for start in range(0, len(tests), columns)]
        tables = [_score_table([score for score in scores if score.evaluation.task in group]) for group in groups]
        if all(_width(table, console) <= console.width for table in tables):
            break
    console.print("Accuracy in %, 95 % interval", style="italic", highlight=False)
    console.print(*tables)
    typer.echo(f"report: {(folder / 'report.html').resolve()}")


def print_drift(drift: Drift) -> None:
    from rich.table import Table

    table = Table(header_style="bold")
    for name in ("site", "overlap", "of halves", "by chance", "energy", "of halves", "kept"):
        table.add_column(name, justify="left" if name == "site" else "right", no_wrap=True)
    for site in drift.sites:
        shares = (site.overlap, site.noise, site.by_chance, site.energy, site.repeat)
        kept = "-" if site.kept is None else f"{100 * site.kept:.0f} %"
        table.add_row(site.comparison.site, *(f"{share:.2f}" for share in shares), kept)
    wide_console().print(table)
    typer.echo(drift.reason)


def _score_table(scores: list[Score]) -> Table:
    from rich.table import Table

    tests = {score.evaluation.task: len(score.evaluation.answers) for score in scores}
    table = Table(header_style="bold")
    table.add_column("trained for", no_wrap=True)
    table.add_column("arm", no_wrap=True)
    for test, n in tests.items():
        table.add_column(f"{visible(test)}\nn = {n}", justify="right", no_wrap=True)
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for score in scores:
        low, high = score.evaluation.value_interval
        cell = f"{100 * score.evaluation.value:.1f} [{100 * low:.0f}, {100 * high:.0f}]"
        if score.evaluation.metric == "nll":
            cell = f"NLL {score.evaluation.value:.3f} [{low:.3f}, {high:.3f}]"
        rows.setdefault((score.capability or "", score.arm), {})[score.evaluation.task] = cell
    previous = ""
    for (capability, arm), cells in rows.items():
        if capability != previous:
            table.add_section()
        name = visible(capability) if capability != previous else ""
        table.add_row(name, visible(arm), *(cells[test] for test in tests))
        previous = capability
    return table


def print_profile(folder: Path) -> None:
    from spd.files import read_json
    from spd.profile import PROFILE, profile_table

    wide_console().print(profile_table(read_json(folder / PROFILE)))


def print_spectra(title: str, subspace: Subspace) -> None:
    from rich.table import Table

    from spd.spectrum import site_rows, sparkline

    table = Table(title=visible(title), title_justify="left", header_style="bold")
    for name in ("site", "d", "rank", "energy", "95 % at"):
        table.add_column(name, justify="left" if name == "site" else "right", no_wrap=True)
    table.add_column("singular values, log", no_wrap=True)
    for row in site_rows(subspace):
        table.add_row(
            row.site,
            str(row.width),
            str(row.rank),
            "-" if row.energy is None else f"{100 * row.energy:.1f} %",
            "-" if row.rank_95 is None else str(row.rank_95),
            f"none: made by {subspace.derived}"
            if row.singular_values is None
            else sparkline(row.singular_values, columns=28),  # with which the table has 80 columns at most
        )
    wide_console().print(table)


def print_plan(plan: Plan) -> None:
    from rich.table import Table

    from spd.intervention.planner import size_text, time_text

    title = f"Decoding with {plan.context} tokens in the cache, batch {plan.batch}, {plan.dtype}: {plan.device}"
    table = Table(header_style="bold")
    for name in ("mode", "a step", "tokens/s", "cache", "weights", "bound by"):
        table.add_column(name, justify="left" if name in ("mode", "bound by") else "right", no_wrap=True)
    for each in plan.predictions:
        if not each.possible:
            table.add_row(each.mode, *["-"] * 4, "not possible")
            continue
        speed = f"{plan.batch / each.seconds:.3g}"
        sizes = size_text(each.cache_bytes), size_text(each.weight_bytes)
        bound = each.limit + (", does not fit" if each.fits is False else "")
        table.add_row(each.mode, time_text(each.seconds), speed, *sizes, bound)
    console = wide_console()
    console.print(title, style="italic", highlight=False, soft_wrap=True)
    console.print(table)
    for each in plan.predictions[1:]:
        typer.echo(f"{each.mode}: {visible(each.why)}")
    typer.echo(f"choice: {visible(plan.explanation)}")


def wide_console() -> Console:
    """Standard output as wide as the terminal; in a file or a pipe as wide as it takes.

    What stands in brackets or between colons is text, not markup: it may be a model's.
    """
    from rich.console import Console

    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        console.width = UNBOUNDED
    return console


def _width(table: Table, console: Console) -> int:
    return console.measure(table, options=console.options.update(max_width=UNBOUNDED)).maximum
