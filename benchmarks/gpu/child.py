"""One stage in a process of its own, so that a kernel that breaks its CUDA context breaks that stage alone."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.gpu import contest, correctness, tune
from benchmarks.gpu.measure import Gpu, Rehearsal, Rig
from benchmarks.gpu.results import Results
from benchmarks.operations import gpu_cases, small_cases, tiny_cases


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.child", description=__doc__)
    parser.add_argument("stage", choices=("tune", "time", "check", "compile"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--only", default="")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--share", type=int, default=0)
    parser.add_argument("--of", type=int, default=1)
    options = parser.parse_args()

    rig: Rig = Rehearsal() if options.rehearse else Gpu()
    kind = tiny_cases if options.rehearse else small_cases if options.stage == "check" else gpu_cases
    chosen = kind(only=options.only)
    match options.stage:
        case "tune":
            tune.run(rig, chosen, options.folder, options.seconds, options.only)
        case "time":
            contest.run(rig, chosen, Results(options.folder), options.seconds)
        case "check":
            return 1 if correctness.check_small(rig, chosen) else 0
        case "compile":
            tune.compile_share(rig, chosen, options.share, options.of, options.seconds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
