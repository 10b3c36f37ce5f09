"""Commands that look at what counts and what was found: spans and subspaces."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spd.cli.app import Data, Model, PromptsAs, TaskName, app
from spd.cli.output import print_spectra, wide_console
from spd.errors import InputError


@app.command()
def inspect(
    subspace: Annotated[Path, typer.Argument(help="Subspace folder.")],
    plot: Annotated[Path | None, typer.Option(help="Also draw the spectra into this file (.png, .svg, .pdf).")] = None,
) -> None:
    """Show what a subspace holds: ranks, energy, spectra, and where it came from."""
    import json

    from spd.plots import FORMATS
    from spd.subspace import Subspace

    if plot and plot.suffix not in FORMATS:
        raise InputError(f"--plot: expected a file name ending in {', '.join(FORMATS)}, got {plot.name!r}")
    loaded = Subspace.from_pretrained(subspace)
    print_spectra(str(subspace), loaded)
    typer.echo(json.dumps(loaded.provenance, indent=2, ensure_ascii=False))
    if plot:
        from spd.files import atomic_file
        from spd.plots import spectra_figure

        with atomic_file(plot) as temporary:
            spectra_figure(loaded).savefig(temporary, format=plot.suffix[1:], dpi=160)
        typer.echo(plot)


@app.command()
def spans(
    model: Model,
    task: TaskName,
    rule: Annotated[
        str | None,
        typer.Option(
            help="Mark anew: answer, code, asserts, completion, regex:PATTERN or prompt-regex:PATTERN.",
            show_default="the task's own spans",
        ),
    ] = None,
    preview: Annotated[bool, typer.Option(help="Show the text, coloured; without it only count.")] = True,
    show: Annotated[int, typer.Option(min=1, help="How many examples to show; all are counted.")] = 4,
    examples: Annotated[
        int | None, typer.Option(min=1, help="Calibration examples.", show_default="the task's")
    ] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens after which a text is cut.")] = 256,
    html: Annotated[Path | None, typer.Option(help="Write a page with all of them in place of printing.")] = None,
    prompts_as: PromptsAs = "plain",
    data: Data = None,
) -> None:
    """Show, token by token, what a task's calibration takes the loss over."""
    import spd
    from spd.files import write_text
    from spd.models import load_tokenizer
    from spd.span_preview import count_line, preview_html, print_preview
    from spd.span_preview import preview as preview_of
    from spd.tasks.custom import calibration_by_rule

    tokenizer, limit = load_tokenizer(model)
    chosen = spd.load_task(task, data, prompts=prompts_as, tokenizer=tokenizer)
    marked = calibration_by_rule(chosen, rule) if rule else chosen.calibration()
    marked = marked[: chosen.calibration_size if examples is None else examples]
    previews = preview_of(tokenizer, marked, max_length=min(max_length, limit or max_length))
    if not preview:
        typer.echo(count_line(previews))
    elif html:
        write_text(html, preview_html(previews, title=f"{chosen.name}: what counts"))
        typer.echo(html)
    else:
        print_preview(previews, show=show, console=wide_console())
