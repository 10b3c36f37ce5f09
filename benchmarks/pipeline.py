"""`python -m benchmarks.pipeline`: the whole method beside `benchmarks/plain.py`, stage by stage, in turn.

Each stage gets the same inputs in both: the same examples, prompts, completions, adapter and questions. Round by round
both run it, in alternating order; a ratio is taken within a round. Sampled lengths differ, so generation is compared by
the token. The whole run is the sum of the four stages, plain generation for as many tokens as ours sampled, without
loading the model, which both do once.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

import spd
from benchmarks.contenders import ARMS, Ours, Plain, Setting, prepare, proving_ground, qwen2, warm_up
from benchmarks.timing import Timing, compare, machine
from spd.files import atomic_file, write_json, write_text
from spd.gradients import GradientSums, correctness_loss
from spd.likelihood import padded
from spd.model_state import frozen
from spd.plots import INK, MUTED, blank_figure
from spd.sites import choose_layers, depth, find_sites
from spd.spans import encode_examples

PLAIN, OURS = "plain", "spd"
TARGETS = {"calibration": 2.0, "generation": 2.5, "training": 2.5, "evaluation": 6.0, "whole run": 4.0}
STAGES = tuple(TARGETS)[:4]
TAP_LIMIT = 1.10
OVERLAP, LOSS = 1e-4, 1e-5

SETTINGS = {
    "proving-ground": Setting(proving_ground, examples=50, prompts=96, questions=48, epochs=2),
    "qwen2-100m": Setting(qwen2, examples=16, prompts=32, questions=12, epochs=1, new_tokens=32),
}
QUICK = {
    "proving-ground": Setting(proving_ground, examples=16, prompts=32, questions=16, epochs=1),
    "qwen2-100m": Setting(qwen2, examples=8, prompts=16, questions=4, epochs=1, new_tokens=8),
}


class Stopwatch:
    """Seconds of a call, on a GPU until its work is done."""

    def __init__(self, device: str, clock: Callable[[], float]) -> None:
        self.device, self.clock = device, clock

    def __call__(self, call: Callable[[], Any]) -> tuple[float, Any]:
        self._wait()
        start = self.clock()
        result = call()
        self._wait()
        return self.clock() - start, result

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()


def measure(
    setting: Setting, rounds: int, device: str, clock: Callable[[], float], say: Callable[[str], None]
) -> dict[str, Any]:
    """Every figure of one model, as it goes into the JSON file."""
    stopwatch = Stopwatch(device, clock)
    with tempfile.TemporaryDirectory(prefix="spd-pipeline-") as name:
        folder = Path(name)
        model, tokenizer = setting.make(device)
        inputs = prepare(setting, model, tokenizer, folder)
        theirs, ours = Plain(setting, inputs, device), Ours(setting, inputs, model, tokenizer, folder)
        contenders: dict[str, Any] = {PLAIN: theirs, OURS: ours}
        warm_up(theirs)
        warm_up(ours)
        seconds: dict[str, dict[str, list[float]]] = {stage: {PLAIN: [], OURS: []} for stage in STAGES}
        frozen_seconds: list[float] = []
        speeds: dict[str, list[float]] = {}
        results: dict[str, dict[str, Any]] = {}

        def sample(label: str, contender: Any, project: bool) -> tuple[float, int]:
            taken, tokens = stopwatch(partial(contender.generation, project=project))
            speeds.setdefault(label, []).append(tokens / taken)
            return taken, tokens

        for number in range(rounds):
            order = (PLAIN, OURS) if number % 2 == 0 else (OURS, PLAIN)
            for stage in STAGES:
                for who in order:
                    if stage == "generation":
                        taken, result = sample(f"{who}, projected", contenders[who], True)
                        sample(f"{who}, unprojected", contenders[who], False)
                    else:
                        taken, result = stopwatch(getattr(contenders[who], stage))
                    seconds[stage][who].append(taken)
                    results.setdefault(stage, {})[who] = result
                if stage == "calibration":
                    frozen_seconds.append(stopwatch(partial(theirs.calibration, freeze=True))[0])
                say(
                    f"round {number + 1} of {rounds}, {stage}: "
                    + ", ".join(f"{who} {seconds[stage][who][-1]:.2f} s" for who in contenders)
                )

        ratios = {
            stage: [a / b for a, b in zip(seconds[stage][PLAIN], seconds[stage][OURS], strict=True)] for stage in STAGES
        }
        ratios["generation"] = [
            a / b for a, b in zip(speeds[f"{OURS}, projected"], speeds[f"{PLAIN}, projected"], strict=True)
        ]
        as_many_tokens = [a * b for a, b in zip(ratios["generation"], seconds["generation"][OURS], strict=True)]
        summed = {who: {stage: seconds[stage][who] for stage in STAGES} for who in contenders}
        summed[PLAIN]["generation"] = as_many_tokens
        seconds["whole run"] = {
            who: [sum(parts) for parts in zip(*stages.values(), strict=True)] for who, stages in summed.items()
        }
        ratios["whole run"] = [a / b for a, b in zip(*seconds["whole run"].values(), strict=True)]
        frozen_ratio = [a / b for a, b in zip(frozen_seconds, seconds["calibration"][OURS], strict=True)]
        return {
            "setting": {name: value for name, value in asdict(setting).items() if name != "make"},
            "parameters": sum(parameter.numel() for parameter in ours.model.parameters()),
            "rounds": rounds,
            "stages": {
                stage: {
                    "seconds": seconds[stage],
                    "ratios": ratios[stage],
                    "ratio": asdict(Timing.of(ratios[stage])),
                    "target": target,
                    "met": Timing.of(ratios[stage]).median >= target,
                }
                for stage, target in TARGETS.items()
            },
            "calibration beside frozen weights": {"seconds": frozen_seconds, "ratio": asdict(Timing.of(frozen_ratio))},
            "tokens_per_second": speeds,
            "tap": tap_overhead(ours.model, ours.tokenizer, inputs.examples[:8], stopwatch),
            "checks": checks(theirs, ours, results),
        }


def tap_overhead(model: Any, tokenizer: Any, examples: list[spd.Example], stopwatch: Stopwatch) -> dict[str, Any]:
    """A batch forward and backward down to K and V of the lowest layer, bare, and with its rows summed up."""
    sites = find_sites(model)
    chosen = [sites[layer] for layer in choose_layers(sites, "paper", depth(model))]
    batch = [example for example in encode_examples(tokenizer, examples, max_length=256) if example.targets]
    tokens, real = padded([example.tokens for example in batch], model.device)
    sums = GradientSums(model, chosen)

    def bare() -> None:
        lowest = [getattr(chosen[0], side).module for side in "kv"]
        handles = [
            module.register_forward_hook(lambda module, args, output: output.detach().requires_grad_())
            for module in lowest
        ]
        try:
            correctness_loss(model, batch, tokens, real).backward()
        finally:
            for handle in handles:
                handle.remove()

    def clock(call: Callable[[], object], repeats: int) -> float:
        return sum(stopwatch(call)[0] for _ in range(repeats)) / repeats

    with frozen(model):
        found = compare(
            {"bare": bare, "tapped": lambda: sums.add(sums.rows_of(batch))}, rounds=60, at_most=20.0, clock=clock
        )
    ratio = found.ratios["tapped"]
    seconds = {name: asdict(timing) for name, timing in found.timings.items()}
    return {"seconds": seconds, "ratio": asdict(ratio), "limit": TAP_LIMIT, "met": ratio.median <= TAP_LIMIT}


def checks(theirs: Plain, ours: Ours, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Whether both came to the same: subspace, answers, and the loss of a first step without dropout."""
    bases, subspace = results["calibration"][PLAIN], results["calibration"][OURS]
    overlap = min(
        float((u.T @ subspace.side(side)[layer].basis).square().sum()) / u.shape[1]
        for (layer, side), u in bases.items()
    )
    pairs = [
        (a, b)
        for arm, answers in results["evaluation"][PLAIN].items()
        for a, b in zip(answers, results["evaluation"][OURS][arm], strict=True)
    ]
    same = sum(a == b for a, b in pairs)
    losses = [each.training(texts=4, epochs=1, lora_dropout=0.0)[0] for each in (theirs, ours)]
    return {
        "subspace": {"least overlap": overlap, "met": abs(overlap - 1) <= OVERLAP},
        "greedy answers": {"same": same, "of": len(pairs), "met": same == len(pairs)},
        "loss of the first step": {"plain": losses[0], "spd": losses[1], "met": abs(losses[0] - losses[1]) <= LOSS},
    }


