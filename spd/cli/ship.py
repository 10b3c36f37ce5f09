"""A command that makes checkpoints and adapters for others to use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spd.cli.app import Sides, app
from spd.errors import InputError


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist yet.")],
    folded: Annotated[Path | None, typer.Option(help="Subspace to project K and V of --model onto.")] = None,
    merged: Annotated[Path | None, typer.Option(help="LoRA adapter to multiply into the weights of --model.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="LoRA adapter to write as peft and engines take it.")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Checkpoint folder or hub name; for --adapter, what to name as its base."),
    ] = None,
    sides: Sides = "kv",
) -> None:
    """Write a checkpoint that transformers, vLLM, SGLang and TGI take as it is, or an adapter for peft."""
    from spd.export import export_adapter, export_folded, export_merged

    given = {"--folded": folded, "--merged": merged, "--adapter": adapter}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise InputError(f"export: expected one of {', '.join(given)}, got {' and '.join(named) or 'none'}")
    if folded is None and sides != "kv":
        raise InputError("--sides: it says what to project, which takes --folded")
    if adapter is not None:
        typer.echo(export_adapter(adapter, out, base=model))
        return
    if model is None:
        raise InputError(f"--model: {named[0]} takes the checkpoint to change")
    if folded is not None:
        typer.echo(export_folded(model, folded, out, sides=sides))
    elif merged is not None:
        typer.echo(export_merged(model, merged, out))
