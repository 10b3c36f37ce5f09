"""`python -m benchmarks.planner`: is the mode that the planner picks the fastest, or near it?

Each case is one attention layer of Llama's kind, with random weights, the hooks and cache layers that `spd.attach`
and transformers put there, and a cache filled with random numbers to the context. A step of every mode is timed in
turn, round by round, its operands not in the processor's caches, and compared with what the planner picks for such a
layer from the machine's constants, which know nothing of these cases.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import spd
from benchmarks.timing import machine as description
from spd.files import write_json
from spd.intervention.machine import FORMS, Machine, Stopwatch, load
from spd.intervention.planner import predict, shape_of
from spd.intervention.target import Form

# kv_heads and head_dim by d; four query heads share a key head, as in Llama 3 and Mistral.
SHAPES = {128: (2, 64), 256: (2, 128), 512: (4, 128), 1024: (8, 128)}
GROUP = 4
CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768)
SHORT_CONTEXTS = (64, 256)  # below the lengths that count: where folding should win
HIDDEN = 512
GOOD = 0.10  # slower than the fastest, at most

# A latent layer that is filled has room for 16 more tokens; two steps warm up.
MOST_ROUNDS, LEAST_ROUNDS, SECONDS_A_CASE = 13, 3, 1.5


@dataclass(frozen=True)
class Case:
    d: int
    rank: int
    context: int

    def __str__(self) -> str:
        return f"d {self.d}, r {self.rank}, {self.context} tokens"


@dataclass(frozen=True)
class Result:
    """Seconds of a layer's step by mode: medians of the rounds, their minima, and predicted."""

    case: Case
    picked: Form
    fastest: Form
    ratio: float  # of the picked mode's time to the fastest's, the median of the rounds
    medians: dict[str, float]
    least: dict[str, float]
    predicted: dict[str, float]
    rounds: int

    @property
    def good(self) -> bool:
        return self.ratio <= 1 + GOOD


