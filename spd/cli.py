"""The command line. Thin: every command is one function of the package, its result printed.

Heavy imports stand inside the commands, so that help is there at once.
"""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from safetensors import SafetensorError

from spd.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from spd.intervention.planner import Plan
    from spd.run import Score
    from spd.subspace import Subspace

UsageError: Any = typer.BadParameter.__base__  # of the click that typer carries, or in older versions imports
INTERRUPTED = 130  # as a shell counts SIGINT; typer returns it for a Ctrl-C, older versions raise Abort
UNBOUNDED = 10_000  # columns
RESUMABLE = ("run", "demo", "generate", "distill", "long-context")

app = typer.Typer(
    name="spd",
    help="Self-Policy Distillation: improve a language model with its own generations (arXiv 2605.22675).",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Option("--model", "-m", help='Checkpoint folder, hub name, or "proving-ground".')]
TaskName = Annotated[str, typer.Option("--task", "-t", help="gsm8k, svamp, words, choice, code, or an -ood sibling.")]
Data = Annotated[Path | None, typer.Option(help="Folder of local records, NAME/SPLIT.jsonl, in place of the hub.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16; auto is float32 on a CPU.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars, no lines about stages.")]
SubspaceFolder = Annotated[Path | None, typer.Option(help="Project K and V onto this subspace.")]
Mode = Annotated[str, typer.Option(help="How to project: auto, hook or fold.")]
Sides = Annotated[str, typer.Option(help="Which side to project: kv, k or v.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts decoded together.")]
MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, help="Length limit of a completion.", show_default="the task's")
]


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="TOML file; README shows one, spd/config.py every key.")],
    out: Annotated[Path | None, typer.Option(help="Run folder.", show_default="runs/NAME-OF-CONFIG")] = None,
    quiet: Quiet = False,
) -> None:
    """Carry out the whole method; started again on the same folder, go on where it stopped."""
    from spd.config import load_config
    from spd.run import run as carry_out

    settings = load_config(config)
    folder = Path("runs") / config.stem if out is None else out
    scores = carry_out(settings, folder, progress=not quiet, say=_say(quiet))
    _print_scores(scores, folder)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    quiet: Quiet = False,
) -> None:
    """Run the whole method on the model and data that the project carries (about three minutes on two cores)."""
    from spd.config import load_config
    from spd.run import run as carry_out
    from spd.subspace import Subspace

    settings = load_config(Path(__file__).with_name("demo.toml"))
    scores = carry_out(settings, out, progress=not quiet, say=_say(quiet))
    for task in settings.tasks:
        _print_spectra(f"Gradient spectra, {task}", Subspace.from_pretrained(out / task / "subspace"))
    _print_scores(scores, out)


@app.command()
def calibrate(
    model: Model,
    task: TaskName,
    out: Annotated[Path, typer.Option(help="Folder for the subspace.")],
    examples: Annotated[
        int | None, typer.Option(min=1, help="Calibration examples.", show_default="the task's")
    ] = None,
    layers: Annotated[str, typer.Option(help='"paper" (middle and last), "all", or indices: 3,7,11.')] = "paper",
    rank: Annotated[str, typer.Option(help='"half", "energy:0.95", or a number.')] = "half",
    loss: Annotated[str, typer.Option(help='"spans" (correctness-defining tokens) or "full".')] = "spans",
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in one pass.")] = 8,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens after which a text is cut.")] = 256,
    data: Data = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Find the subspace of K and V in which a task's correctness is decided."""
    import spd

    chosen = spd.load_task(task, data)
    loaded, tokenizer = spd.load_model(model, dtype=dtype, device=device)
    subspace = spd.calibrate(
        loaded,
        tokenizer,
        chosen.calibration()[: chosen.calibration_size if examples is None else examples],
        layers=_layers(layers),
        rank=int(rank) if rank.isdecimal() else rank,
        loss=loss,
        batch_size=batch_size,
        max_length=max_length,
        progress=not quiet,
    )
    subspace.save_pretrained(out)
    if not quiet:
        _print_spectra(f"{task} on {model}", subspace)
    typer.echo(out)


