"""Run programs against their tests: one fresh supervisor and one temporary folder for each."""

from __future__ import annotations

import functools
import marshal
import math
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.abc import InspectLoader
from types import CodeType
from typing import Any

from spd.errors import InputError
from spd.progress import bar

TIMEOUT = 10.0
"""Seconds a program and its tests may take together."""
MEMORY = 1 << 30
"""Bytes of address space."""

# The interpreter is started as by -I (no user site, no folder of the script or the caller), except that it reads the
# PYTHON* variables, which are all ours: with a fixed hash seed a verdict repeats. It gets its code from standard input:
# spd may not be on its path, and what spd imports would take longer than all else.
COMMAND = ("-P", "-s", "-c", "import marshal, sys; exec(marshal.load(sys.stdin.buffer))")
START = """
for name, code in marshal.load(sys.stdin.buffer):
    sys.modules[name] = type(sys)(name)
    exec(code, sys.modules[name].__dict__)
sys.modules["spd.sandbox.supervisor"].main()
"""
MODULES = ("spd.sandbox.seccomp", "spd.sandbox.confinement", "spd.sandbox.inside", "spd.sandbox.supervisor")
ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "PATH": os.defpath,
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
    "MALLOC_ARENA_MAX": "1",  # an arena for each thread would use up the address space
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
INHERITED = ("LD_LIBRARY_PATH", "PYTHONHOME")
"""Variables without which some interpreters do not start."""
VISIBLE = {*ENVIRONMENT, *INHERITED, "HOME", "TMPDIR"}
"""All that a program sees."""
GRACE = 60.0
"""Seconds beyond the time limit after which a silent supervisor is given up."""

switched_off: frozenset[str] = frozenset()
"""Layers that the tests leave out, to see the others hold alone: see `supervisor.supervise`."""


@dataclass(frozen=True)
class Verdict:
    """What became of a program.

    Args:
        passed: it reached the end of the last test.
        reason: one line: "passed", or what went wrong.
        seconds: how long program and tests took.
        output: what they wrote, standard error included, cut to a few KB.
    """

    passed: bool
    reason: str
    seconds: float
    output: str


def run_tests(program: str, tests: str, *, timeout: float = TIMEOUT, memory: int = MEMORY) -> Verdict:
    """Run `program` and then `tests` in a sandbox.

    Both are run in one module that is called `program` (also found as `__main__`), like an import of the program, so
    that an `if __name__ == "__main__":` block is skipped. Standard input is empty. New processes are refused.

    Args:
        program: Python source.
        tests: Python source: imports and `assert` statements.
        timeout: limit in seconds for both together, by the clock on the wall.
        memory: limit of the address space, in bytes.

    Raises:
        InputError: unusable arguments, or a system without `fork`.
    """
    return _verdict(supervised(program, tests, timeout=timeout, memory=memory))


def run_many(
    programs: Sequence[tuple[str, str]],
    *,
    workers: int | None = None,
    timeout: float = TIMEOUT,
    memory: int = MEMORY,
    progress: bool = True,
    label: str = "run programs",
) -> list[Verdict]:
    """`run_tests` for many pairs of program and tests, in parallel; verdicts in their order.

    Args:
        programs: pairs of program and tests.
        workers: programs at a time (default: one for each core).
        timeout: as for `run_tests`.
        memory: as for `run_tests`.
        progress: show a bar.
        label: what the bar says.

    Raises:
        InputError: as `run_tests`.
    """
    if workers is not None and workers < 1:
        raise InputError(f"workers: expected a positive number, got {workers}")
    with (
        bar(total=len(programs), label=label, unit="program", show=progress) as shown,
        ThreadPoolExecutor(workers or _cores()) as pool,
    ):
        runs = [pool.submit(run_tests, *pair, timeout=timeout, memory=memory) for pair in programs]
        try:
            for each in as_completed(runs):
                each.result()
                shown.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [each.result() for each in runs]


def supervised(program: str, tests: str, *, timeout: float, memory: int) -> dict[str, Any]:
    """One run: the supervisor's report, as `supervisor.supervise` gives it."""
    _check(program, tests, timeout, memory)
    with _folder() as folder:
        job = {
            "program": program,
            "tests": tests,
            "timeout": float(timeout),
            "memory": memory,
            "folder": folder,
            "without": sorted(switched_off),
        }
        inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
        with subprocess.Popen(
            [sys.executable, *COMMAND],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env=ENVIRONMENT | inherited | {"HOME": folder, "TMPDIR": folder},
            start_new_session=True,
        ) as supervisor:
            try:
                answer = _ask(supervisor, _supervisor() + marshal.dumps(job), timeout + GRACE)
            finally:
                supervisor.kill()  # has ended already, or must
            if answer:
                report: dict[str, Any] = marshal.loads(answer)
                return report
            assert supervisor.stderr is not None
            complaint = supervisor.stderr.read().decode(errors="replace").strip()
            if complaint:
                raise RuntimeError(f"the sandbox failed: {complaint}")
            return {"passed": False, "reason": "its supervisor was killed", "seconds": 0.0, "output": b"", "layers": {}}


@functools.cache
def _supervisor() -> bytes:
    """The supervisor's modules, each after those that it imports, ready to be executed."""
    modules: list[tuple[str, CodeType | None]] = []
    for name in ("spd", "spd.sandbox"):  # empty: their own would import too much
        modules.append((name, compile("", name, "exec")))
    for name in MODULES:
        loader = import_module(name).__loader__
        assert isinstance(loader, InspectLoader)
        modules.append((name, loader.get_code(name)))
    return marshal.dumps(compile(START, "<start>", "exec")) + marshal.dumps(modules)


def _ask(supervisor: subprocess.Popen[bytes], job: bytes, patience: float) -> bytes:
    """Hand over the job and read the report. Standard input stays open: the supervisor ends when it closes."""
    assert supervisor.stdin is not None and supervisor.stdout is not None
    try:
        supervisor.stdin.write(job)
        supervisor.stdin.flush()
    except BrokenPipeError:
        return b""
    with selectors.DefaultSelector() as selector:
        selector.register(supervisor.stdout, selectors.EVENT_READ)
        return supervisor.stdout.read() if selector.select(patience) else b""


def _verdict(report: dict[str, Any]) -> Verdict:
    output = report["output"].decode("utf-8", errors="replace")
    return Verdict(report["passed"], report["reason"], report["seconds"], output)


def _check(program: str, tests: str, timeout: float, memory: int) -> None:
    if not hasattr(os, "fork"):
        raise InputError(f"platform: generated code runs on Linux and macOS only, this is {sys.platform}")
    for name, text in (("program", program), ("tests", tests)):
        if not isinstance(text, str):
            raise InputError(f"{name}: expected Python source, got {text!r:.60}")
    if not (math.isfinite(timeout) and timeout > 0):
        raise InputError(f"timeout: expected a positive number of seconds, got {timeout!r}")
    if memory < 64 << 20:
        raise InputError(f"memory: expected at least {64 << 20} bytes (64 MiB, what Python takes), got {memory!r}")


@contextmanager
def _folder() -> Iterator[str]:
    """A temporary folder. Trees too deep for shutil, which a program may leave, are removed by rm."""
    folder = tempfile.TemporaryDirectory(prefix="spd-sandbox-", ignore_cleanup_errors=True)
    try:
        yield folder.name
    finally:
        try:
            folder.cleanup()
        except RecursionError:
            if rm := shutil.which("rm"):
                subprocess.run([rm, "-rf", folder.name], check=False, capture_output=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
