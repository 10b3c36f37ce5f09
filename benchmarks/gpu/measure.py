"""How time is taken: on a GPU by events, or on a CPU, for a rehearsal, by a clock whose times mean nothing.

A sample is several calls between two events, after one call that is not timed: while that one runs, the host gets
ahead, and the L2 cache is left as the timed calls leave it. Successive calls take successive sets of inputs, together
larger than the L2 cache, so that operands come from memory.
"""

from __future__ import annotations

import itertools
import math
import re
import signal
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.case import Case, Contender, Draw, Inputs, to_float64
from benchmarks.timing import Call, Clock, measure_cpu, wall_clock
from spd_kernels.roofline import Machine

# Input sets together are this many times the L2 cache, but never more sets than this.
L2_TIMES, MOST_COPIES = 2.5, 512


def copies_needed(bytes_a_call: float, l2_bytes: float) -> int:
    """Sets of inputs to rotate through, at least two."""
    return min(MOST_COPIES, max(2, math.ceil(L2_TIMES * l2_bytes / max(bytes_a_call, 1.0))))


def rotating(contender: Contender, sets: Sequence[Inputs]) -> Call:
    """The contender on the next set of inputs each time."""
    turn = itertools.cycle(sets)
    return lambda: contender(*next(turn))


def relative_error(actual: object, exact: object) -> float:
    """‖actual − exact‖ / ‖exact‖ over all tensors of a result; the largest of them, NaN if any is NaN."""
    errors = [
        float(torch.linalg.vector_norm(a.double() - e) / torch.linalg.vector_norm(e).clamp(min=1e-300))
        for a, e in zip(_tensors(actual), _tensors(exact), strict=True)
    ]
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)


def _tensors(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)  # type: ignore[call-overload]


class Truth:
    """What a case's result is in float64, and how far from it a contender's may be: three times as far as the plain
    formula in the case's own type, plus a rounding."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        exact = case.exact or case.contenders[case.baseline]
        self._case, self._inputs = case, inputs
        self._expected = exact(*to_float64(inputs))
        self.allowed = 3 * (relative_error(exact(*inputs), self._expected) + torch.finfo(case.dtype).eps)

    def error(self, contender: Contender) -> float:
        """Relative; NaN where the contender's result has one."""
        return relative_error(self._case.view(contender(*self._inputs)), self._expected)


class Rig(ABC):
    """A device to measure on."""

    device: torch.device
    clock: Clock
    rounds: int
    at_least: float
    warmup: int

    @abstractmethod
    def copies(self, case: Case) -> int: ...

    @abstractmethod
    def compile(self, contender: Contender, *, decode: bool) -> Contender: ...

    @abstractmethod
    def capture(self, contender: Contender, sets: Sequence[Inputs]) -> Call:
        """One call for all sets: a CUDA graph's replay."""

    @abstractmethod
    def launches(self, contender: Contender, inputs: Inputs) -> int | None:
        """Kernels that one call launches, or None where that cannot be told."""

    @abstractmethod
    def machine(self) -> Machine:
        """The two rates of the device, measured."""

    def sets(self, case: Case, count: int) -> list[Inputs]:
        bases: dict[tuple[int, int], Tensor] = {}
        return [case.inputs(Draw(self.device, case.dtype, seed, bases)) for seed in range(count)]


class Gpu(Rig):
    rounds, at_least, warmup = 30, 1e-3, 3

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.clock = self._seconds
        self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def _seconds(self, call: Call, repeats: int) -> float:
        start, end = self._events
        call()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / repeats

    def copies(self, case: Case) -> int:
        return copies_needed(case.work.bytes, torch.cuda.get_device_properties(self.device).L2_cache_size)

    def compile(self, contender: Contender, *, decode: bool) -> Contender:
        torch.compiler.reset()
        # Inductor's own CUDA graphs copy every input that moves: a few rows gain by them, many would pay twice.
        mode = "max-autotune" if decode else "max-autotune-no-cudagraphs"
        return torch.compile(contender, mode=mode, dynamic=False)

    def capture(self, contender: Contender, sets: Sequence[Inputs]) -> Call:
        return self._graph(contender, sets).replay

    def launches(self, contender: Contender, inputs: Inputs) -> int | None:
        contender(*inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.enable_debug_mode()
        with torch.cuda.graph(graph):
            contender(*inputs)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "graph.dot"
            graph.debug_dump(str(path))
            return count_nodes(path.read_text(errors="replace")) if path.exists() else None

    def _graph(self, contender: Contender, sets: Sequence[Inputs]) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            contender(*sets[0])
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for inputs in sets:
                contender(*inputs)
        return graph

    def machine(self) -> Machine:
        source = torch.randn(2**29, device=self.device)  # 2 GiB
        target = torch.empty_like(source)
        bytes_per_second = 2 * source.nbytes / self._best(partial(target.copy_, source))
        rates = {}
        for dtype, side in ((torch.bfloat16, 8192), (torch.float16, 8192), (torch.float32, 4096)):
            p, q = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
            rates[dtype] = 2 * side**3 / self._best(partial(torch.matmul, p, q))
        return Machine(torch.cuda.get_device_name(self.device), bytes_per_second, rates)

    def _best(self, call: Call) -> float:
        return min(self._seconds(call, 5) for _ in range(5))


class Rehearsal(Rig):
    """The same flow on a CPU, to see that it works; its times mean nothing."""

    device, rounds, at_least, warmup = torch.device("cpu"), 2, 0.0, 0

    def __init__(self) -> None:
        self.clock = wall_clock

    def copies(self, case: Case) -> int:
        return 2

    def compile(self, contender: Contender, *, decode: bool) -> Contender:
        torch.compiler.reset()
        return torch.compile(contender, backend="eager", dynamic=False)

    def capture(self, contender: Contender, sets: Sequence[Inputs]) -> Call:
        def replay() -> None:
            for inputs in sets:
                contender(*inputs)

        return replay

    def launches(self, contender: Contender, inputs: Inputs) -> int | None:
        return None

    def machine(self) -> Machine:
        found = measure_cpu(copy_bytes=2**22, side=128)
        rate = found.flops_per_second[torch.float32]
        return Machine(found.name, found.bytes_per_second, dict.fromkeys((torch.bfloat16, torch.float32), rate))


def count_nodes(dot: str) -> int | None:
    """Nodes of a CUDA graph in the form in which CUDA prints it; None where the text is not in that form."""
    return len(re.findall(r'^\s*"graph_\d+_node_\d+"\s*\[', dot, re.MULTILINE)) or None


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError in the block once it has taken so long. Main thread only."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    before: Callable[..., object] | int | None = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 1.0)  # again, where what was raised has been swallowed
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