@app.command()
def generate(
    model: Model,
    task: TaskName,
    out: Annotated[Path, typer.Option(help="JSON Lines file; resumed if it is there.")],
    subspace: SubspaceFolder = None,
    prompts: Annotated[
        int | None, typer.Option(min=1, help="The first so many training prompts.", show_default="all")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 decodes greedily.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Nucleus mass.")] = 0.9,
    max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = 32,
    seed: Annotated[int, typer.Option(min=0, help="Of the samples.")] = 42,
    mode: Mode = "auto",
    sides: Sides = "kv",
    data: Data = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Sample one completion for each of a task's training prompts, projected if --subspace is given."""
    import spd

    _check_projection(subspace, mode, sides)
    chosen = spd.load_task(task, data)
    loaded, tokenizer = spd.load_model(model, dtype=dtype, device=device)
    with _projected(loaded, subspace, mode, sides):
        spd.generate(
            loaded,
            tokenizer,
            chosen.training_prompts()[:prompts],
            out=out,
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=chosen.max_new_tokens if max_new_tokens is None else max_new_tokens,
            batch_size=batch_size,
            seed=seed,
            tag=_tag(subspace, mode, sides),
            progress=not quiet,
        )
    typer.echo(out)


@app.command()
def distill(
    model: Model,
    generations: Annotated[Path, typer.Option(help="JSON Lines file that `spd generate` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for the LoRA adapter.")],
    preset: Annotated[str, typer.Option(help="Recipe to start from.")] = "paper",
    learning_rate: Annotated[float | None, typer.Option(help="In place of the preset's.")] = None,
    epochs: Annotated[float | None, typer.Option(help="In place of the preset's.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="In place of the preset's.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="In place of the preset's.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Fine-tune the original model on its own completions with LoRA."""
    from dataclasses import replace

    import spd
    from spd.distillation import PRESETS
    from spd.generation import read_generations

    if preset not in PRESETS:
        raise InputError(f"--preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    given: dict[str, Any] = {"learning_rate": learning_rate, "epochs": epochs, "batch_size": batch_size, "seed": seed}
    recipe = replace(PRESETS[preset], **{key: value for key, value in given.items() if value is not None})
    completions = read_generations(generations)
    loaded, tokenizer = spd.load_model(model, dtype=dtype, device=device)
    typer.echo(spd.distill(loaded, tokenizer, completions, out=out, recipe=recipe, progress=not quiet))


@app.command()
def evaluate(
    model: Model,
    task: TaskName,
    subspace: SubspaceFolder = None,
    adapter: Annotated[Path | None, typer.Option(help="LoRA adapter that `spd distill` wrote.")] = None,
    questions: Annotated[
        int | None, typer.Option(min=1, help="The first so many.", show_default="the published number")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON Lines file for the completions; resumed.")] = None,
    max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = 32,
    mode: Mode = "auto",
    sides: Sides = "kv",
    data: Data = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Score a model, projected or tuned, on a task's test questions."""
    import spd

    if subspace and adapter:
        raise InputError("--subspace and --adapter: give one of them; the adapter is for the unprojected model")
    _check_projection(subspace, mode, sides)
    chosen = spd.load_task(task, data)
    loaded, tokenizer = spd.load_model(model, dtype=dtype, device=device)
    with (
        _projected(loaded, subspace, mode, sides),
        spd.adapted(loaded, adapter) if adapter else nullcontext(loaded) as tested,
    ):
        evaluation = spd.evaluate(
            tested,
            tokenizer,
            chosen,
            limit=questions,
            out=out,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            tag=_tag(subspace, mode, sides) or _tag(adapter),
            progress=not quiet,
        )
    low, high = evaluation.interval
    typer.echo(
        f"{task}: {100 * evaluation.accuracy:.1f} % ({evaluation.correct} of {evaluation.n}), "
        f"95 % interval {100 * low:.1f} to {100 * high:.1f}"
    )


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
    _print_spectra(str(subspace), loaded)
    typer.echo(json.dumps(loaded.provenance, indent=2, ensure_ascii=False))
    if plot:
        from spd.files import atomic_file
        from spd.plots import spectra_figure

        with atomic_file(plot) as temporary:
            spectra_figure(loaded).savefig(temporary, format=plot.suffix[1:], dpi=160)
        typer.echo(plot)


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
    typer.echo(run(settings, out, progress=not quiet, say=_say(quiet)))


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
        _print_plan(chosen)


def main() -> NoReturn:
    """Entry point. One line and a status for what can go wrong: 2 bad input, 1 a failing disk, 130 an interrupt."""
    _quieten_libraries()
    arguments = sys.argv[1:] or ["--help"]
    try:
        status = app(arguments, standalone_mode=False)
    except UsageError as error:
        _fail(error.format_message(), 2)
    except InputError as error:
        _fail(error, 2)
    except (OSError, SafetensorError) as error:
        _fail(error, 1)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    if status == INTERRUPTED:
        _fail("interrupted" + ("; the same command goes on where it stopped" if _resumable(arguments) else ""), status)
    sys.exit(status or 0)


def _resumable(arguments: list[str]) -> bool:
    command, *options = arguments
    return command in RESUMABLE or (command == "evaluate" and any(option.startswith("--out") for option in options))


def _fail(error: object, status: int) -> NoReturn:
    if os.environ.get("SPD_DEBUG") and isinstance(error, BaseException):
        raise error
    typer.echo("spd: " + " ".join(str(error).split()), err=True)
    sys.exit(status)


def _quieten_libraries() -> None:
    """Only what the user can act on; a warning is one line."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def show(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
        if category is UserWarning:
            typer.echo(f"warning: {message}", err=True)

    warnings.showwarning = show


def _say(quiet: bool) -> Any:
    return (lambda line: None) if quiet else (lambda line: typer.echo(line, err=True))


def _layers(text: str) -> str | list[int]:
    if text in ("paper", "all"):
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f'--layers: expected "paper", "all" or indices such as 3,7, got {text!r}') from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{option}: expected numbers such as 1024,4096, got {text!r}") from None


def _check_projection(subspace: Path | None, mode: str, sides: str) -> None:
    """Refuse, before a model is loaded, what would have no effect."""
    if subspace is None and (mode, sides) != ("auto", "kv"):
        raise InputError("--mode and --sides: they say how to project, which takes a --subspace")


def _projected(model: Any, folder: Path | None, mode: str, sides: str) -> Any:
    import spd

    if folder is None:
        return nullcontext()
    return spd.attach(model, spd.Subspace.from_pretrained(folder, model), mode=mode, sides=sides)


def _tag(folder: Path | None, *settings: str) -> str:
    """What a subspace or an adapter adds to the settings of a resumable file."""
    from spd.files import sha256_of_file

    if folder is None:
        return ""
    weights = sorted(folder.glob("*.safetensors"))
    return " ".join([*(sha256_of_file(path) for path in weights), *settings])


def _print_scores(scores: list[Score], folder: Path) -> None:
    tests = list(dict.fromkeys(score.evaluation.task for score in scores))
    console = _console()
    for columns in range(len(tests), 0, -1):  # as many tests side by side as the terminal has room for
        groups = [tests[start : start + columns] for start in range(0, len(tests), columns)]
        tables = [_score_table([score for score in scores if score.evaluation.task in group]) for group in groups]
        if all(_width(table, console) <= console.width for table in tables):
            break
    console.print("Accuracy in %, 95 % interval", style="italic", highlight=False)
    console.print(*tables)
    typer.echo(f"report: {(folder / 'report.html').resolve()}")


def _score_table(scores: list[Score]) -> Table:
    from rich.table import Table

    tests = {score.evaluation.task: score.evaluation.n for score in scores}
    table = Table(header_style="bold")
    table.add_column("trained for", no_wrap=True)
    table.add_column("arm", no_wrap=True)
    for test, n in tests.items():
        table.add_column(f"{test}\nn = {n}", justify="right", no_wrap=True)
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for score in scores:
        low, high = score.evaluation.interval
        cell = f"{100 * score.evaluation.accuracy:.1f} [{100 * low:.0f}, {100 * high:.0f}]"
        rows.setdefault((score.capability or "", score.arm), {})[score.evaluation.task] = cell
    previous = ""
    for (capability, arm), cells in rows.items():
        if capability != previous:
            table.add_section()
        table.add_row(capability if capability != previous else "", arm, *(cells[test] for test in tests))
        previous = capability
    return table


def _print_spectra(title: str, subspace: Subspace) -> None:
    from rich.table import Table

    from spd.spectrum import site_rows, sparkline

    table = Table(title=title, title_justify="left", header_style="bold")
    for name in ("site", "d", "rank", "energy", "95 % at"):
        table.add_column(name, justify="left" if name == "site" else "right", no_wrap=True)
    table.add_column("singular values, log", no_wrap=True)
    for row in site_rows(subspace):
        table.add_row(
            row.site,
            str(row.width),
            str(row.rank),
            f"{100 * row.energy:.1f} %",
            str(row.rank_95),
            sparkline(row.singular_values, columns=28),  # with which the table has 80 columns at most
        )
    _console().print(table)


def _print_plan(plan: Plan) -> None:
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
    console = _console()
    console.print(title, style="italic", highlight=False, soft_wrap=True)
    console.print(table)
    for each in plan.predictions[1:]:
        typer.echo(f"{each.mode}: {each.why}")
    typer.echo(f"choice: {plan.explanation}")


def _console() -> Console:
    """Standard output as wide as the terminal; in a file or a pipe as wide as it takes."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = UNBOUNDED
    return console


def _width(table: Table, console: Console) -> int:
    return console.measure(table, options=console.options.update(max_width=UNBOUNDED)).maximum


if __name__ == "__main__":
    main()
