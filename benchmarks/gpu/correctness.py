"""The stages that come before any figure: the kernels' tests on the device, and a memory checker over small cases."""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Case
from benchmarks.gpu.measure import Rig, Truth
from spd_kernels import launch

LOG = "tests.txt"
ROOT = Path(__file__).parents[2]
# What compiles for other devices has nothing to do with this one.
TESTS = ("tests/spd_kernels", "--ignore=tests/spd_kernels/test_aot.py")
REHEARSED_TESTS = ("tests/spd_kernels/test_launch.py", "-k", "addressed_in_place")
MOST_WORKERS = 12
_OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
_TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def run_tests(folder: Path, seconds: float, *, rehearsal: bool) -> dict[str, Any]:
    """Run pytest on the device in a process of its own; what came out, with `green` only if everything passed."""
    seed = secrets.randbelow(10**6)
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "--color=no", "-p", "no:cacheprovider"]
    command += REHEARSED_TESTS if rehearsal else TESTS
    workers = 1 if rehearsal else min(MOST_WORKERS, (os.cpu_count() or 2) - 2)
    if workers > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(workers)]
    if importlib.util.find_spec("hypothesis") is not None:
        command.append(f"--hypothesis-seed={seed}")
    variables = environment(rehearsal) | {"SPD_KERNELS_TEST_SEED": str(seed)}
    del variables[launch.ENVIRONMENT]  # the tests say themselves what they test
    start = time.monotonic()
    code = _logged(command, folder / LOG, seconds, variables)
    found = tally((folder / LOG).read_text(encoding="utf-8", errors="replace"))
    return found | {
        "green": code == 0 and found["passed"] > 0,
        "exit_code": code,
        "finished": code is not None,
        "seed": seed,
        "seconds": time.monotonic() - start,
        "command": " ".join(command[1:]),
    }


def tally(log: str) -> dict[str, Any]:
    """Outcomes in pytest's verbose output, also by element type and by file, and the names of what failed."""
    outcomes: Counter[str] = Counter()
    by_type: Counter[str] = Counter()
    by_file: Counter[str] = Counter()
    failed = []
    for line in log.partition("short test summary info")[0].splitlines():
        outcome, test = _OUTCOME.search(line), re.search(r"tests/\S+\.py::.*", line)
        if outcome is None or test is None:
            continue
        name = test[0].split(" PASSED")[0].split(" FAILED")[0].split(" ERROR")[0].rstrip()
        outcomes[outcome[1]] += 1
        if outcome[1] in ("FAILED", "ERROR"):
            failed.append(name)
        elif outcome[1] == "PASSED":
            by_file[Path(name.partition("::")[0]).name] += 1
            # "float16" is a part of "bfloat16".
            by_type.update(short for short, long in _TYPES.items() if re.search(rf"(?<!b){long}\b", name))
    return {
        "passed": outcomes["PASSED"],
        "failed": outcomes["FAILED"] + outcomes["ERROR"],
        "skipped": outcomes["SKIPPED"],
        "passed_by_type": dict(by_type),
        "passed_by_file": dict(by_file),
        "failures": failed[:50],
    }


def sanitize(folder: Path, seconds: float, *, rehearsal: bool) -> dict[str, Any]:
    """Run the small cases under compute-sanitizer's memory checker, where there is one."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    command = [sys.executable, "-m", "benchmarks.gpu.child", "check", str(folder), str(seconds)]
    if rehearsal:
        command.append("--rehearse")
    elif tool is None:
        return {"present": False, "clean": None}
    else:
        command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *command]
    # PyTorch's cache of memory would hide a read past the end of a tensor.
    variables = environment(rehearsal) | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    log = folder / ".sanitize.tmp"
    try:
        code = _logged(command, log, seconds, variables)
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    finally:
        log.unlink(missing_ok=True)
    return {
        "present": not rehearsal,
        "clean": None if code is None else code == 0,
        "finished": code is not None,
        "checked": [line.removeprefix("checked ") for line in lines if line.startswith("checked ")],
        "tail": lines[-20:],
    }


def check_small(rig: Rig, cases: Sequence[Case]) -> int:
    """Every small case once against float64; the number of wrong ones."""
    wrong = 0
    for case in cases:
        with torch.no_grad():
            truth = Truth(case, rig.sets(case, 1)[0])
            error = truth.error(case.contenders[case.checked])
        verdict = "" if error <= truth.allowed else f" WRONG: error {error:.2e}, allowed {truth.allowed:.2e}"
        wrong += bool(verdict)
        print(f"checked {case.name}{verdict}", flush=True)
    return wrong


def environment(rehearsal: bool) -> dict[str, str]:
    """Of a stage's process: the kernels by name, interpreted only in a rehearsal."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return inherited | {launch.ENVIRONMENT: "triton"} | ({"TRITON_INTERPRET": "1"} if rehearsal else {})


def _logged(command: Sequence[str], log: Path, seconds: float, variables: dict[str, str]) -> int | None:
    """Exit code of a command whose output goes to a file, or None if it was ended after so many seconds."""
    with open(log, "wb") as file:
        # A session of its own, so that what it started ends with it.
        child = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=variables, start_new_session=True
        )
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, 9)
                child.wait()
