"""Where a run's time goes: seconds, tokens and memory of every stage, beside the least time that its work takes here.

That bound is arithmetic, of dense models. A token costs two FLOPs for every weight of the layers, and two for every
weight of the output embedding where a next token is predicted; as much again in the layers that a gradient goes back
through, whose frozen weights need none themselves. Every pass reads the weights once, and each token of the longest
completion is a pass. Several processes share the FLOPs, while each reads all weights at every pass. The machine's two
rates, of a large matrix product and of a large copy, are measured first. Padding, attention, norms, adapters, sampling
and everything else are in the seconds alone.
"""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from spd import distributed
from spd.adapters import MANIFEST as TRAINING
from spd.completions import shard_files
from spd.errors import InputError
from spd.files import parse_json, read_object, regular_file, write_json
from spd.model_state import input_device
from spd_kernels.roofline import Machine, Work

if TYPE_CHECKING:
    from rich.table import Table

    from spd.subspace import Subspace

PROFILE = "profile.json"


@dataclass
class Stage:
    """What one stage took, over all sittings of a run.

    Args:
        kind, what: as `Stages` says them: "generate", and "words, projected".
        seconds: wall-clock time.
        tokens: that went through the layers, padding not counted.
        bound: seconds that their work takes at least; None where some of the work is not known.
        peak_bytes: memory at its highest: of the process, or what PyTorch held of a GPU. None where it is not known.
    """

    kind: str
    what: str
    seconds: float = 0.0
    tokens: int = 0
    bound: float | None = 0.0
    peak_bytes: int | None = None


