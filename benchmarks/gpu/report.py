"""results.md and the table of predictions: what results.json and tuning.json hold, for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import COMPILED, OURS, Case, Target
from benchmarks.gpu.results import Results, element_type
from benchmarks.gpu.targets import Verdict, judge, median
from benchmarks.gpu.tune import FILE as TUNING
from benchmarks.gpu.tune import summary
from spd.files import read_json, write_text
from spd_kernels.roofline import H200, Machine, Work

FILE = "results.md"
VARIANTS = {"calls": "calls", "graph": "CUDA graph"}


def write(folder: Path, results: Results) -> None:
    """Write results.md anew from what the folder holds."""
    tuning = read_json(folder / TUNING) if (folder / TUNING).exists() else None
    write_text(folder / FILE, "\n".join(markdown(results, tuning)) + "\n")


def markdown(results: Results, tuning: Mapping[str, Any] | None) -> Iterator[str]:
    data, machine = results.data, results.machine
    yield f"# Kernels on {data['device']['name']}"
    yield ""
    if data["rehearsal"]:
        yield "**Rehearsal on a CPU: times mean nothing.**"
        yield ""
    if reason := unquotable(data):
        yield f"**{reason}** No figure below may be quoted."
        yield ""
    yield from _environment(data, machine)
    yield from _correctness(data)
    rows = data.get("cases", [])
    if rows:
        yield from _targets(rows, machine)
        for operation in dict.fromkeys(row["operation"] for row in rows):
            yield from _operation(operation, [row for row in rows if row["operation"] == operation], machine)
    if left_out := data.get("not_timed"):
        yield from ("", f"Not timed, for want of time: {'; '.join(left_out)}.")
    if tuning is not None:
        yield from _tuning(tuning)


def unquotable(data: Mapping[str, Any]) -> str:
    """Why the figures may not be quoted; nothing if the tests passed on this device and every case was right."""
    tests = data.get("tests")
    if tests is None:
        return "Tests not run."
    if not tests["finished"]:
        return "Tests not finished."
    if not tests["green"]:
        return f"Tests failed: {tests['failed']} of {tests['passed'] + tests['failed']}."
    rows = data.get("cases", [])
    if wrong := [row for row in rows if is_wrong(row) or OURS not in row["seconds"].get("calls", {})]:
        return f"Wrong or failed: {'; '.join(row['operation'] + ', ' + row['case'] for row in wrong)}."
    return ""


def is_wrong(row: Mapping[str, Any]) -> bool:
    """Whether a result was further from float64 than it may be; a case whose kernel failed has none."""
    return "error" in row and not row["error"] <= row["allowed_error"]


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> Iterator[str]:
    """A Markdown table, its first `left` columns flush left, the others flush right."""
    yield f"| {' | '.join(header)} |"
    yield f"| {' | '.join('---' if column < left else '---:' for column in range(len(header)))} |"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def microseconds(seconds: float) -> str:
    value = 1e6 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _work(row: Mapping[str, Any]) -> Work:
    return Work(row["bytes"], row["flops"])


def _environment(data: Mapping[str, Any], machine: Machine | None) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    yield f"- {data['date']}, commit {data['commit'] or 'unknown'}"
    yield f"- driver {data['driver'] or 'none'}; {versions}"
    if machine is not None:
        rates = ", ".join(
            f"{str(dtype).removeprefix('torch.')} {rate / 1e12:.3g} TFLOP/s"
            for dtype, rate in machine.flops_per_second.items()
        )
        yield f"- measured first: copy {machine.bytes_per_second / 1e12:.3g} TB/s (read and written), products {rates}"
    yield ""


def _correctness(data: Mapping[str, Any]) -> Iterator[str]:
    yield "## Tests"
    yield ""
    tests = data.get("tests")
    if tests is None:
        yield "Not run."
    else:
        kinds = ", ".join(f"{name} {count}" for name, count in tests["passed_by_type"].items())
        yield (
            f"{tests['passed']} passed ({kinds}), {tests['failed']} failed, {tests['skipped']} skipped in "
            f"{tests['seconds']:.0f} s{'' if tests['finished'] else ', not finished'}; seed {tests['seed']}."
        )
        yield from (f"- failed: `{name}`" for name in tests["failures"])
    sanitizer = data.get("sanitize")
    if sanitizer is not None:
        verdict = {True: "clean", False: "FAULTS FOUND", None: "not finished"}[sanitizer["clean"]]
        if not sanitizer["present"]:
            verdict = "not present on this machine, so run without it" if data["rehearsal"] else "not present"
        yield ""
        yield f"compute-sanitizer memcheck: {verdict}; {len(sanitizer.get('checked', []))} cases."
        if sanitizer["clean"] is False:
            yield from ("", "```text", *sanitizer["tail"], "```")
    yield ""


def _targets(rows: Sequence[Mapping[str, Any]], machine: Machine | None) -> Iterator[str]:
    yield "## Targets"
    yield ""
    lines = []
    for row in rows:
        for target in (Target(**found) for found in row["targets"]):
            verdict = judge(target, row, machine)
            lines.append((row["operation"], row["case"], target.text, reached_text(target, verdict), verdict.text))
    yield from table(("operation", "case", "target", "reached", "verdict"), lines, left=3)
    yield ""


def reached_text(target: Target, verdict: Verdict) -> str:
    if verdict.value is None:
        return "—"
    if target.kind == "bandwidth":
        return f"{100 * verdict.value:.1f} %"
    return f"{verdict.value:.0f}" if target.kind == "launches" else f"{verdict.value:.2f}"


def _operation(operation: str, rows: Sequence[Mapping[str, Any]], machine: Machine | None) -> Iterator[str]:
    """Bound, ours with its percentiles and share of the bound, and every other contender with our speed over it."""
    names = dict.fromkeys(name for row in rows for timed in row["seconds"].values() for name in timed)
    others = [name for name in names if name not in (OURS, COMPILED)] + [COMPILED] * (COMPILED in names)
    yield f"## {operation}"
    yield ""
    yield f"µs a call: median (10th to 90th percentile); beside the others, how many times as fast {OURS} is."
    yield ""
    lines = []
    for row in rows:
        for variant, timed in row["seconds"].items():
            lines.append(_line(row, variant, timed, others, machine))
    header = ("case", "variant", "bound", f"**{OURS}**", "of the bound", *others, "launches", "error")
    yield from table(header, lines, left=2)
    notes = [f"{row['case']}: {name}: {text}" for row in rows for name, text in row["notes"].items()]
    if notes:
        yield ""
        yield from (f"- {note}" for note in notes)
    yield ""


def _line(
    row: Mapping[str, Any],
    variant: str,
    timed: Mapping[str, Mapping[str, float]],
    others: Sequence[str],
    machine: Machine | None,
) -> list[str]:
    ours = timed.get(OURS)
    bound, share, mine = "—", "—", "failed"
    if machine is not None:
        dtype = element_type(row["dtype"])
        bound = f"{microseconds(machine.seconds(_work(row), dtype))} ({machine.limit(_work(row), dtype)})"
        if ours is not None:
            share = f"{100 * machine.share(_work(row), dtype, ours['median']):.0f} %"
    if ours is not None:
        mine = f"**{microseconds(ours['median'])}** ({microseconds(ours['p10'])} to {microseconds(ours['p90'])})"
    cells = []
    for name in others:
        seconds = median(row, name, variant)
        faster = f" ({seconds / ours['median']:.2f}x)" if seconds is not None and ours is not None else ""
        cells.append("—" if seconds is None else microseconds(seconds) + faster)
    launches = row["launches"].get(OURS)
    error = "—" if "error" not in row else f"{row['error']:.1e}" + " WRONG" * is_wrong(row)
    counted = "—" if launches is None else str(launches)
    return [row["case"], VARIANTS[variant], bound, mine, share, *cells, counted, error]


def _tuning(tuning: Mapping[str, Any]) -> Iterator[str]:
    yield "## Tuning"
    yield ""
    yield "The best configuration found beside the frozen one; a proposal, nothing was changed."
    yield ""
    lines = []
    for row in tuning["cases"]:
        frozen = next(entry for entry in row["tried"] if entry["frozen"])
        time = microseconds(frozen["seconds"]["median"]) if "seconds" in frozen else "failed"
        lines.append((row["operation"], row["case"], f"`{frozen['text']}`", time, summary(row)))
    yield from table(("operation", "case", "frozen", "µs", "result"), lines, left=3)
    failed = [
        f"{row['operation']}, {row['case']}: `{entry['text']}`: {entry['note']}"
        for row in tuning["cases"]
        for entry in row["tried"]
        if "note" in entry and not entry["note"].startswith("not tried")
    ]
    if failed:
        yield ""
        yield from (f"- {line}" for line in failed)
    if tuning["not_tuned"]:
        yield from ("", f"Not tuned, for want of time if nothing else is said: {'; '.join(tuning['not_tuned'])}.")
    yield ""


def predictions(cases: Sequence[Case], results: Results | None = None) -> Iterator[str]:
    """The table of csrc_notes/predictions.md: bounds by arithmetic, targets, and what was measured where it was."""
    yield "# Predictions and outcomes"
    yield ""
    copy, product = H200.bytes_per_second / 1e12, H200.flops_per_second[torch.bfloat16] / 1e12
    yield "Written by `python -m benchmarks.gpu --predict`, from the cases that the benchmark times. The bound is"
    yield f"arithmetic: the work of each operation's `work.py` at an H200's {copy:g} TB/s of copy bandwidth and"
    yield f"{product:g} TFLOP/s of bf16 products. It knows nothing of launches, each of which takes a few microseconds:"
    yield "for few rows no kernel comes near it, and their targets are relative. `--out DIR` fills the measured column"
    yield "from the results in DIR."
    rows = {} if results is None else {(row["operation"], row["case"]): row for row in results.data.get("cases", [])}
    machine = None if results is None else results.machine
    for operation in dict.fromkeys(case.operation for case in cases):
        yield from ("", f"## {operation}", "")
        lines = []
        for case in (case for case in cases if case.operation == operation):
            row = rows.get((case.operation, case.label))
            seconds = H200.seconds(case.work, case.dtype)
            lines.append(
                (
                    case.label,
                    f"{case.work.bytes / 1e6:.3g}",
                    f"{case.work.flops / 1e9:.3g}",
                    f"{microseconds(seconds)} ({H200.limit(case.work, case.dtype)})",
                    "; ".join(target.text for target in case.targets) or "—",
                    "no device yet" if row is None else _measured(row, case, machine),
                )
            )
        header = ("case", "MB", "GFLOP", "bound, µs", "target", "measured")
        yield from table(header, lines)


def _measured(row: Mapping[str, Any], case: Case, machine: Machine | None) -> str:
    found = [
        f"{microseconds(seconds)} µs{' in a graph' if variant == 'graph' else ''}"
        for variant in row["seconds"]
        if (seconds := median(row, OURS, variant)) is not None
    ]
    verdicts = [judge(target, row, machine).text for target in case.targets]
    return "; ".join(found + verdicts) or "failed"
