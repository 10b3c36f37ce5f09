"""`python -m benchmarks.memory`: what calibration holds in memory, against the number of gradient rows.

Measured: a model with an 8B's widths but two layers and few words, all layers attached, and the peak of its process for
each number of rows; beside the same passes with all rows kept and their SVD. Computed: the whole shape of 32 layers,
whose pass runs on tensors without storage while the bytes that would be alive are counted; the same count for the small
shape stands beside what was measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
import weakref
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import spd
from benchmarks.timing import machine
from spd.files import atomic_file, write_json
from spd.gradients import GradientSums
from spd.model_state import frozen
from spd.models import load_tokenizer
from spd.plots import GRID, INK, MUTED, blank_figure
from spd.profile import forget_peak, peak_bytes
from spd.sites import find_sites
from spd.spans import EncodedExample, encode_examples

METHODS = ("calibrate", "keep all rows")
# What is measured of the second has the SVD in it; what is computed has the rows alone.
MEASURED = dict(zip(METHODS, ("calibrate", "keep all rows, with the SVD"), strict=True))
COMPUTED = dict(zip(METHODS, ("calibrate", "keep all rows, without the SVD"), strict=True))
COLOURS = dict(zip(METHODS, ("#1d4ed8", "#d97706"), strict=True))
# Batches. In the first pass there are no sums yet, so that the smallest number is two.
TIMES = (2, 8, 32)
MIB, GIB = 2**20, 2**30
CPU = torch.device("cpu")

WIDTHS: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
WHOLE = WIDTHS | {"num_hidden_layers": 32, "vocab_size": 128256}
SHAPES: dict[str, dict[str, Any]] = {
    "two layers of an 8B": WIDTHS | {"num_hidden_layers": 2, "vocab_size": 1024},
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": 1024,
    },
}
# Measured: texts in a batch, and tokens of each, which but for the first all count for the loss.
BATCH, TOKENS = 2, 64
# Computed: the same, and how many tokens of a text count for the loss, as a span's few do; every token has a row.
WHOLE_BATCH, WHOLE_TOKENS, WHOLE_SPAN = 8, 256, 8
WHOLE_EXAMPLES = (50, 500, 5000)


def model_of(shape: dict[str, Any]) -> nn.Module:
    """A bfloat16 Llama whose weights are small noise, the same block of it again and again."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape, max_position_embeddings=1024, dtype=torch.bfloat16)
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config).eval()
    model.to_empty(device="cpu")
    noise = 0.02 * torch.randn(2**16, generator=torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        for part in parameter.data.view(-1).split(2**16):
            part.copy_(noise[: len(part)] if parameter.ndim > 1 else torch.ones(len(part)))
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def texts(count: int) -> list[spd.Example]:
    """Texts that are longer than they will be cut to."""
    words = ["red", "blue", "green", "stone", "river", "cloud", "seven", "door", "light", "paper"]
    rng = Random(0)
    return [spd.Example(" ".join(rng.choices(words, k=2 * TOKENS)), " end") for _ in range(count)]


def measure(method: str, shape: str, times: tuple[int, ...]) -> list[dict[str, float]]:
    """For each number of batches the rows, and how far this process's resident memory rose above the loaded model's.

    Bytes; that of the libraries' own set-up is left out by a first, small calibration.
    """
    warnings.simplefilter("ignore")
    model, (tokenizer, _) = model_of(SHAPES[shape]), load_tokenizer("proving-ground")
    settings: dict[str, Any] = {"layers": "all", "loss": "full", "progress": False}
    spd.calibrate(model, tokenizer, texts(1), max_length=8, **settings)
    before, found = _peak_from_here(), []
    for count in times:
        given = texts(BATCH * count)
        _peak_from_here()
        if method == METHODS[0]:
            subspace = spd.calibrate(model, tokenizer, given, batch_size=BATCH, max_length=TOKENS, **settings)
            rows, first = subspace.provenance["rows"], float(subspace.k[0].singular_values[0])
        else:
            rows, first = keep_all_rows(model, encode_examples(tokenizer, given, max_length=TOKENS, full=True))
        found.append({"rows": rows, "bytes": _peak() - before, "first": first})
    return found


def keep_all_rows(model: nn.Module, examples: list[EncodedExample]) -> tuple[int, float]:
    """The same passes, then one SVD a site; the number of rows, and the first singular value of the first site."""
    sums = GradientSums(model, list(find_sites(model).values()))
    kept: dict[Any, list[torch.Tensor]] = {}
    with frozen(model):
        for start in range(0, len(examples), BATCH):
            for place, seen in sums.rows_of(examples[start : start + BATCH]).seen.items():
                kept.setdefault(place, []).extend(g[mask].float() for g, mask in seen)
    values = {}
    for place in list(kept):
        rows = torch.cat(kept[place])
        values[place] = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)[1]
    return len(rows), float(values[0, "k"][0])