class Profile:
    """Collects what stages take.

    Args:
        model: the model that all stages run; its size and its device give the bounds.
        path: a JSON file to keep the profile in, written after every stage. If it is there, its stages are added to;
            one that is damaged is begun anew, for it only informs.
        machine: the device's rates; None: measured now, which takes a second or two.
    """

    def __init__(self, model: nn.Module, path: Path | None = None, machine: Machine | None = None) -> None:
        self.device = input_device(model)
        inputs, outputs = (
            set() if module is None else set(module.parameters())
            for module in (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
        )
        layers = [parameter for parameter in model.parameters() if parameter not in inputs | outputs]
        self.layer_weights = sum(parameter.numel() for parameter in layers)
        self.head_weights = sum(parameter.numel() for parameter in outputs)
        self.bytes = sum(parameter.nbytes for parameter in [*layers, *outputs])
        self.depth = int(model.config.get_text_config().num_hidden_layers)  # type: ignore[union-attr, operator]
        self.dtype = max((p for p in layers if p.is_floating_point()), key=lambda parameter: parameter.numel()).dtype
        self.machine = machine or measure(self.device, self.dtype)
        self.path = path
        self.stages: dict[tuple[str, str], Stage] = {}
        if path is not None and path.exists():
            try:
                self.stages = {(stage.kind, stage.what): stage for stage in _stages(read_object(path))}
            except InputError as error:
                warnings.warn(f"profile: begun anew ({error})", stacklevel=2)
        self._open: list[Stage] = []

    @contextmanager
    def stage(self, kind: str, what: str) -> Iterator[None]:
        """Takes the time of the block, and what is counted in it. A stage inside another has both for itself."""
        stage = self.stages.setdefault((kind, what), Stage(kind, what))
        self._open.append(stage)
        forgotten = forget_peak(self.device)
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds = time.perf_counter() - start
            stage.seconds += seconds
            self._open.pop()
            if self._open:
                self._open[-1].seconds -= seconds
            peak = peak_bytes(self.device) if forgotten else None
            stage.peak_bytes = max(filter(None, (peak, stage.peak_bytes)), default=None)
            if self.path is not None:
                write_json(self.path, self.to_json())

    def count(
        self, tokens: int, *, predicted: int = 0, backward: float = 0.0, passes: int = 1, workers: int | None = None
    ) -> None:
        """Work of the stage that is open.

        Args:
            tokens: that go through the layers.
            predicted: at how many of them the output embedding is multiplied out.
            backward: the share of the layers that a gradient goes back through; with one, also through that embedding.
            passes: how often the weights must be read.
            workers: how many processes shared the work, at each of whose passes the weights are read (default: all).
        """
        flops = 2.0 * self.layer_weights * tokens * (1 + backward)
        flops += 2.0 * self.head_weights * predicted * (2 if backward else 1)
        work = Work(float(passes * self.bytes), flops / (workers or distributed.size()))
        stage = self._open[-1]
        stage.tokens += tokens
        if stage.bound is not None:
            stage.bound += self.machine.seconds(work, self.dtype)

    def uncounted(self) -> None:
        """Some work of the stage that is open is not known: it has seconds and no bound."""
        self._open[-1].bound = None

    def count_calibration(self, subspace: Subspace, *, workers: int | None = None) -> None:
        """The passes behind a subspace that was calibrated: forward through all layers, back to the lowest chosen.

        `workers` is as in `count`.
        """
        made = subspace.provenance
        backward = 1 - subspace.layers[0] / self.depth
        self.count(made["rows"], predicted=made["target_tokens"], backward=backward, passes=2, workers=workers)

    def count_training(self, adapter: Mapping[str, Any]) -> None:
        """What `training.json` says of a training from its beginning to its end."""
        recipe = adapter["recipe"]
        tokens = round(adapter["tokens"] * recipe["epochs"])
        steps = -(-adapter["examples"] // recipe["batch_size"]) * recipe["epochs"]
        self.count(tokens, predicted=tokens, backward=1.0, passes=round(2 * steps))

    @contextmanager
    def training(self, out: Path) -> Iterator[None]:
        """Counts the training of the adapter in `out` that the block makes.

        Where it goes on from a checkpoint, what another sitting had done of it is not known.
        """
        made = (out / TRAINING).is_file()
        resumed = any(out.with_name(out.name + ".checkpoints").glob("checkpoint-*"))
        yield
        if resumed and not made:
            self.uncounted()
        elif not made:
            self.count_training(read_object(out / TRAINING))

    @contextmanager
    def completions(self, path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
        """Counts the completions that a file, or those of workers beside it, gain inside the block.

        Where the block makes no such file, as an evaluation by likelihoods of references, its work is not known.
        """
        before = set(_completions(path))
        try:
            yield
            if not path.exists():
                self.uncounted()
        finally:
            fresh = [record for index, record in _completions(path).items() if index not in before]
            if fresh:
                prompts = sum(map(len, tokenizer([record["prompt"] for record in fresh])["input_ids"]))
                written = [len(record["tokens"]) for record in fresh]
                # The pass over the prompt gives the first token, and the last one is not read again.
                read = sum(max(0, tokens - 1) for tokens in written)
                self.count(prompts + read, predicted=max(sum(written), len(fresh)), passes=max(1, *written))

    def to_json(self) -> dict[str, Any]:
        machine = self.machine
        return {
            "machine": {
                "name": machine.name,
                "bytes_per_second": machine.bytes_per_second,
                "flops_per_second": machine.flops_per_second[self.dtype],
                "dtype": str(self.dtype).removeprefix("torch."),
            },
            "model": {
                "layer_weights": self.layer_weights,
                "output_embedding_weights": self.head_weights,
                "bytes": self.bytes,
            },
            "stages": [asdict(stage) for stage in self.stages.values()],
        }


def _completions(path: Path) -> dict[int, dict[str, Any]]:
    """The completions of a file and of its workers' by index; a torn or damaged line, which is generate's, is none."""
    found = {}
    for each in [path, *shard_files(path)]:
        for line in _lines(each):
            with suppress(InputError, KeyError, TypeError, ValueError):
                record = parse_json("a completion", line)
                index, prompt, tokens = record["index"], record["prompt"], record["tokens"]
                found[int(index)] = {"prompt": str(prompt), "tokens": list(tokens)}
    return found


def _lines(path: Path) -> list[bytes]:
    try:
        with regular_file(path) as file:
            return file.read().splitlines()
    except InputError:
        return []


def _stages(profile: Mapping[str, Any]) -> list[Stage]:
    """Those of a stored profile.

    Raises:
        InputError: it is not as `Profile` writes it.
    """
    try:
        stages = [Stage(**stage) for stage in profile["stages"]]
        good = all(
            isinstance(stage.kind, str)
            and isinstance(stage.what, str)
            and all(type(value) in (int, float) for value in (stage.seconds, stage.tokens))
            and all(value is None or type(value) in (int, float) for value in (stage.bound, stage.peak_bytes))
            for stage in stages
        )
    except (KeyError, TypeError):
        good = False
    if not good:
        raise InputError(f"{PROFILE}: not as a run keeps it")
    return stages


@dataclass(frozen=True)
class Row:
    """A stage, or all stages of a kind (`what` is None), or all (`kind` is None too), as tables show it.

    `share` is the part of the bound that was reached, and the rate is in tokens a second, both of the stages whose work
    is known; None where no work was counted.
    """

    kind: str | None
    what: str | None
    seconds: float
    tokens: int
    tokens_per_second: float | None
    share: float | None
    peak_bytes: int | None


def profile_rows(profile: Mapping[str, Any]) -> list[Row]:
    """Rows of a stored profile: each kind, its stages after it, then the whole."""
    stages = _stages(profile)
    kinds = {kind: [stage for stage in stages if stage.kind == kind] for kind in dict.fromkeys(s.kind for s in stages)}
    rows = []
    for kind, own in kinds.items():
        rows.append(_sum(kind, None, own))
        rows += [_sum(kind, stage.what, [stage]) for stage in own]
    return [*rows, _sum(None, None, stages)]


def _sum(kind: str | None, what: str | None, stages: Sequence[Stage]) -> Row:
    known = [stage for stage in stages if stage.tokens and stage.bound is not None]
    seconds = sum(stage.seconds for stage in known)
    return Row(
        kind,
        what,
        sum(stage.seconds for stage in stages),
        sum(stage.tokens for stage in stages),
        sum(stage.tokens for stage in known) / seconds if seconds else None,
        sum(stage.bound or 0.0 for stage in known) / seconds if seconds else None,
        max((stage.peak_bytes for stage in stages if stage.peak_bytes), default=None),
    )


def profile_table(profile: Mapping[str, Any]) -> Table:
    """The same for a terminal."""
    from rich.table import Table

    machine = profile["machine"]
    table = Table(
        header_style="bold",
        caption=f"bound: {machine['flops_per_second'] / 1e9:,.0f} GFLOP/s in {machine['dtype']}, "
        f"{machine['bytes_per_second'] / 1e9:,.0f} GB/s, measured",
        caption_justify="left",
    )
    for name in ("stage", "seconds", "tokens", "tokens/s", "of the bound", "peak memory"):
        table.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    for row in profile_rows(profile):
        rate = row.tokens_per_second
        table.add_row(
            (row.kind or "all") if row.what is None else f"  {row.what}",
            f"{row.seconds:.1f}",
            f"{row.tokens:,}" if row.tokens else "",
            f"{rate:,.0f}" if rate else "",
            f"{100 * row.share:.0f} %" if row.share is not None else "",
            f"{row.peak_bytes / 2**30:.2f} GiB" if row.peak_bytes else "",
            style="bold" if row.what is None else None,
        )
    return table


def measure(device: torch.device, dtype: torch.dtype) -> Machine:
    """The device's two rates with the present number of threads: of a large copy and of a large matrix product."""
    numbers, side = (2**24, 2048) if device.type == "cpu" else (2**26, 8192)
    source, target = torch.ones(numbers, device=device), torch.empty(numbers, device=device)
    p, q = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    copy = _least_seconds(lambda: target.copy_(source), device)
    product = _least_seconds(lambda: p @ q, device)
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} {device.type.upper()}"
    )
    return Machine(name, 2 * source.nbytes / copy, {dtype: 2 * side**3 / product})


def _least_seconds(call: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    least = float("inf")
    for _ in range(rounds + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        least = min(least, time.perf_counter() - start)
    return least


def forget_peak(device: torch.device) -> bool:
    """From now on `peak_bytes` is of what comes; False where the system does not let it be forgotten."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device) -> int | None:
    """Memory at its highest since `forget_peak`; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0) or None
