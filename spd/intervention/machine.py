"""What this machine needs for the operations of a decode step: measured once, kept as JSON in the user's cache folder.

The planner's constants. Every one comes from running the operation itself (transformers' cache layer, attention,
`latent_attention`, a tiny model under each mode) on a few sizes; none belongs to a model or to a benchmark's case.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, get_args

import torch
from torch import Tensor, nn

from spd.errors import InputError
from spd.files import read_json, sha256, write_json
from spd.intervention.hook import Hook
from spd.intervention.latent import Latent
from spd.intervention.latent_probe import install_latent
from spd.intervention.target import Form, find_targets
from spd.progress import bar
from spd.provenance import versions
from spd.sites import find_sites
from spd.subspace import Basis, Subspace
from spd_kernels import latent_attention, roofline
from spd_kernels.latent_attention.work import latent_attention_work

FORMAT = 1
FORMS = get_args(Form)
ATTENTIONS = ("dense", "latent_v", "latent")


@dataclass(frozen=True)
class Amount:
    """What attention over a cache does: bytes and FLOPs as the bound model counts them, and numbers that are worked on
    one by one (weights of the softmax; expanded keys, which are normed and rotated)."""

    bytes: float
    flops: float
    numbers: float

    @classmethod
    def of(
        cls,
        batch: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        tokens: int,
        rank_k: int | None,
        rank_v: int | None,
        size: int,
    ) -> Amount:
        """One query token a sequence; a rank of None is a dense side, `size` the bytes of a number."""
        work = latent_attention_work(batch, heads, kv_heads, head_dim, tokens, rank_k, rank_v, size)
        expanded = 0 if rank_k is None else kv_heads * head_dim
        return cls(work.bytes, work.flops, batch * tokens * (heads + expanded))


@dataclass(frozen=True)
class Rates:
    """Seconds for each byte, FLOP and number of one kind of attention."""

    per_byte: float
    per_flop: float
    per_number: float

    def memory(self, amount: Amount) -> float:
        return self.per_byte * amount.bytes

    def arithmetic(self, amount: Amount) -> float:
        return self.per_flop * amount.flops + self.per_number * amount.numbers


@dataclass(frozen=True)
class Curve:
    """y over x: straight between its points on logarithmic axes, constant below the first, y / x constant above the
    last."""

    x: tuple[float, ...]
    y: tuple[float, ...]

    def __call__(self, x: float) -> float:
        if x <= self.x[0]:
            return self.y[0]
        if x >= self.x[-1]:
            return self.y[-1] * x / self.x[-1]
        right = next(i for i, each in enumerate(self.x) if each >= x)
        (x0, x1), (y0, y1) = (axis[right - 1 : right + 1] for axis in (self.x, self.y))
        return y0 * (y1 / y0) ** (math.log(x / x0) / math.log(x1 / x0))


@dataclass(frozen=True)
class Machine:
    """The constants, all in seconds. `spd.intervention.machine.load` gives them.

    Attributes:
        name: the device.
        dtype: of weights and activations, without "torch.".
        measured: whether they were measured here, or are the rates in spd_kernels.roofline.H200.
        overlaps: whether the device computes while the host prepares, so that a step takes the longer of the two.
        linear: for a byte of weights, by how many rows are multiplied with them.
        append: for transformers' growing cache layer to take one more token, by the bytes of its K and V: it copies
            them.
        attention: rates of attention over a dense cache, and over the caches of "latent_v" and "latent".
        step: for a step of a model, beside its layers.
        layer: for a layer beside all of these, by mode: calling small operations.
    """

    name: str
    dtype: str
    measured: bool
    overlaps: bool
    linear: Curve
    append: Curve
    attention: Mapping[str, Rates]
    step: float
    layer: Mapping[str, float]


def load(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    refresh: bool = False,
    progress: bool = True,
) -> Machine:
    """The machine's constants: from the cache folder, else measured (some seconds) and put there.

    The file is $XDG_CACHE_HOME/spd/machine-HASH.json (~/.cache without the variable), for this device, dtype, number
    of threads and versions of torch, transformers and spd; a damaged one is measured anew. A GPU that is not there is
    stood in for by the rates in spd_kernels.roofline.H200.

    Args:
        refresh: measure even if the file is there.
        progress: show a progress bar while measuring.
    """
    device = resolve(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        return from_rates(roofline.H200, dtype)
    path = cache_file(device, dtype)
    found = None if refresh else _read(path, device, dtype)
    if found is None:
        found = measure(device, dtype, progress=progress)
        with contextlib.suppress(OSError):  # a folder that cannot be written costs a measurement each time
            write_json(path, {"format": FORMAT, "key": _key(device, dtype), "machine": asdict(found)})
    return found


def cache_file(device: torch.device | str, dtype: torch.dtype) -> Path:
    """Where the constants of this device and dtype are kept."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    key = json.dumps(_key(resolve(device), dtype), sort_keys=True)
    return folder / "spd" / f"machine-{sha256(key)[:16]}.json"


