"""The application itself: what every command shares, and what becomes of an error."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from safetensors import SafetensorError

from spd.errors import InputError

UsageError: Any = typer.BadParameter.__base__  # of the click that typer carries, or in older versions imports
INTERRUPTED = 130  # as a shell counts SIGINT; typer returns it for a Ctrl-C, older versions raise Abort
RESUMABLE = ("run", "demo", "generate", "distill", "long-context", "reproduce")

app = typer.Typer(
    name="spd",
    help="Self-Policy Distillation: improve a language model with its own generations (arXiv 2605.22675).",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Option("--model", "-m", help='Checkpoint folder, hub name, or "proving-ground".')]
TaskName = Annotated[
    str,
    typer.Option(
        "--task",
        "-t",
        help="gsm8k, svamp, mbpp, codealpaca, mmlu, bbh, bbh-SUBTASK; words, choice, code, or an -ood sibling; "
        "a JSON Lines file or folder, or package.module:Name.",
    ),
]
Data = Annotated[Path | None, typer.Option(help="Folder of local records, NAME/SPLIT.jsonl, in place of the hub.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16; auto is float32 on a CPU.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars, no lines about stages.")]
SubspaceFolder = Annotated[Path | None, typer.Option(help="Project K and V onto this subspace.")]
Mode = Annotated[str, typer.Option(help="How to project: auto, hook, fold, latent_v or latent.")]
Sides = Annotated[str, typer.Option(help="Which side to project: kv, k or v.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts decoded together.")]
MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, help="Length limit of a completion.", show_default="the task's")
]
RunGeneratedCode = Annotated[
    bool,
    typer.Option("--run-generated-code", help="Consent to execute what the model writes, for tasks judged so (mbpp)."),
]
PromptsAs = Annotated[
    str,
    typer.Option("--prompts-as", help='"plain", "chat" (chat template) or "harness" (as lm-evaluation-harness asks).'),
]


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
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # of the processes that this one starts

    def show(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
        if category is UserWarning:
            typer.echo(f"warning: {message}", err=True)

    warnings.showwarning = show


def say(quiet: bool) -> Callable[[str], None]:
    return (lambda line: None) if quiet else (lambda line: typer.echo(line, err=True))


def announce_sandbox(run_generated_code: bool, quiet: bool) -> None:
    """Say what generated code can do on this machine, before any is run."""
    if run_generated_code and not quiet:
        from spd.sandbox import describe

        typer.echo(describe(), err=True)