def grid(quick: bool) -> Iterator[Case]:
    contexts = (256, 1024, 8192) if quick else (*SHORT_CONTEXTS, *CONTEXTS)
    for d, context in itertools.product(SHAPES, contexts):
        for rank in sorted({16, d // 2} if quick else {16, d // 8, d // 4, d // 2}):
            yield Case(d, rank, context)


class Layer:
    """One attention layer under one mode, its cache filled."""

    def __init__(self, case: Case, mode: Form) -> None:
        from transformers import DynamicCache

        self.model: Any = _model(case.d)
        self._attached = spd.attach(self.model, subspace(case), mode=mode)
        self._attention = self.model.model.layers[0].self_attn
        self._cache = DynamicCache(config=self.model.config)
        self._position = 0
        with torch.inference_mode():
            self._prepare(1)
            self.step()
            layer: Any = self._cache.layers[0]
            layer.keys, layer.values = (
                torch.randn(*each.shape[:2], case.context, each.shape[3]) for each in (layer.keys, layer.values)
            )
            if getattr(layer, "positions", None) is not None:
                layer.positions = torch.arange(case.context, dtype=torch.int32).view(1, 1, -1, 1)
            self._position = case.context

    def prepare(self) -> None:
        self._prepare(1)

    def _prepare(self, tokens: int) -> None:
        self._hidden = torch.randn(1, tokens, HIDDEN)
        self._positions = torch.arange(self._position, self._position + tokens)[None]
        self._angles = self.model.model.rotary_emb(self._hidden, self._positions)
        self._position += tokens

    def step(self) -> None:
        self._attention(
            self._hidden,
            position_embeddings=self._angles,
            attention_mask=None,
            past_key_values=self._cache,
            position_ids=self._positions,
        )

    def close(self) -> None:
        self._attached.remove()


def subspace(case: Case) -> spd.Subspace:
    u = torch.linalg.qr(torch.randn(case.d, case.rank)).Q.contiguous()
    basis = spd.Basis(u, torch.ones(case.d, dtype=torch.float64))
    return spd.Subspace({0: basis}, {0: basis})


def run_case(case: Case, constants: Machine, watch: Stopwatch) -> Result:
    layers = {mode: Layer(case, mode) for mode in FORMS}
    try:
        seconds = _rounds(layers, watch)
    finally:
        for layer in layers.values():
            layer.close()
    model = layers["fold"].model
    attention = model.model.layers[0].self_attn
    weights = sum(each.numel() * each.element_size() for each in attention.parameters())
    # The layer alone is the model: no embedding, no head, nothing around it.
    shape = replace(shape_of(model, subspace(case), torch.float32), read_bytes=weights)
    predictions = predict(shape, replace(constants, step=0.0), case.context, 1)
    picked = predictions[0].mode
    medians: dict[str, float] = {mode: median(values) for mode, values in seconds.items()}
    fastest = min(seconds, key=medians.__getitem__)
    return Result(
        case=case,
        picked=picked,
        fastest=fastest,
        ratio=median(a / b for a, b in zip(seconds[picked], seconds[fastest], strict=True)),
        medians=medians,
        least={mode: min(values) for mode, values in seconds.items()},
        predicted={each.mode: each.seconds for each in predictions},
        rounds=len(seconds[picked]),
    )


@torch.inference_mode()
def _rounds(layers: dict[Form, Layer], watch: Stopwatch) -> dict[Form, list[float]]:
    seconds: dict[Form, list[float]] = {mode: [] for mode in layers}
    started = time.perf_counter()
    for number in range(2 + MOST_ROUNDS):
        for mode in layers if number % 2 == 0 else reversed(layers):
            layers[mode].prepare()
            seconds[mode].append(watch(layers[mode].step))
        if number == 1:
            seconds, started = {mode: [] for mode in layers}, time.perf_counter()
        elif number >= 1 + LEAST_ROUNDS and time.perf_counter() - started > SECONDS_A_CASE:
            break
    return seconds


def _model(d: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    kv_heads, head_dim = SHAPES[d]
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=HIDDEN,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=GROUP * kv_heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=2 * max(CONTEXTS),
    )
    return LlamaForCausalLM(config).eval()


def table_of(results: list[Result]) -> Table:
    table = Table(title="One layer's decode step, ms: median (predicted)", title_justify="left", header_style="bold")
    for name in ("d", "r", "context", *FORMS, "picked", "fastest", "picked / fastest"):
        table.add_column(name, justify="left" if name in ("picked", "fastest") else "right", no_wrap=True)
    for each in results:
        times = [f"{1e3 * each.medians[mode]:.2f} ({1e3 * each.predicted[mode]:.2f})" for mode in FORMS]
        ratio = f"{each.ratio:.2f}" if each.good else f"[bold]{each.ratio:.2f}[/bold]"
        case = each.case
        table.add_row(str(case.d), str(case.rank), str(case.context), *times, each.picked, each.fastest, ratio)
    return table


def share_of(results: list[Result], keep: Callable[[Case], bool]) -> dict[str, Any]:
    """How many picks are good, and how many would be if one mode were always picked."""
    kept = [each for each in results if keep(each.case)]
    good = sum(each.good for each in kept)
    always = {
        mode: sum(each.medians[mode] <= (1 + GOOD) * each.medians[each.fastest] for each in kept) for mode in FORMS
    }
    return {"cases": len(kept), "good": good, "share": good / max(1, len(kept)), "always": always}


def main(
    out: Annotated[Path, typer.Option(help="JSON file for the figures.")] = Path("benchmarks/results/planner-cpu.json"),
    quick: Annotated[bool, typer.Option(help="A few cases.")] = False,
    refresh: Annotated[bool, typer.Option(help="Measure the machine's constants anew.")] = False,
) -> None:
    """Compare the planner's choice with measured steps over a grid of d, rank and context."""
    torch.manual_seed(0)
    console = Console()
    console.width = max(console.width, 140)
    constants = load("cpu", torch.float32, refresh=refresh)
    watch = Stopwatch(torch.device("cpu"))
    results: list[Result] = []
    started = time.perf_counter()
    cases = list(grid(quick))
    with console.status("") as status:
        for case in cases:
            status.update(f"{len(results)} of {len(cases)}: {case}")
            results.append(run_case(case, constants, watch))
    console.print(table_of(results))
    shares = {
        "1k to 32k tokens": share_of(results, lambda case: case.context >= min(CONTEXTS)),
        "below": share_of(results, lambda case: case.context < min(CONTEXTS)),
    }
    for name, found in shares.items():
        always = ", ".join(f"{mode} {count}" for mode, count in found["always"].items())
        console.print(
            f"{name}: {found['good']} of {found['cases']} picks within {100 * GOOD:.0f} % of the fastest; "
            f"always the same mode: {always}"
        )
    write_json(
        out,
        {
            "machine": description(),
            "quick": quick,
            "clock": "thread's own time" if torch.get_num_threads() == 1 else "wall",
            "seconds": time.perf_counter() - started,
            "constants": asdict(constants),
            "within": GOOD,
            "shares": shares,
            "cases": [asdict(each) | {"good": each.good} for each in results],
        },
    )
    console.print(f"figures: {out}")


if __name__ == "__main__":
    typer.run(main)
