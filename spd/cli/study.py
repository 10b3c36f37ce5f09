"""Commands that measure: the paper's tables, long contexts, and which form of the projection pays."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spd.cli.app import Data, Device, Dtype, Model, PromptsAs, Quiet, RunGeneratedCode, announce_sandbox, app, say
from spd.cli.output import print_plan
from spd.errors import InputError
from spd.shown import visible


@app.command()
def reproduce(
    tables: Annotated[
        list[str] | None,
        typer.Argument(
            help="1 to 5, controls, rounds, transfer, calibration-size, rank, layers, or learning-rate.",
            metavar="[TABLE]...",
            show_default="all but learning-rate",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help='Checkpoint folder, hub name, or "proving-ground".')
    ] = None,
    data: Data = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="How many repetitions.", show_default="3, or the file's")
    ] = None,
    miniature: Annotated[bool, typer.Option("--miniature", help="On the carried model and capabilities.")] = False,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with further settings; spd/reproduce/settings.py lists them.")
    ] = None,
    domains: Annotated[str | None, typer.Option(help="Out of code, math, choice.", show_default="all")] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="Training prompts.", show_default="all")] = None,
    questions: Annotated[
        int | None, typer.Option(min=1, help="Test questions.", show_default="the published numbers")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder; resumed if it is there.", show_default="runs/reproduce-MODEL")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes.", show_default="one a core for the carried model, else one")
    ] = None,
    prompts_as: PromptsAs = "plain",
    run_generated_code: RunGeneratedCode = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Remake the paper's tables, and the controls it lacks: measured beside published, intervals, paired tests."""
    import os
    import shlex
    import sys

    from spd.models import PROVING_GROUND
    from spd.reproduce import DEFAULT_TABLES
    from spd.reproduce import reproduce as remake
    from spd.reproduce.settings import MINIATURE, load_settings

    if miniature and (model or data or config):
        raise InputError(
            "--miniature: it has a model, data and settings of its own; leave out --model, --data and --config"
        )
    if not miniature and not model and not config:
        raise InputError("--model: expected a checkpoint, or --miniature")
    given = {
        "model": model,
        "prompts": None if prompts_as == "plain" else prompts_as,
        "data": str(data) if data else None,
        "domains": list(_names(domains)) if domains else None,
        "generation.prompts": prompts,
        "evaluation.questions": questions,
        "dtype": None if dtype == "auto" else dtype,
        "device": None if device == "auto" else device,
    }
    settings = load_settings(MINIATURE if miniature else config, given, seeds)
    announce_sandbox(run_generated_code, quiet)
    carried = settings.model == PROVING_GROUND
    tables_file = remake(
        settings,
        list(tables or DEFAULT_TABLES),
        out or Path("runs") / f"reproduce-{'miniature' if miniature else Path(settings.model).name}",
        workers=workers or ((os.cpu_count() or 1) if carried else 1),
        run_generated_code=run_generated_code,
        command=shlex.join(["spd", *sys.argv[1:]]),
        progress=not quiet,
        say=say(quiet),
    )
    if not quiet:
        typer.echo(visible(tables_file.read_text(encoding="utf-8")))
    typer.echo(tables_file)


@app.command("long-context")
def long_context(
    out: Annotated[Path, typer.Option(help="Folder for results, figures and report; resumed.")] = Path(
        "runs/long-context"
    ),
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help='Checkpoint folder, hub name, or "recall", which is carried.', show_default="recall"
        ),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Random weights instead: llama-3.1-8b, qwen2.5-7b, small or tiny.")
    ] = None,
    subspace: Annotated[
        Path | None, typer.Option(help="Measure this subspace.", show_default="one calibrated on needles")
    ] = None,
    contexts: Annotated[str, typer.Option(help="Tokens.")] = "512,1024,2048,4096",
    parts: Annotated[
        str | None, typer.Option(help="Out of decode, retrieval and perplexity.", show_default="all; of a shape decode")
    ] = None,
    modes: Annotated[
        str | None,
        typer.Option(help="To decode in: unprojected, static, fold, hook, latent_v, latent.", show_default="all"),
    ] = None,
    decode_rank: Annotated[
        int | None, typer.Option(min=1, help="Rank to decode with.", show_default="16; of a shape 64")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences decoded together.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="How often a mode is timed.")] = 7,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded in a row.")] = 16,
    ranks: Annotated[str, typer.Option(help="Ranks of retrieval and perplexity.")] = "4,8,16,32,48",
    layers: Annotated[
        str, typer.Option(help='Choices of layers: "paper", "all", or indices; "paper;all;1,2".')
    ] = "paper;all",
    haystacks: Annotated[int, typer.Option(min=1, help="Texts to retrieve from.")] = 16,
    needles: Annotated[int, typer.Option(min=1, help="Facts in each.")] = 16,
    windows: Annotated[int, typer.Option(min=2, help="Texts that perplexity is taken over.")] = 12,
    text: Annotated[
        Path | None, typer.Option(help="File to take perplexity over.", show_default="generated text")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of texts and random subspaces.")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Measure long contexts: memory and time by mode, retrieval and perplexity by rank and layers."""
    from spd.long_context import Settings, run
    from spd.long_context.settings import MODES, PARTS, RECALL

    if model and shape:
        raise InputError("--model and --shape: give one of them")
    settings = Settings(
        model=None if shape else model or RECALL,
        shape=shape,
        subspace=str(subspace) if subspace else None,
        parts=_names(parts) if parts else ("decode",) if shape else PARTS,
        contexts=_numbers("--contexts", contexts),
        modes=_names(modes) if modes else MODES,
        decode_rank=decode_rank or (64 if shape else 16),
        batch=batch,
        rounds=rounds,
        tokens=tokens,
        ranks=_numbers("--ranks", ranks),
        layers=tuple(layers.replace(" ", "").split(";")),
        haystacks=haystacks,
        needles=needles,
        windows=windows,
        text=str(text) if text else None,
        dtype=dtype,
        device=device,
        seed=seed,
    )
    typer.echo(run(settings, out, progress=not quiet, say=say(quiet)))


@app.command()
def plan(
    model: Model,
    subspace: Annotated[Path, typer.Option(help="Subspace folder.")],
    context: Annotated[int, typer.Option(min=1, help="Tokens a sequence in the cache.")],
    batch: Annotated[int, typer.Option(min=1, help="Sequences decoded together.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the table.")] = False,
    refresh: Annotated[bool, typer.Option(help="Measure the machine's constants anew.")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Rank the modes of projecting by predicted time and memory, and say why."""
    import json

    import spd
    from spd.intervention import machine

    loaded, _ = spd.load_model(model, dtype=dtype, device=device)
    found = spd.Subspace.from_pretrained(subspace, loaded)
    if refresh:
        machine.load(loaded.device, loaded.dtype, refresh=True, progress=not quiet)
    chosen = spd.plan(loaded, found, context=context, batch=batch, progress=not quiet)
    if as_json:
        typer.echo(json.dumps(chosen.to_dict(), indent=2, ensure_ascii=False))
    else:
        print_plan(chosen)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{option}: expected numbers such as 1024,4096, got {text!r}") from None