def tables(name: str, figures: dict[str, Any]) -> list[Table]:
    """What the terminal shows of one model."""
    labelled = range_label(figures["rounds"])
    stages = Table(title=f"{name}, {figures['parameters'] / 1e6:.1f} M parameters", title_justify="left")
    for column in ("stage", "plain s", "ours s", f"times as fast {labelled}", "target", "met"):
        stages.add_column(column, justify="left" if column == "stage" else "right", no_wrap=True)
    for stage, row in figures["stages"].items():
        theirs, ours = (Timing.of(row["seconds"][who]).median for who in (PLAIN, OURS))
        note = " (by token)" if stage == "generation" else ""
        stages.add_row(
            stage + note, f"{theirs:.2f}", f"{ours:.2f}", spread(row["ratios"]), f"{row['target']:g}", met(row["met"])
        )
        if stage == "calibration":
            frozen_weights = figures["calibration beside frozen weights"]
            theirs = Timing.of(frozen_weights["seconds"]).median
            ratios = [a / b for a, b in zip(frozen_weights["seconds"], row["seconds"][OURS], strict=True)]
            stages.add_row("  beside frozen weights", f"{theirs:.2f}", "", spread(ratios), "", "")

    speeds = Table(title="Generation", title_justify="left")
    for column in ("", "tokens/s", f"beside generate at batch 8 {labelled}"):
        speeds.add_column(column, justify="left" if not column else "right", no_wrap=True)
    reference = figures["tokens_per_second"][f"{PLAIN}, unprojected"]
    for label, rates in figures["tokens_per_second"].items():
        ratios = [a / b for a, b in zip(rates, reference, strict=True)]
        speeds.add_row(label, f"{Timing.of(rates).median:.0f}", spread(ratios))

    setting = figures["setting"]
    stages.caption = (
        f"{setting['examples']} examples, {setting['prompts']} prompts, {setting['new_tokens']} new tokens, "
        f"{setting['epochs']} epochs, {len(ARMS)} evaluations of {setting['questions']}; rounds: {figures['rounds']}; "
        "the whole run has plain generation for as many tokens as ours sampled"
    )
    tap, found = figures["tap"], figures["checks"]
    same, losses = found["greedy answers"], found["loss of the first step"]
    beside_bare = f"{percentiles(tap['ratio'])}, at most {tap['limit']:g}"
    agreement = Table(title="The same result, and what taps cost", title_justify="left")
    for column in ("", "found", "met"):
        agreement.add_column(column, no_wrap=True)
    for label, text, ok in (
        ("subspace: least overlap", f"{found['subspace']['least overlap']:.7f}", found["subspace"]["met"]),
        ("greedy answers alike", f"{same['same']} of {same['of']}", same["met"]),
        ("loss of the first step", f"{losses['plain']:.6f}, {losses['spd']:.6f}", losses["met"]),
        ("calibration beside bare passes \\[p10, p90]", beside_bare, tap["met"]),
    ):
        agreement.add_row(label, text, met(ok))
    return [stages, speeds, agreement]


