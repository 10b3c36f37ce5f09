"""`python -m benchmarks.long_context`: what projection saves and costs at long contexts.

On the carried recall model, and on random weights with the heads of an 8B model. A run that is killed goes on where it
stopped; one that came to its end is measured anew.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from spd.errors import InputError
from spd.long_context import Settings, resumes, run

RECALL = Settings(layers=("paper", "0", "all"))
# All layers attached at the lengths that the end-to-end figure is for; fold and hook cost what the dense model costs.
SMALL = Settings(
    model=None,
    shape="small",
    parts=("decode",),
    contexts=(4096, 8192, 16384),
    modes=("unprojected", "static", "latent_v", "latent"),
    decode_rank=64,
    rounds=9,
    tokens=8,
)


def quick(settings: Settings) -> Settings:
    """Fewer rounds, texts and ranks: to see the curves, not to quote them."""
    if settings.shape:
        return replace(settings, rounds=3, tokens=3)
    texts = replace(settings, ranks=(4, 16, 32), layers=("paper", "all"), haystacks=6, windows=4)
    return replace(texts, contexts=(1024, 2048, 4096), rounds=3, tokens=8)


def main(
    out: Annotated[Path, typer.Option(help="Folder; recall/ and small/ go into it.")] = Path(
        "benchmarks/results/long-context"
    ),
    small: Annotated[bool, typer.Option("--quick", help="Minutes on two cores: to see, not to quote.")] = False,
    only: Annotated[str, typer.Option(help="recall, small, or all.")] = "all",
) -> None:
    """Memory, time, retrieval and perplexity against context and rank; some twenty minutes on one core."""
    runs = {"recall": RECALL, "small": SMALL}
    if only != "all" and only not in runs:
        raise typer.BadParameter(f"expected all or one of {', '.join(runs)}, got {only!r}")
    for name, settings in runs.items():
        if only in ("all", name):
            folder = out / name
            chosen = quick(settings) if small else settings
            again = not resumes(chosen, folder)
            try:
                typer.echo(run(chosen, folder, again=again, say=lambda line: typer.echo(line, err=True)))
            except InputError as error:
                raise typer.BadParameter(str(error)) from None


if __name__ == "__main__":
    typer.run(main)