def _peak_from_here() -> int:
    """Bytes that are resident now; later peaks are of what comes."""
    if not forget_peak(CPU):
        raise OSError("the system does not let a process's peak memory be forgotten; measured on Linux alone")
    return _peak()


def _peak() -> int:
    peak = peak_bytes(CPU)
    assert peak is not None
    return peak


class Alive(TorchDispatchMode):
    """Counts the bytes that operations allocate and that are still referred to; `most` is their peak."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known = weakref.WeakSet(parameter.untyped_storage() for parameter in model.parameters())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def _freed(self, count: int) -> None:
        self.now -= count


def computed(
    shape: dict[str, Any], batch: int, tokens: int, span: int, *, gradient_checkpointing: bool = False
) -> dict[str, int]:
    """Bytes of the weights, of one batch's pass at its peak, of the sums at all sites, and of one row at all sites.

    The model and the pass over it have shapes and lifetimes but no storage. A row is as `keep_all_rows` keeps it, fp32.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    texts_of = [EncodedExample(n, [1] * tokens, list(range(tokens - span, tokens)), 0, 0) for n in range(batch)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = LlamaForCausalLM._from_config(LlamaConfig(**shape, dtype=torch.bfloat16)).eval()
        sites = list(find_sites(model).values())
        sums = GradientSums(model, sites, gradient_checkpointing=gradient_checkpointing)
        with frozen(model), Alive(model) as alive:
            sums.forward_backward(texts_of)
        weights = sum(parameter.nbytes for parameter in model.parameters())
    d = sites[0].width
    return {
        "weights": weights,
        "pass": alive.most,
        "sums": 2 * len(sites) * 8 * (d * d + d + 1),
        "row": 2 * len(sites) * 4 * d,
    }


def measured_table(shape: str, found: dict[str, list[dict[str, float]]], expected: dict[str, int]) -> Table:
    title = (
        f"Measured: {shape}, bfloat16, above {expected['weights'] / MIB:.0f} MiB of weights, {BATCH} x {TOKENS} tokens"
    )
    table = Table(title=title, title_justify="left")
    for column in (
        "rows",
        *(f"{MEASURED[method]}, MiB" for method in METHODS),
        "one pass and sums, computed",
        "rows, computed",
    ):
        table.add_column(column, justify="right")
    flat = (expected["pass"] + expected["sums"]) / MIB
    for ours, kept in zip(*found.values(), strict=True):
        rows = int(ours["rows"])
        peaks = [f"{each['bytes'] / MIB:.0f}" for each in (ours, kept)]
        table.add_row(f"{rows:,}", *peaks, f"{flat:.0f}", f"{rows * expected['row'] / MIB:.0f}")
    return table


def whole_table(plain: dict[str, int], again: dict[str, int]) -> Table:
    title = f"Computed, nothing allocated: an 8B, all 32 layers, bfloat16, {WHOLE_BATCH} x {WHOLE_TOKENS} tokens, GiB"
    table = Table(title=title, title_justify="left")
    columns = (
        "rows",
        "weights",
        "one pass",
        "with checkpointing",
        "sums",
        *COMPUTED.values(),
    )
    for column in columns:
        table.add_column(column, justify="right")
    for examples in WHOLE_EXAMPLES:
        rows = examples * WHOLE_TOKENS
        fixed = [plain["weights"], plain["pass"], again["pass"], plain["sums"]]
        total = plain["weights"] + plain["pass"] + plain["sums"]
        kept = plain["weights"] + plain["pass"] + rows * plain["row"]
        table.add_row(f"{rows:,}", *(f"{each / GIB:.1f}" for each in (*fixed, total, kept)))
    return table


def draw(path: Path, figures: dict[str, Any], caption: str) -> None:
    """Bytes against rows: measured on the left, computed for the whole shape on the right."""
    figure, (left, right) = blank_figure(4.4, 3.2, 2, sharey=False)
    for method, found in figures["measured"].items():
        rows, peaks = [each["rows"] for each in found], [each["bytes"] / MIB for each in found]
        left.plot(rows, peaks, "o-", color=COLOURS[method], label=MEASURED[method])
    left.set_title(f"Measured: {figures['shape']}", loc="left", fontsize=9.5)
    left.set_ylabel("MiB above the weights")

    whole = figures["whole"]["plain"]
    rows = [examples * WHOLE_TOKENS for examples in WHOLE_EXAMPLES]
    base = whole["weights"] + whole["pass"]
    lines = [base + whole["sums"]] * len(rows), [base + each * whole["row"] for each in rows]
    for method, line in zip(METHODS, lines, strict=True):
        right.plot(rows, [each / GIB for each in line], "o-", color=COLOURS[method], label=COMPUTED[method])
    right.set_title("Computed: an 8B, 32 layers", loc="left", fontsize=9.5)
    right.set_ylabel("GiB, weights included")
    right.set_xscale("log")
    for axis in (left, right):
        axis.set_ylim(bottom=0)
        axis.set_xlabel("gradient rows", color=INK)
        axis.grid(color=GRID)
        axis.legend(frameon=False)
    figure.supxlabel(caption, fontsize=7.5, color=MUTED)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=140)