def markdown(table: Table) -> str:
    """The same table for a document."""
    rows = [[str(column.header) for column in table.columns]]
    rows.append(["---" if column.justify == "left" else "--:" for column in table.columns])
    rows += [list(map(str, row)) for row in zip(*(column.cells for column in table.columns), strict=True)]
    lines = ["| " + " | ".join(row).replace("\\[", "[") + " |" for row in rows]
    return "\n".join([f"**{table.title}**", "", *lines, *(["", str(table.caption)] if table.caption else [])])


def range_label(rounds: int) -> str:
    return f"\\[least, most of {rounds}]"


def spread(ratios: Sequence[float]) -> str:
    """Median, least and most: rounds are too few for percentiles."""
    return f"{Timing.of(list(ratios)).median:.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"


def percentiles(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} [{ratio['p10']:.2f}, {ratio['p90']:.2f}]"


def met(value: bool) -> str:
    return "yes" if value else "no"


def draw(path: Path, models: dict[str, dict[str, Any]], caption: str) -> None:
    """How many times as fast every stage is, from the least of the rounds to the most; the targets as dashes."""
    figure, axes = blank_figure(4.6, 3.4, len(models))
    for axis, (name, figures) in zip(axes, models.items(), strict=True):
        for place, row in enumerate(figures["stages"].values()):
            ratio = row["ratio"]
            axis.bar(place, ratio["median"], width=0.62, color="#1d4ed8" if row["met"] else "#9aa5b1")
            axis.vlines(place, min(row["ratios"]), max(row["ratios"]), color=INK, linewidth=1.2)
            axis.hlines(row["target"], place - 0.4, place + 0.4, color="#d97706", linewidth=1.6, linestyle=(0, (3, 2)))
            label = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "color": "white"}
            axis.annotate(f"{ratio['median']:.1f}", (place, 0), **label)
        axis.axhline(1, color=MUTED, linewidth=0.8, zorder=0)
        axis.set_xticks(range(len(figures["stages"])), list(figures["stages"]), rotation=20)
        axis.set_title(f"{name}, {figures['parameters'] / 1e6:.1f} M", loc="left", fontsize=9.5, fontweight="bold")
    axes[0].set_ylabel("times as fast as plain.py")
    figure.supxlabel(caption, fontsize=7.5, color=MUTED)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=140)


