"""Commands that carry out the method, whole or stage by stage."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spd.cli.app import (
    BatchSize,
    Data,
    Device,
    Dtype,
    MaxNewTokens,
    Mode,
    Model,
    PromptsAs,
    Quiet,
    RunGeneratedCode,
    Sides,
    SubspaceFolder,
    TaskName,
    announce_sandbox,
    app,
    say,
)
from spd.cli.output import print_evaluation, print_profile, print_scores, print_spectra
from spd.cli.processes import together
from spd.errors import InputError

if TYPE_CHECKING:
    from spd.tasks import Task

Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="The same seeds, the same bytes, whatever the batch size; slower.")
]
DeterministicTraining = Annotated[
    bool,
    typer.Option("--deterministic", help="The same seed, the same bytes, whatever the number of threads; slower."),
]
GradientCheckpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Compute activations again rather than keep them.")
]


@app.command()
def run(
    config: Annotated[
        Path,
        typer.Argument(
            help="TOML file; README shows one, spd/config.py every key, spd/recipe.py those of its table training."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Run folder.", show_default="runs/NAME-OF-CONFIG")] = None,
    deterministic: Deterministic = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Tokens, memory and share of the machine's bound, stage by stage.")
    ] = False,
    run_generated_code: RunGeneratedCode = False,
    quiet: Quiet = False,
) -> None:
    """Carry out the whole method; started again on the same folder, go on where it stopped."""
    from spd.config import load_config

    settings = load_config(config)
    if deterministic:
        settings = settings.model_copy(update={"deterministic": True})
    folder = Path("runs") / config.stem if out is None else out
    from spd.run import run as carry_out

    with together() as main:
        if main:
            announce_sandbox(run_generated_code, quiet)
        scores = carry_out(
            settings,
            folder,
            run_generated_code=run_generated_code,
            profile=profile,
            progress=not quiet,
            say=say(quiet or not main),
        )
        if main:
            print_scores(scores, folder)
            if profile:
                print_profile(folder)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    quiet: Quiet = False,
) -> None:
    """Run the whole method on the model and data that the project carries (about three minutes on two cores)."""
    from spd.config import load_config
    from spd.run import run as carry_out
    from spd.subspace import Subspace

    settings = load_config(Path(__file__).parents[1] / "demo.toml")
    scores = carry_out(settings, out, progress=not quiet, say=say(quiet))
    for task in settings.tasks:
        print_spectra(f"Gradient spectra, {task}", Subspace.from_pretrained(out / task / "subspace"))
    print_scores(scores, out)


@app.command()
def calibrate(
    model: Model,
    task: TaskName,
    out: Annotated[Path, typer.Option(help="Folder for the subspace.")],
    examples: Annotated[
        int | None, typer.Option(min=1, help="Calibration examples.", show_default="the task's")
    ] = None,
    layers: Annotated[
        str, typer.Option(help='"paper" (middle and last), "middle", "last", "all", or indices: 3,7,11.')
    ] = "paper",
    rank: Annotated[str, typer.Option(help='"half", "full", "energy:0.95", or a number.')] = "half",
    loss: Annotated[str, typer.Option(help='"spans" (correctness-defining tokens) or "full".')] = "spans",
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in one pass.")] = 8,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens after which a text is cut.")] = 256,
    gradient_checkpointing: GradientCheckpointing = False,
    deterministic: Deterministic = False,
    prompts_as: PromptsAs = "plain",
    data: Data = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Find the subspace of K and V in which a task's correctness is decided; under torchrun, together."""
    import spd

    chosen = _task(task, data, prompts_as, model)
    with together() as main:
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
            gradient_checkpointing=gradient_checkpointing,
            deterministic=deterministic,
            progress=not quiet,
        )
        if main:
            subspace.save_pretrained(out)
            if not quiet:
                print_spectra(f"{task} on {model}", subspace)
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
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Sample among so many of the likeliest tokens.", show_default="all")
    ] = None,
    top_p: Annotated[float, typer.Option(help="Nucleus mass.")] = 0.9,
    max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = 32,
    seed: Annotated[int, typer.Option(min=0, help="Of the samples.")] = 42,
    shard: Annotated[
        str | None, typer.Option(help="This worker of so many: 0/8 to 7/8. The last to finish merges.")
    ] = None,
    deterministic: Deterministic = False,
    mode: Mode = "auto",
    sides: Sides = "kv",
    engine: Annotated[str, typer.Option(help='"transformers", or "vllm" where it is installed.')] = "transformers",
    prompts_as: PromptsAs = "plain",
    data: Data = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Sample one completion for each of a task's training prompts, projected if --subspace is given.

    Several workers share the prompts under torchrun, or started one by one with --shard.
    """
    import spd
    from spd.generation import leave_out

    _check_projection(subspace, mode, sides)
    worker = _shard(shard)
    if engine not in ("transformers", "vllm"):
        raise InputError(f'--engine: expected "transformers" or "vllm", got {engine!r}')
    if engine == "vllm" and mode not in ("auto", "fold"):
        raise InputError(f'--mode: with --engine vllm expected "auto" or "fold", got {mode!r}')
    chosen = _task(task, data, prompts_as, model)
    wanted = chosen.training_prompts()[:prompts]
    settings: dict[str, Any] = {
        "out": out,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "max_new_tokens": chosen.max_new_tokens if max_new_tokens is None else max_new_tokens,
        "seed": seed,
        "progress": not quiet,
    }
    if engine == "vllm":
        from spd.engine import generate_with_vllm

        if worker or deterministic:
            raise InputError("--engine vllm: it batches and spreads by itself; leave out --shard and --deterministic")
        options = {} if dtype == "auto" else {"dtype": dtype}
        generate_with_vllm(model, wanted, subspace=subspace, sides=sides, options=options, **settings)
        typer.echo(out)
        return
    settings |= {"batch_size": batch_size, "shard": worker, "deterministic": deterministic}
    with together() as main:
        loaded, tokenizer = spd.load_model(model, dtype=dtype, device=device)
        wanted, _ = leave_out(loaded, tokenizer, wanted, settings["max_new_tokens"], chosen.name)
        with _projected(loaded, subspace, mode, sides):
            spd.generate(loaded, tokenizer, wanted, tag=_tag(subspace, mode, sides), **settings)
        if main:
            typer.echo(out if out.is_file() else f"{out}: this shard is done, others are not yet")


@app.command()
def distill(
    model: Model,
    generations: Annotated[Path, typer.Option(help="JSON Lines file that `spd generate` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for the LoRA adapter.")],
    preset: Annotated[str, typer.Option(help='Recipe to start from; "paper" is the only one.')] = "paper",
    learning_rate: Annotated[float | None, typer.Option(help="In place of the preset's.")] = None,
    epochs: Annotated[float | None, typer.Option(help="In place of the preset's.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="In place of the preset's.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="In place of the preset's.")] = None,
    gradient_checkpointing: GradientCheckpointing = False,
    deterministic: DeterministicTraining = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Fine-tune the original model on its own completions with LoRA."""
    from dataclasses import replace

    import spd
    from spd.generation import read_generations
    from spd.recipe import PRESETS

    if preset not in PRESETS:
        raise InputError(f"--preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    given: dict[str, Any] = {"learning_rate": learning_rate, "epochs": epochs, "batch_size": batch_size, "seed": seed}
    recipe = replace(PRESETS[preset], **{key: value for key, value in given.items() if value is not None})
    completions = read_generations(generations)
    with together() as main:
        loaded, tokenizer = spd.load_model(model, dtype=dtype, device=device)
        spd.distill(
            loaded,
            tokenizer,
            completions,
            out=out,
            recipe=recipe,
            gradient_checkpointing=gradient_checkpointing,
            deterministic=deterministic,
            progress=not quiet,
        )
        if main:
            typer.echo(out)


@app.command()
def evaluate(
    model: Model,
    task: TaskName,
    subspace: SubspaceFolder = None,
    adapter: Annotated[Path | None, typer.Option(help="LoRA adapter that `spd distill` wrote.")] = None,
    run_generated_code: RunGeneratedCode = False,
    questions: Annotated[
        int | None, typer.Option(min=1, help="The first so many.", show_default="the published number")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON Lines file for the completions; resumed.")] = None,
    max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = 32,
    answer_by: Annotated[
        str, typer.Option(help='"generation", or "likelihood": the likeliest of the options (mmlu, bbh, choice).')
    ] = "generation",
    deterministic: Deterministic = False,
    mode: Mode = "auto",
    sides: Sides = "kv",
    prompts_as: PromptsAs = "plain",
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
    chosen = _task(task, data, prompts_as, model)
    with together() as main:
        if main:
            announce_sandbox(run_generated_code, quiet)
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
                answer_by=answer_by,  # type: ignore[arg-type]  # it refuses what is neither
                deterministic=deterministic,
                tag=_tag(subspace, mode, sides) or _tag(adapter),
                run_generated_code=run_generated_code,
                progress=not quiet,
            )
        if main:
            print_evaluation(evaluation)


def _task(name: str, data: Path | None, prompts_as: str, model: str) -> Task:
    """The task, before the weights are read; for chat prompts that takes the tokenizer alone."""
    import spd

    tokenizer = None
    if prompts_as == "chat":
        from spd.models import load_tokenizer

        tokenizer = load_tokenizer(model)[0]
    return spd.load_task(name, data, prompts=prompts_as, tokenizer=tokenizer)


def _layers(text: str) -> str | list[int]:
    from spd.named import NAMED_LAYERS

    if text in NAMED_LAYERS:
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        names = ", ".join(NAMED_LAYERS)
        raise InputError(f"--layers: expected one of {names}, or indices such as 3,7, got {text!r}") from None


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise InputError(f"--shard: expected NUMBER/COUNT, counted from 0, such as 0/8, got {text!r}")
    return int(number), int(count)


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
