"""The application itself: what every command shares, and what becomes of an error."""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from safetensors import SafetensorError

from spd.cli.processes import said_by_another
from spd.errors import InputError
from spd.memory import MemoryWarning, out_of_memory
from spd.shown import one_line, visible

UsageError: Any = typer.BadParameter.__base__  # of the click that typer carries, or in older versions imports
INTERRUPTED = 130  # as a shell counts SIGINT; typer returns it for a Ctrl-C, older versions raise Abort
_WORDS: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_FULL = (
    "No space left on device",
    "StorageFull",
    "file write failed",
    "PytorchStreamWriter",
    "iostream error",
    "unexpected pos",
)
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
    """Entry point: one line and a status for whatever can go wrong but for bugs.

    2 bad input, 1 a failing disk or too little memory, 130 SIGINT, 143 SIGTERM; if nobody reads the output, 1 and no
    line.
    """
    _quieten_libraries()
    arguments = sys.argv[1:] or ["--help"]
    with _signals(arguments) as received:
        try:
            status = app(arguments, standalone_mode=False)
            sys.stdout.flush()
        except BaseException as error:
            if received or isinstance(error, (KeyboardInterrupt, typer.Abort)):
                _fail_by_signal(received, arguments)
            _fail_by(error, arguments)
        if status == INTERRUPTED:
            _fail_by_signal(received, arguments)
    sys.exit(status or 0)


@contextmanager
def _signals(arguments: list[str]) -> Iterator[list[int]]:
    """SIGTERM unwinds as SIGINT does; a second signal ends the process at once. Yields those that have come."""
    received: list[int] = []

    def receive(number: int, frame: object) -> None:
        received.append(number)
        if len(received) > 1:
            os.write(2, f"spd: {_last_words(received, arguments)}\n".encode())
            os._exit(128 + received[0])
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        wanted = [number for number in _WORDS if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup has it
        before = {number: signal.signal(number, receive) for number in wanted}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fail_by_signal(received: list[int], arguments: list[str]) -> NoReturn:
    _fail(_last_words(received, arguments), 128 + (received or [signal.SIGINT])[0])


def _last_words(received: list[int], arguments: list[str]) -> str:
    return _WORDS[(received or [signal.SIGINT])[0]] + _hint(arguments)


def _fail_by(error: BaseException, arguments: list[str]) -> NoReturn:
    """One line for what is no bug of ours; anything else is raised as it is."""
    if isinstance(error, UsageError):
        _fail(error.format_message(), 2)
    if isinstance(error, InputError):
        _fail(error, 2)
    if isinstance(error, BrokenPipeError) and _nobody_reads():
        sys.exit(1)
    if full := _full_disk(error):
        _fail(f"the disk is full or fails: {_line(full)}{_hint(arguments)}", 1, error)
    if out_of_memory(error):
        _fail(f"out of memory: {_line(error)[:200] or 'an allocation failed'}; smaller batches need less", 1, error)
    if isinstance(error, (OSError, SafetensorError)):
        _fail(error, 1)
    raise error


def _nobody_reads() -> bool:
    """Whether standard output is the broken pipe. If so it leads nowhere from here on, so that closing it is quiet."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    broken = any(event & select.POLLERR for _, event in poll.poll(0))
    if broken:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return broken


def _full_disk(error: BaseException | None) -> BaseException | None:
    """The first that says a file could not be written, of an error and those it arose from.

    Torch says only that writing failed, and on the way out raises another error, about where the file ended.
    """
    first = None
    while error is not None:
        by_system = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
        by_library = isinstance(error, (RuntimeError, SafetensorError)) and any(sign in str(error) for sign in _FULL)
        first = error if by_system or by_library else first
        error = error.__cause__ or error.__context__
    return first


def _hint(arguments: list[str]) -> str:
    command, *options = arguments
    goes_on = command in RESUMABLE or (command == "evaluate" and any(each.startswith("--out") for each in options))
    return "; the same command goes on where it stopped" if goes_on else ""


def _line(error: object) -> str:
    return one_line(str(error))


def _fail(said: object, status: int, error: BaseException | None = None) -> NoReturn:
    error = said if isinstance(said, BaseException) else error
    if os.environ.get("SPD_DEBUG") and error is not None:
        raise error
    line = f"spd: {_line(said)}"
    if not said_by_another(line):
        typer.echo(line, err=True)
    sys.exit(status)


def _quieten_libraries() -> None:
    """Only what the user can act on; a warning is one line."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # of the processes that this one starts

    def show(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
        if category in (UserWarning, MemoryWarning):
            typer.echo(f"warning: {one_line(str(message))}", err=True)

    warnings.showwarning = show


def say(quiet: bool) -> Callable[[str], None]:
    return (lambda line: None) if quiet else (lambda line: typer.echo(visible(line), err=True))


def announce_sandbox(run_generated_code: bool, quiet: bool) -> None:
    """Say what generated code can do on this machine, before any is run."""
    if run_generated_code and not quiet:
        from spd.sandbox import describe

        typer.echo(describe(), err=True)