def in_words(machine: dict[str, Any]) -> str:
    on_cpu = "CPU" in machine["device"]
    return f"{machine['device']}, {machine['processor']}" if on_cpu else machine["device"]


def publish(out: Path, stem: str, figures: dict[str, Any]) -> None:
    """The tables and the figure of what was measured."""
    facts = figures["machine"]
    caption = in_words(facts)
    setting_in_words = f"{caption}; " + ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    seconds = "CPU" if figures["clock"] == "cpu" else "wall-clock"
    shown = [markdown(table) for name, model in figures["models"].items() for table in tables(name, model)]
    document = [f"{setting_in_words}; seconds of {seconds} time, medians.", *shown]
    draw(out / f"{stem}.png", figures["models"], caption)
    write_text(out / "table.md", "\n\n".join(document) + "\n")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' bars and warnings, such as that a random model's subspace lacks directions."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def main(
    model: Annotated[str, typer.Option(help=f"{', '.join(SETTINGS)}, or all.")] = "all",
    rounds: Annotated[
        int | None, typer.Option(min=1, help="How often each runs every stage.", show_default="3, with --quick 1")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: to see that it runs, not to quote.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="Seconds of this process's CPU time, for a busy machine.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for DEVICE.json, DEVICE.png and table.md.")] = Path(
        "benchmarks/results/pipeline"
    ),
) -> None:
    """Time the whole method beside a plain implementation of it, stage by stage; about ten minutes on two cores."""
    if model not in ("all", *SETTINGS):
        raise typer.BadParameter(f"expected all or one of {', '.join(SETTINGS)}, got {model!r}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    console = Console()
    console.width = max(console.width, 110)  # rather than cut figures
    facts = machine()
    if device.startswith("cuda"):
        facts["device"] = torch.cuda.get_device_name(device)
    console.print(f"{in_words(facts)}: {facts['versions']}")
    figures: dict[str, Any] = {"machine": facts, "quick": quick, "clock": "cpu" if cpu_time else "wall", "models": {}}
    settings, rounds = (QUICK, rounds or 1) if quick else (SETTINGS, rounds or 3)
    clock = time.process_time if cpu_time else time.perf_counter
    for name in settings if model == "all" else [model]:
        with quiet():
            figures["models"][name] = measure(
                settings[name],
                rounds,
                device,
                clock,
                say=lambda line: console.print(f"[dim]{line}[/]", highlight=False),
            )
        for table in tables(name, figures["models"][name]):
            console.print(table)
        stem = device.partition(":")[0]
        write_json(out / f"{stem}.json", figures)
        publish(out, stem, figures)
    console.print(f"figures: {out}")


if __name__ == "__main__":
    typer.run(main)