def resolve(device: torch.device | str) -> torch.device:
    """The device by its name.

    Raises:
        InputError: it is neither the CPU nor a CUDA device.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device: expected a device of torch, got {device!r} ({error})") from None
    if found.type not in ("cpu", "cuda"):
        raise InputError(f"device: expected cpu or cuda, got {device!r}")
    return found


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8") as file:
        return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    return platform.processor() or platform.machine()


def memory_bytes(device: torch.device) -> int | None:
    """The device's whole memory; None where it cannot be asked."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory if torch.cuda.is_available() else None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def from_rates(rates: roofline.Machine, dtype: torch.dtype) -> Machine:
    """Constants of a machine that is known by its two rates alone: bounds, without what launching costs."""
    byte = 1 / rates.bytes_per_second
    flop = 1 / rates.flops_per_second.get(dtype, min(rates.flops_per_second.values()))
    size = dtype.itemsize
    turning = byte / flop / 2 * size  # rows at which multiplying a weight takes as long as reading it
    bound = Rates(byte, flop, 0.0)
    return Machine(
        name=rates.name,
        dtype=str(dtype).removeprefix("torch."),
        measured=False,
        overlaps=True,
        linear=Curve((turning, 2 * turning), (byte, 2 * byte)),
        append=Curve((1.0, 2.0), (2 * byte, 4 * byte)),
        attention=dict.fromkeys(ATTENTIONS, bound),
        step=0.0,
        layer=dict.fromkeys(FORMS, 0.0),
    )


def _key(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    found = versions()
    return {
        "device": device_name(device),
        "threads": str(torch.get_num_threads()) if device.type == "cpu" else "",
        "dtype": str(dtype),
    } | {name: found.get(name, "") for name in ("torch", "transformers", "spd")}


def _read(path: Path, device: torch.device, dtype: torch.dtype) -> Machine | None:
    """None if the file is absent or is anything but what `load` wrote for this device and dtype."""
    try:
        content = read_json(path)
        if content["format"] != FORMAT or content["key"] != _key(device, dtype):
            return None
        return _from_json(content["machine"])
    except (OSError, InputError, KeyError, TypeError, ValueError, AttributeError):
        return None


def _from_json(value: dict[str, Any]) -> Machine:
    machine = Machine(
        name=str(value["name"]),
        dtype=str(value["dtype"]),
        measured=bool(value["measured"]),
        overlaps=bool(value["overlaps"]),
        linear=_curve(value["linear"]),
        append=_curve(value["append"]),
        attention={
            kind: Rates(*(_seconds(value["attention"][kind][name]) for name in ("per_byte", "per_flop", "per_number")))
            for kind in ATTENTIONS
        },
        step=_seconds(value["step"]),
        layer={mode: _seconds(value["layer"][mode]) for mode in FORMS},
    )
    return machine


def _curve(value: dict[str, Any]) -> Curve:
    x, y = (tuple(_seconds(each) for each in value[axis]) for axis in "xy")
    if len(x) != len(y) or len(x) < 2 or min(y) <= 0 or any(a >= b for a, b in itertools.pairwise(x)):
        raise ValueError("expected points with ascending x")
    return Curve(x, y)


def _seconds(value: object) -> float:
    if not isinstance(value, (int, float)) or not (math.isfinite(value) and value >= 0):
        raise ValueError(f"expected a number from 0, got {value!r}")
    return float(value)


# Measuring. The CPU's operations are larger than what one call costs, the GPU's have to be larger still.
_TOKENS = {"cpu": (512, 4096), "cuda": (8192, 65536)}
_LATENT_TOKENS = {"cpu": (512, 2048), "cuda": (8192, 65536)}  # latent keys take the CPU ten times as long
# batch, heads, kv_heads, head_dim: from a key head for each query head to one for seven
_SHAPES = ((1, 8, 2, 64), (1, 16, 4, 128), (1, 14, 2, 64), (1, 2, 2, 128), (4, 4, 2, 64))
_RANKS = (8, 2)  # d over the rank
_APPEND_BYTES = {
    "cpu": tuple(2**n for n in (15, 18, 20, 22, 24, 25, 26)),
    "cuda": tuple(2**n for n in (20, 24, 28, 30)),
}
_ROWS = (1, 2, 4, 16, 64, 256)
_WEIGHTS = {"cpu": (1024, 2048), "cuda": (8192, 8192)}
_FLUSH_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}
_REPEATS = 5
_STEPS = 32
_START = 32  # tokens of the tiny models: as few as make the libraries choose the same routines as for many


