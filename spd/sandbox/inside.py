"""The program's process: it gives up what it can, runs the program and its tests, and says how that went."""

from __future__ import annotations

import os
import sys

from spd.sandbox import confinement

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any

REASON_LENGTH = 300
"""Characters of a reason."""


def enter(
    job: dict[str, Any], user: int | None, layers: dict[str, str], *, written: int, said: int, nonce_read: int
) -> None:
    """Confine this process, fresh from the fork, and run the job. Does not return.

    Args:
        job: see `supervisor.supervise`.
        user: the unprivileged user to become, if any.
        layers: what `confinement.before_fork` reached.
        written: where the program's output goes.
        said: where this process talks to its supervisor.
        nonce_read: where the supervisor answers.
    """
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        for descriptor, source in ((0, nothing), (1, written), (2, written)):
            os.dup2(source, descriptor)
        os.close(nothing)
        os.close(written)
        os.chdir(job["folder"])  # again: a file system of its own may lie there now
        for name, why in confinement.after_fork(job, user, layers).items():
            os.write(said, f"layer {name} {why}\n".encode())
    except BaseException as error:
        os.write(said, f"broken {_line(error)}\n".encode())
        os._exit(1)
    for name in [name for name in sys.modules if name.partition(".")[0] == "spd"]:
        del sys.modules[name]
    sys.argv[:] = [""]
    run(job["program"], job["tests"], f"out of memory (limit {job['memory'] >> 20} MiB)", said, nonce_read)


def run(program: str, tests: str, out_of_memory: str, said: int, nonce_read: int) -> None:
    """Run the program and then the tests in one module, and say what `supervisor.Watch` expects."""
    # A program may replace any of these; names held here are not affected.
    execute, write, read, leave, failure, hook = exec, os.write, os.read, os._exit, BaseException, sys.__excepthook__
    describe, trim, streams = _reason, _inner, (sys.stdout, sys.stderr)
    no_memory = f"failed {out_of_memory}\n".encode()
    module = type(sys)("program")
    sys.modules["program"] = sys.modules["__main__"] = module
    write(said, b"started\n")
    try:
        sources = ((program, "<program>"), (tests, "<tests>"))
        for code in [compile(text, name, "exec", dont_inherit=True, optimize=0) for text, name in sources]:
            execute(code, module.__dict__)
        for stream in streams:
            stream.flush()
        write(said, b"ended\n")
        write(said, read(nonce_read, 64) + b"\n")
    except MemoryError:
        write(said, no_memory)
    except failure as error:
        reason = describe(error, tests)
        try:
            streams[0].flush()
            hook(type(error), error.with_traceback(trim(error.__traceback__)), None)
        except failure:
            pass
        write(said, f"failed {reason}\n".encode("utf-8", errors="replace"))
    leave(0)  # at once: no exit handlers, no waiting for threads


def _reason(error: BaseException, tests: str) -> str:
    if isinstance(error, SystemExit):
        return f"ended before the last test ({_line(error)})"
    if isinstance(error, AssertionError) and not error.args:
        return f"AssertionError: {_last_line(error.__traceback__, tests)}"[:REASON_LENGTH]
    return _line(error)


def _line(error: BaseException) -> str:
    name = type(error).__name__
    try:
        text = " ".join(str(error).split())
    except BaseException:
        return name
    return f"{name}: {text}"[:REASON_LENGTH] if text else name


def _inner(traceback: TracebackType | None) -> TracebackType | None:
    """The traceback from the first frame of the program or its tests; nothing of this file."""
    while traceback is not None and traceback.tb_frame.f_code.co_filename not in ("<program>", "<tests>"):
        traceback = traceback.tb_next
    return traceback


def _last_line(traceback: TracebackType | None, tests: str) -> str:
    """The innermost line of the tests that the traceback passes through."""
    number = 0
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == "<tests>":
            number = traceback.tb_lineno
        traceback = traceback.tb_next
    return tests.splitlines()[number - 1].strip() if number else "in the program"
