"""Test, tune and time the kernels on a GPU, in one command of under eight minutes.

    python -m benchmarks.gpu --out DIR

Five stages, in this order, each with a time of its own and, where it touches the device, in a process of its own. A
stage saves what it has as soon as it has it, so that a run that is cut short keeps what it measured.

  test      pytest over tests/spd_kernels on the device (fp32, fp16, bf16), with fresh random inputs
  sanitize  small cases under compute-sanitizer's memory checker, where it is installed
  tune      every candidate configuration of every case beside the frozen one; proposes, changes nothing
  time      every case against eager PyTorch, torch.compile and other ways of writing it: CUDA events, medians with
            10th and 90th percentiles, inputs rotated past the L2 cache, for few rows also in a CUDA graph; the device's
            copy bandwidth and matrix rates are measured first, and every row says which share of its bound it reaches
  plot      the figures, and the tables anew, from what the folder holds

DIR gets, flat:

  results.md    for people: tests, targets met and missed, one table an operation, tuning
  results.json  the same and more: device, driver, versions, commit, every case and contender
  tuning.json   every configuration tried, with its times
  roofline.png  shares.png
  tests.txt     pytest's output

A second run into the same DIR on the same device, code and versions replaces the stages it runs and keeps the others.
Figures without green tests are marked as such, everywhere. Exit status: 0 if all went well, 1 if tests failed or did
not finish, a result was wrong or a stage broke (missed targets are reported, not failures), 2 for a bad argument or
without a GPU, which `--stages plot` alone does not need. Needs torch, triton, pytest and matplotlib (pytest-xdist makes
the tests quicker), and is run from the root of the repository; `spd` need not be installed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Seconds of each stage in a run of the default length, and what a stage may take to come up beyond them.
BUDGETS = {"test": 130.0, "sanitize": 35.0, "tune": 90.0, "time": 180.0, "plot": 10.0}
GRACE = 15.0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--out", type=Path, metavar="DIR", help="folder for the results; made if it is not there")
    found.add_argument(
        "--stages",
        default=",".join(BUDGETS),
        metavar="A,B",
        help="which stages, separated by commas (default: all: %(default)s)",
    )
    found.add_argument("--only", default="", metavar="TEXT", help="tune and time only cases whose name contains TEXT")
    found.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help=f"time for the chosen stages together (default: {sum(BUDGETS.values()):g} for all five)",
    )
    found.add_argument(
        "--rehearse",
        action="store_true",
        help="the whole flow with tiny cases on a CPU, in Triton's interpreter: tests this command; times mean nothing",
    )
    found.add_argument(
        "--predict",
        action="store_true",
        help="print the table of bounds and targets (csrc_notes/predictions.md), with what DIR holds beside them",
    )
    return found


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.predict:
        return _predict(options.out)
    if options.out is None:
        parser().error("--out: expected a folder")
    if options.out.exists() and not options.out.is_dir():
        parser().error(f"--out: expected a folder, got the file {options.out}")
    stages = [name.strip() for name in options.stages.split(",") if name.strip()]
    if unknown := [name for name in stages if name not in BUDGETS]:
        parser().error(f"--stages: expected some of {', '.join(BUDGETS)}; got {', '.join(unknown)}")
    if options.seconds is not None and options.seconds <= 0:
        parser().error(f"--seconds: expected a positive number; got {options.seconds:g}")

    if stages == ["plot"]:
        return _redraw(options.out)

    import torch

    if not options.rehearse and not torch.cuda.is_available():
        print(
            "No CUDA device: this command measures on a GPU. `--rehearse` runs its whole flow with tiny cases on a CPU "
            "(times mean nothing); `python -m benchmarks` times the CPU paths.",
            file=sys.stderr,
        )
        return 2
    if not options.rehearse and torch.version.hip is not None:
        print("An AMD device: this command relies on CUDA graphs' own description and nvidia-smi.", file=sys.stderr)
        return 2
    return _run(options, [name for name in BUDGETS if name in stages])


def _run(options: argparse.Namespace, stages: list[str]) -> int:
    from benchmarks.gpu import plots, report
    from benchmarks.gpu.results import Results

    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results.begin(options.out, rehearsal=options.rehearse)
    broken = []
    together = sum(BUDGETS[stage] for stage in stages)
    for stage in stages:
        seconds = BUDGETS[stage] * (options.seconds or together) / together
        print(f"[{time.monotonic() - started:5.0f} s] {stage}, at most {seconds:.0f} s", flush=True)
        begun = time.monotonic()
        try:
            status = _STAGES[stage](options, seconds)
        except Exception as error:  # one stage that breaks does not take the others' results with it
            status = f"{type(error).__name__}: {error}"
        results = Results(options.out)
        taken = {"seconds": time.monotonic() - begun, "status": status}
        results["stages"] = results.data.get("stages", {}) | {stage: taken}
        report.write(options.out, results)
        if status != "done":
            broken.append(stage)
            print(f"  {stage}: {status}", flush=True)
    if "plot" not in stages and "time" in stages:
        plots.write(options.out, results)
    reason = report.unquotable(results.data)
    if "time" in stages and reason:
        print(f"{reason} The figures are marked.", flush=True)
    print(f"[{time.monotonic() - started:5.0f} s] {options.out / report.FILE}", flush=True)
    return 1 if broken or ("time" in stages and "test" in stages and reason) else 0


def _redraw(folder: Path) -> int:
    """The figures and tables of a folder that is already there: needs no GPU."""
    from benchmarks.gpu import plots, report
    from benchmarks.gpu.results import FILE, Results

    if not (folder / FILE).exists():
        print(f"--out: expected a folder with {FILE} to plot; got {folder}", file=sys.stderr)
        return 2
    results = Results(folder)
    report.write(folder, results)
    plots.write(folder, results)
    return 0


def _test(options: argparse.Namespace, seconds: float) -> str:
    from benchmarks.gpu.correctness import run_tests
    from benchmarks.gpu.results import Results

    found = run_tests(options.out, seconds, rehearsal=options.rehearse)
    Results(options.out)["tests"] = found
    print(f"  {found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped", flush=True)
    return "done" if found["green"] else "failed" if found["finished"] else "out of time"


def _sanitize(options: argparse.Namespace, seconds: float) -> str:
    from benchmarks.gpu.correctness import sanitize
    from benchmarks.gpu.results import Results

    found = sanitize(options.out, seconds, rehearsal=options.rehearse)
    Results(options.out)["sanitize"] = found
    if found["clean"] is False:
        return "faults found"
    print(f"  {len(found.get('checked', []))} cases; present: {found['present']}", flush=True)
    return "done"  # a checker that is absent or slow is said, not failed


def _child(stage: str) -> Callable[[argparse.Namespace, float], str]:
    def run(options: argparse.Namespace, seconds: float) -> str:
        command = [sys.executable, "-m", "benchmarks.gpu.child", stage, str(options.out), str(seconds)]
        command += ["--only", options.only] + ["--rehearse"] * options.rehearse
        from benchmarks.gpu.correctness import environment

        try:
            code = subprocess.run(command, env=environment(options.rehearse), timeout=seconds + GRACE).returncode
        except subprocess.TimeoutExpired:
            return "out of time"
        return "done" if code == 0 else f"ended with status {code}"

    return run


def _plot(options: argparse.Namespace, seconds: float) -> str:
    from benchmarks.gpu import plots
    from benchmarks.gpu.results import Results

    plots.write(options.out, Results(options.out))
    return "done"


_STAGES: dict[str, Callable[[argparse.Namespace, float], str]] = {
    "test": _test,
    "sanitize": _sanitize,
    "tune": _child("tune"),
    "time": _child("time"),
    "plot": _plot,
}


def _predict(folder: Path | None) -> int:
    from benchmarks.gpu.report import predictions
    from benchmarks.gpu.results import Results
    from benchmarks.operations import gpu_cases

    print("\n".join(predictions(gpu_cases(), None if folder is None else Results(folder))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
