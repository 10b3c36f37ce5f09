"""Commands that look at what counts and what was found: spans, subspaces, and whether they still hold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spd.cli.app import Data, Device, Dtype, Model, PromptsAs, Quiet, TaskName, app
from spd.cli.output import print_drift, print_spectra, wide_console
from spd.errors import InputError
from spd.shown import visible

if TYPE_CHECKING:
    from spd.example import Example
    from spd.explorer import TokenGradients
    from spd.subspace import Subspace


@app.command()
def inspect(
    subspaces: Annotated[list[Path], typer.Argument(help="Subspace folders.")],
    html: Annotated[Path | None, typer.Option(help="Write one page about all of them, in place of printing.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write the page's figures into this folder.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the page's numbers into this file.")] = None,
    metrics: Annotated[
        Path | None, typer.Option(help="Run or reproduction folder, or its JSON file, whose scores the page shows.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="With --task: show which tokens carry the gradient.")
    ] = None,
    task: Annotated[str | None, typer.Option("--task", "-t", help="Whose calibration examples to show.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the spectra into this file (.png, .svg, .pdf).")] = None,
    data: Data = None,
) -> None:
    """Show what subspaces hold and how they lie to one another: spectra, energy, angles, and where they came from."""
    import json

    from spd.explorer import explore, explore_json, pairs, read_metrics, read_subspaces, write_figures
    from spd.files import atomic_file, write_json, write_text
    from spd.plots import FORMATS, spectra_figure
    from spd.record import without_hash_lists

    if plot and plot.suffix not in FORMATS:
        raise InputError(f"--plot: expected a file name ending in {', '.join(FORMATS)}, got {plot.name!r}")
    if plot and len(subspaces) > 1:
        raise InputError(f"--plot: draws one subspace, got {len(subspaces)}; --png FOLDER draws them together")
    if (model is None) != (task is None):
        raise InputError(
            "--model and --task: expected both or neither; the tokens are a task's, the gradient a model's"
        )
    loaded = read_subspaces(subspaces)
    scores = read_metrics(metrics) if metrics else None
    if html or png or json_file:
        tokens, of = _gradients(next(iter(loaded.values())), model, task, data) if model and task else (None, "")
        compared = pairs(loaded)
        if html:
            page = explore(loaded, tokens=tokens, metrics=scores, compared=compared, tokens_of=of)
            write_text(html, page)
        if json_file:
            write_json(json_file, explore_json(loaded, tokens=tokens, metrics=scores, compared=compared))
        drawn = write_figures(png, loaded, compared=compared) if png else []
        for path in filter(None, (html, json_file, *drawn)):
            typer.echo(path)
    else:
        for name, subspace in loaded.items():
            print_spectra(name, subspace)
            provenance = without_hash_lists(subspace.provenance)
            typer.echo(visible(json.dumps(provenance, indent=2, ensure_ascii=False)))
    if plot:
        with atomic_file(plot) as temporary:
            spectra_figure(next(iter(loaded.values()))).savefig(temporary, format=plot.suffix[1:], dpi=160)
        typer.echo(plot)


def _gradients(subspace: Subspace, model: str, task: str, data: Path | None) -> tuple[list[TokenGradients], str]:
    """Token gradients at a subspace's layers and with its settings, and what they are of."""
    import spd
    from spd.explorer import token_gradients

    loaded, tokenizer = spd.load_model(model)
    subspace.check_model(loaded)
    chosen = spd.load_task(task, data)
    settings = subspace.provenance.get("settings", {})
    examples = chosen.calibration()[: chosen.calibration_size]
    tokens = token_gradients(
        loaded,
        tokenizer,
        examples,
        subspace.layers,
        loss=settings.get("loss", "spans"),
        max_length=settings.get("max_length", 256),
    )
    return tokens, f"Calibration examples of {chosen.name}, gradients of {model}."


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
    preview: Annotated[bool, typer.Option("--preview", help="Show the text, coloured; else only count.")] = False,
    show: Annotated[int, typer.Option(min=1, help="How many examples to show; all are counted.")] = 4,
    examples: Annotated[
        int | None, typer.Option(min=1, help="Calibration examples.", show_default="the task's")
    ] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens after which a text is cut.")] = 256,
    html: Annotated[Path | None, typer.Option(help="Write a page with all of them.")] = None,
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
    if html:
        write_text(html, preview_html(previews, title=f"{chosen.name}: what counts"))
        typer.echo(html)
    if preview:
        print_preview(previews, show=show, console=wide_console())
    elif not html:
        typer.echo(count_line(previews))


@app.command()
def verify(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a subspace, an adapter or a run, or a file of completions.")
    ],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Also compare the hashes of a model with this one's.")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", "-t", help="Also compare a subspace's examples with this task's.")
    ] = None,
    data: Data = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    whole: Annotated[bool, typer.Option(help="List what agrees as well.")] = False,
) -> None:
    """Recompute every hash that a folder names; status 1 if one differs."""
    import json

    import spd

    loaded = spd.load_model(model, dtype=dtype, device=device)[0] if model else None
    examples = _calibrated_on(folder, spd.load_task(task, data).calibration()) if task else None
    report = spd.verify(folder, model=loaded, examples=examples)
    text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False) if as_json else report.text(whole=whole)
    typer.echo(visible(text))
    if not report.agrees:
        raise typer.Exit(1)


@app.command()
def drift(
    subspace: Annotated[Path, typer.Argument(help="Subspace folder.")],
    model: Model,
    task: TaskName,
    examples: Annotated[
        int | None, typer.Option(min=2, help="Fresh calibration examples.", show_default="as many as were used")
    ] = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Share kept below which to recalibrate.")] = 0.8,
    data: Data = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Calibrate on fresh examples, and say how far the subspace is off and whether to calibrate again."""
    import spd

    chosen = spd.load_task(task, data).calibration()
    loaded, tokenizer = spd.load_model(model, dtype=dtype, device=device)
    known = spd.Subspace.from_pretrained(subspace, loaded)
    used = _examples_used(known.provenance)
    fresh = chosen[used:][: examples or used]
    if len(fresh) < 2:
        raise InputError(
            f"--task: {task} has {len(chosen)} calibration examples, of which {used} were used; too few left"
        )
    found = spd.drift(loaded, tokenizer, known, fresh, threshold=threshold, progress=not quiet)
    print_drift(found)


def _calibrated_on(folder: Path, examples: list[Example]) -> list[Example]:
    """As many of a task's examples as the subspace in this folder says it took."""
    from spd.files import read_object
    from spd.subspace import MANIFEST

    if not (folder / MANIFEST).is_file():
        raise InputError(f"--task: {folder} is not the folder of a subspace, whose examples could be compared")
    return examples[: _examples_used(read_object(folder / MANIFEST).get("provenance"))]


def _examples_used(provenance: Any) -> int:
    """How many calibration examples a subspace took, those without a span included."""
    try:
        return int(provenance["examples"]) + len(provenance["examples_without_span"])
    except (KeyError, TypeError, ValueError):
        raise InputError("subspace: its provenance does not say how many examples it was calibrated on") from None