def measure(device: torch.device | str, dtype: torch.dtype, *, progress: bool = True) -> Machine:
    """Measure now; `load` is what keeps the result."""
    device = resolve(device)
    stages: dict[str, Callable[[], Any]] = {
        "layer": partial(_measure_layers, device, dtype),
        "linear": partial(_measure_linear, device, dtype),
        "append": partial(_measure_append, device, dtype),
        **{kind: partial(_measure_attention, kind, device, dtype) for kind in ATTENTIONS},
    }
    found: dict[str, Any] = {}
    # What is random here is nobody else's.
    cuda = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(cuda),
        bar(total=len(stages), label="measuring this machine, once", unit="operation", show=progress) as shown,
    ):
        for name, stage in stages.items():
            found[name] = stage()
            shown.update()
    step, layer = found["layer"]
    return Machine(
        name=device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        measured=True,
        overlaps=device.type == "cuda",
        linear=found["linear"],
        append=found["append"],
        attention={kind: found[kind] for kind in ATTENTIONS},
        step=step,
        layer=layer,
    )


class Stopwatch:
    """Seconds of a call whose operands are in memory: between calls the processor's caches are filled with other
    things, as by the weights of all other layers in a real model."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush = torch.ones(_FLUSH_BYTES[device.type], dtype=torch.int8, device=device).view(torch.float32)
        # With one thread its own time, which other processes on the machine leave alone.
        self._clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def __call__(self, call: Callable[[], object]) -> float:
        if self._device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._flush.neg_()  # and the host gets ahead of the device
            start.record()
            call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3
        return self.host(call)

    def host(self, call: Callable[[], object]) -> float:
        """What the call takes the host, which on a GPU is to start it."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        else:
            self._flush.sum()
        start = self._clock()
        call()
        return self._clock() - start

    def least(self, call: Callable[[], object], repeats: int = _REPEATS) -> float:
        """Of several calls, after one to warm up: what is above it is somebody else's doing."""
        call()
        return max(1e-9, min(self(call) for _ in range(repeats)))


@torch.inference_mode()
def _measure_linear(device: torch.device, dtype: torch.dtype) -> Curve:
    watch, make = Stopwatch(device), partial(torch.randn, device=device, dtype=dtype)
    weight = make(_WEIGHTS[device.type])
    seconds = []
    for rows in _ROWS:
        x = make(rows, weight.shape[1])
        seconds.append(watch.least(partial(nn.functional.linear, x, weight)) / weight.nbytes)
    return Curve(_ROWS, _rising(seconds))


@torch.inference_mode()
def _measure_append(device: torch.device, dtype: torch.dtype) -> Curve:
    from transformers.cache_utils import DynamicLayer

    watch, seconds, sizes = Stopwatch(device), [], _APPEND_BYTES[device.type]
    width = 256
    new = torch.zeros(1, 1, 1, width, device=device, dtype=dtype)
    for size in sizes:
        layer = DynamicLayer()
        tokens = size // (2 * width * dtype.itemsize)
        layer.update(*(torch.ones(1, 1, tokens, width, device=device, dtype=dtype) for _ in range(2)))
        seconds.append(watch.least(partial(layer.update, new, new)))
    return Curve(sizes, _rising(seconds))


