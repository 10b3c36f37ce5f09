"""One start of `spd run` in a process of its own, forked from one that has imported everything."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from tests.torture.faults import NONE, Fault

CONFIG = """\
model = "proving-ground"
tasks = ["words"]
[calibration]
examples = 12
[generation]
prompts = 10
max_new_tokens = 8
batch_size = 4
[training]
learning_rate = 3e-3
epochs = 2
batch_size = 4
[evaluation]
questions = 8
max_new_tokens = 24
batch_size = 4
"""
CHECKPOINT_STEPS = 2
"""Of six steps: a training has two checkpoints on its way."""
_PATIENCE = 600.0
_CRASHED = 70
_PR_SET_PDEATHSIG = 1
_IMPORTED = (
    "matplotlib.figure",
    "peft.utils.transformers_weight_conversion",
    "rich.table",
    "rich.terminal_theme",
    "spd.distillation",
    "spd.proving_ground.words",
    "spd.run",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.trainer",
)


@dataclass(frozen=True)
class Ending:
    """How a sitting ended: exit status (negative: by that signal), all it said, and how many writes it made."""

    status: int
    said: str
    seconds: float

    @property
    def refused(self) -> bool:
        """In one line, with the status of bad input."""
        return self.status == 2 and self.one_line

    @property
    def one_line(self) -> bool:
        lines = [line for line in self.said.splitlines() if not line.startswith("warning: ")]
        return len(lines) == 1 and lines[0].startswith("spd: ")

    def __str__(self) -> str:
        return f"status {self.status}: {self.said.strip()[-2000:] or 'nothing said'}"


def prepare() -> None:
    """Import what a run needs, make its trainings keep checkpoints often, and leave the report's figures blank.

    No tensor is computed here. To draw the figures takes half of the time of a run that finds everything made, and
    writes nothing; the command in a process of its own draws them.
    """
    from spd.cli.app import _quieten_libraries

    _quieten_libraries()  # they look at their environment once
    for name in _IMPORTED:
        with suppress(ModuleNotFoundError):  # of another release: imported early to save time alone
            import_module(name)
    import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("qwen3")  # made once, then kept
    trainer, plots = import_module("spd.training.trainer"), import_module("spd.plots")
    assert trainer.CHECKPOINT_STEPS > CHECKPOINT_STEPS
    trainer.CHECKPOINT_STEPS = CHECKPOINT_STEPS
    plots.svg_text = lambda figure: "<svg></svg>"


def end_with_parent() -> None:
    """Linux kills this process when the one that started it ends, so that an ended harness leaves nothing running."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def sit(
    folder: Path,
    config: Path,
    fault: Fault = NONE,
    *,
    after: tuple[int, float] | None = None,
    journal: Path | None = None,
) -> Ending:
    """Start the command on a run folder and wait for its end.

    Args:
        folder: the run folder.
        config: its configuration.
        fault: what happens at one of its writes.
        after: a signal, and the seconds after which it is sent.
        journal: a file that gets a line for each write.
    """
    with tempfile.TemporaryFile() as said:
        begin = time.monotonic()
        process = os.fork()
        if process == 0:
            _be_the_command(folder, config, fault, said.fileno(), journal)
        status = _wait(process, after)
        said.seek(0)
        return Ending(status, said.read().decode(errors="replace"), time.monotonic() - begin)


def _be_the_command(folder: Path, config: Path, fault: Fault, said: int, journal: Path | None) -> None:
    status = _CRASHED
    try:
        end_with_parent()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(said, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the harness has one of its own
        log = -1 if journal is None else os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        sys.argv = ["spd", "run", str(config), "--out", str(folder), "--quiet"]
        from spd.cli import main

        fault.arm(folder, log)
        main()
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _wait(process: int, after: tuple[int, float] | None) -> int:
    begin = time.monotonic()
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        elapsed = time.monotonic() - begin
        if after and elapsed >= after[1]:
            os.kill(process, after[0])
            after = None
        if elapsed > _PATIENCE:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise TimeoutError(f"a sitting did not end in {_PATIENCE:.0f} s")
        time.sleep(0.005)