def run(shape: str, out: Path, console: Console) -> dict[str, Any]:
    """Measure and compute everything; tables for people, JSON and a figure into the folder."""
    expected = computed(SHAPES[shape], BATCH, TOKENS, TOKENS - 1)
    whole = {
        name: computed(WHOLE, WHOLE_BATCH, WHOLE_TOKENS, WHOLE_SPAN, gradient_checkpointing=name != "plain")
        for name in ("plain", "checkpointing")
    }
    console.print(whole_table(whole["plain"], whole["checkpointing"]))
    found = {method: in_a_process(method, shape, TIMES) for method in METHODS}
    console.print(measured_table(shape, found, expected))
    facts = machine()
    figures = {"machine": facts, "shape": shape, "measured": found, "computed": expected, "whole": whole}
    write_json(out / "memory.json", figures)
    draw(out / "memory.png", figures, f"{facts['device']}, {facts['processor']}")
    return figures


def in_a_process(method: str, shape: str, times: tuple[int, ...]) -> list[dict[str, float]]:
    """`measure` in a process of its own, in which what is freed goes back to the machine at once."""
    given = ["--child", method, "--shape", shape, "--times", ",".join(map(str, times))]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
    command = [sys.executable, "-m", "benchmarks.memory", *given]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout
    found: list[dict[str, float]] = json.loads(printed.splitlines()[-1])
    return found


def main(
    shape: Annotated[str, typer.Option(help=f"{', '.join(SHAPES)}.")] = next(iter(SHAPES)),
    out: Annotated[Path, typer.Option(help="Folder for the figures.")] = Path("benchmarks/results/memory"),
    child: Annotated[str, typer.Option(hidden=True)] = "",
    times: Annotated[str, typer.Option(hidden=True)] = "1",
) -> None:
    """What calibration holds in memory against the number of rows; under three minutes on two cores."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"expected one of {', '.join(SHAPES)}, got {shape!r}")
    if child:
        print(json.dumps(measure(child, shape, tuple(map(int, times.split(","))))))
        return
    console = Console()
    console.width = max(console.width, 110)  # rather than cut figures
    run(shape, out, console)
    console.print(f"figures: {out}")


if __name__ == "__main__":
    typer.run(main)