@torch.inference_mode()
def _measure_attention(kind: str, device: torch.device, dtype: torch.dtype) -> Rates:
    watch, make = Stopwatch(device), partial(torch.randn, device=device, dtype=dtype)
    rows = []
    shapes = _SHAPES if kind != "latent" else _SHAPES[:2]
    lengths = (_LATENT_TOKENS if kind == "latent" else _TOKENS)[device.type]
    for (batch, heads, kv_heads, head_dim), tokens in itertools.product(shapes, lengths):
        d = kv_heads * head_dim
        q, k = make(batch, heads, 1, head_dim), make(batch, kv_heads, tokens, head_dim)
        for rank in [None] if kind == "dense" else [d // part for part in _RANKS]:
            rank_k = rank if kind == "latent" else None
            amount = Amount.of(batch, heads, kv_heads, head_dim, tokens, rank_k, rank, dtype.itemsize)
            call: Callable[[], object]
            if rank is None:
                # Grouped heads are given as transformers gives them.
                attend = nn.functional.scaled_dot_product_attention
                call = partial(attend, q, k, make(k.shape), enable_gqa=heads > kv_heads)
            else:
                c_v, u_v = make(batch, tokens, rank), make(d, rank)
                c_k, u_k = (c_v.clone(), u_v.clone()) if rank_k else (k, None)
                cos, positions = None, None
                if rank_k:
                    cos = make(tokens, head_dim // 2)
                    positions = torch.arange(tokens, device=device, dtype=torch.int32).expand(batch, -1)
                call = partial(
                    latent_attention, q, c_k, c_v, u_k, u_v, cos, cos, kv_heads=kv_heads, positions=positions
                )
            seconds = watch.least(call)
            rows.append([each / seconds for each in (1.0, amount.bytes, amount.flops, amount.numbers)])
    # The constant is what a call takes at no tokens; `Machine.layer` holds it.
    return Rates(*_nonnegative(torch.tensor(rows, dtype=torch.float64))[1:])


def _measure_layers(device: torch.device, dtype: torch.dtype) -> tuple[float, dict[str, float]]:
    """(seconds of a step beside its layers, of a layer by mode), from models too small for anything else to count."""
    with torch.inference_mode(), contextlib.ExitStack() as stack:
        steps = {
            name: stack.enter_context(_decoding(_tiny(layers, device, dtype), mode, device))
            for name, layers, mode in (("three", 3, "fold"), *((mode, 1, mode) for mode in FORMS))
        }
        watch = Stopwatch(device)
        rounds = [{name: watch.host(call) for name, call in steps.items()} for _ in range(_STEPS)][_STEPS // 4 :]

    def more(name: str) -> float:
        """Than the small model takes with nothing in the way, round by round."""
        return max(0.0, median(each[name] - each["fold"] for each in rounds))

    plain = more("three") / 2
    step = max(0.0, median(each["fold"] for each in rounds) - plain)
    return step, {mode: plain + more(mode) for mode in FORMS}


@contextlib.contextmanager
def _decoding(model: Any, mode: Form, device: torch.device) -> Iterator[Callable[[], object]]:
    """A call that decodes one more token, from a short start. "fold" changes nothing but weights."""
    from transformers import DynamicCache

    d = model.config.num_key_value_heads * model.config.head_dim
    basis = Basis(torch.eye(d)[:, :16], torch.ones(d, dtype=torch.float64))
    bases = dict.fromkeys(range(model.config.num_hidden_layers), basis)
    targets = find_targets(find_sites(model), Subspace(bases, bases), "kv")
    installed: Hook | Latent | None = None
    if mode == "hook":
        installed = Hook(targets, 0.0, 1.0)
    elif mode == "latent_v" or mode == "latent":
        installed = install_latent(model, mode, targets)
    try:
        cache = DynamicCache(config=model.config)
        token = torch.zeros(1, 1, dtype=torch.long, device=device)
        model(input_ids=token.expand(1, _START), past_key_values=cache, use_cache=True)
        yield lambda: model(input_ids=token, past_key_values=cache, use_cache=True)
    finally:
        if installed is not None:
            installed.remove()


def _tiny(layers: int, device: torch.device, dtype: torch.dtype) -> Any:
    """Heads as in real models, for what a call takes grows with them, and next to no weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
    )
    return LlamaForCausalLM(config).eval().to(device=device, dtype=dtype)


def _nonnegative(rows: Tensor) -> list[float]:
    """c >= 0 that brings rows (n, m) c closest to 1: the best of the solutions over all subsets of the columns."""
    count = rows.shape[1]
    best, least = torch.zeros(count, dtype=rows.dtype), math.inf
    scale = rows.amax(0)
    ones = torch.ones(rows.shape[0], 1, dtype=rows.dtype)
    for size in range(1, count + 1):
        for subset in itertools.combinations(range(count), size):
            columns = list(subset)
            found = torch.linalg.lstsq(rows[:, columns] / scale[columns], ones).solution[:, 0]
            if bool((found < 0).any()):
                continue
            error = float((rows[:, columns] @ (found / scale[columns]) - 1).square().sum())
            if error < least:
                best, least = torch.zeros(count, dtype=rows.dtype), error
                best[columns] = found / scale[columns]
    return best.tolist()


def _rising(seconds: list[float]) -> tuple[float, ...]:
    """More takes no less: a point below its predecessor was disturbed less than that one."""
    return tuple(itertools.accumulate(reversed(seconds), min))[::-1]
