"""`python -m tests.torture`: every kind of harm, two trials at a time, and a table. Status 1 if anything was lost."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tests.torture import faults, fuzzers, kinds, results, sittings
from tests.torture.soak import Soak
from tests.torture.trials import Bench, RealDisk, Tally, Trial

_HALF = faults.Fault("kill", "mkdir words/adapters/projected.checkpoints/checkpoint-6")
FUZZ_EXAMPLES = 300


def main() -> int:
    arguments = _arguments()
    if reason := faults.why_not():
        print(f"torture: {reason}", file=sys.stderr)
        return 2
    if not faults.preloaded():
        folder = tempfile.mkdtemp(prefix="torture-")
        os.execve(
            sys.executable, [sys.executable, "-m", "tests.torture", *sys.argv[1:]], faults.environment(Path(folder))
        )
    folder = faults.library().parent
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)  # whatever a trial that is ended leaves goes with the folder
    interrupted: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, partial(_interrupt, interrupted))
    begin = time.monotonic()
    try:
        tallies, left_out = torture(folder, arguments.quick, arguments.workers, arguments.only)
    except KeyboardInterrupt:  # before the first trial
        tallies, left_out = [], {}
    finally:
        shutil.rmtree(folder, ignore_errors=bool(interrupted))
    seconds, cpu = time.monotonic() - begin, _cpu_seconds()
    show(tallies, seconds, cpu)
    for kind, reason in left_out.items():
        print(f"torture: {kind}: left out, {reason}", file=sys.stderr)
    if interrupted:
        print(f"torture: {signal.Signals(interrupted[0]).name}, so these are not all trials", file=sys.stderr)
        return 128 + interrupted[0]
    if arguments.out:
        rows = [tally.__dict__ for tally in tallies]
        machine = f"{platform.machine()}, {os.cpu_count()} CPU cores"
        table = {"machine": machine, "seconds": seconds, "cpu_seconds": cpu}
        table |= {"left_out": left_out, "rows": rows}
        Path(arguments.out).write_text(json.dumps(table, indent=2) + "\n")

    return 1 if any(tally.lost for tally in tallies) else 0


def _interrupt(received: list[int], number: int, frame: object) -> None:
    """The first signal ends the trials; those that come while that goes on change nothing."""
    received.append(number)
    if len(received) == 1:
        raise KeyboardInterrupt


def _be_worker() -> None:
    signal.signal(signal.SIGINT, lambda *_: None)  # it is the first process's
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # of the pool, when it is ended: no disk stays mounted


def torture(folder: Path, quick: bool, workers: int, only: str = "") -> tuple[list[Tally], dict[str, str]]:
    """All trials, or a few of each kind, and what became of them by kind; after SIGINT or SIGTERM, of those until then.
    Also the kinds that this machine does not allow, and why.

    Raises:
        RuntimeError: the run cannot even be carried out undisturbed.
    """
    sittings.prepare()
    bench, journal = _bench(folder)
    trials = [trial for trial in _trials(bench, journal, quick) if only in trial.kind]
    disks = [trial for trial in trials if isinstance(trial, RealDisk)]
    left_out = {}
    if disks and (reason := RealDisk.why_not()):
        left_out[disks[0].kind] = f"no disk can be mounted here: {reason}"
        trials = [trial for trial in trials if trial not in disks]
    tallies = {trial.kind: Tally(trial.kind) for trial in trials}
    longest_first = sorted(trials, key=lambda trial: not isinstance(trial, (Soak, fuzzers.Fuzz)))
    context = multiprocessing.get_context("fork")  # what was imported is there; no thread runs yet
    with (
        context.Pool(workers, _be_worker) as pool,
        Progress(console=Console(stderr=True)) as shown,
        suppress(KeyboardInterrupt),
    ):
        task = shown.add_task("torture", total=len(trials))
        for tally in pool.imap_unordered(partial(_tried, bench=bench), longest_first):
            tallies[tally.kind].add(tally)
            shown.update(task, advance=1, description=tally.kind)
            for detail in tally.details:  # at once: a long run that is interrupted has said what it found
                shown.console.print(f"lost, {tally.kind}: {detail}", markup=False, highlight=False)
        pool.close()
        pool.join()
    return list(tallies.values()), left_out


def _tried(trial: Trial, bench: Bench) -> Tally:
    begin = time.monotonic()
    try:
        tally = trial.run(bench)
    except Exception as error:
        tally = Tally(trial.kind, tried=1, lost=1, details=[f"{trial}: {type(error).__name__}: {error}"])
    tally.seconds = time.monotonic() - begin
    return tally


def _bench(folder: Path) -> tuple[Bench, list[str]]:
    """An undisturbed run, one that was killed half-way, and the journal of the former's writes."""
    config, journal = folder / "run.toml", folder / "journal"
    config.write_text(sittings.CONFIG)
    finished, half = folder / "finished", folder / "half"
    ending = sittings.sit(finished, config, journal=journal)
    if ending.status:
        raise RuntimeError(f"an undisturbed run fails: {ending}")
    killed = sittings.sit(half, config, _HALF)
    if killed.status != -9:
        raise RuntimeError(f"a run is not killed by {_HALF}: {killed}")
    return Bench(config, results.results(finished), finished, half, ending.seconds), kinds.read_journal(journal)


def _trials(bench: Bench, journal: list[str], quick: bool) -> list[Trial]:
    harm = [
        *kinds.kills(journal),
        *kinds.moments(),
        *kinds.signals(journal),
        *kinds.full_disks(journal, bench),
        *kinds.damages(bench),
        *kinds.neighbours(),
    ]
    if quick:
        return kinds.few(harm)
    return [Soak(), *fuzzers.fuzzers(FUZZ_EXAMPLES), *kinds.command_lines(), *harm]


def _cpu_seconds() -> float:
    own, waited_for = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + waited_for.ru_utime + waited_for.ru_stime


def show(tallies: list[Tally], seconds: float, cpu: float) -> None:
    table = Table(title=f"{seconds / 60:.1f} minutes, {cpu / 60:.1f} of CPU")
    table.add_column("kind of fault")
    names = ("tried", "resumed", "refused", "lost")
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("seconds", justify="right")
    for tally in tallies:
        table.add_row(tally.kind, *(f"{getattr(tally, name):,}" for name in names), f"{tally.seconds:,.0f}")
    table.add_section()
    table.add_row("all", *(f"{sum(getattr(tally, name) for tally in tallies):,}" for name in names), "")
    console = Console()
    console.print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few trials of each kind, no soak: under a minute")
    parser.add_argument("--workers", type=int, default=2, help="trials at a time")
    parser.add_argument("--only", default="", help="only kinds with this in their name")
    parser.add_argument("--out", help="JSON file for the table and the details")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
