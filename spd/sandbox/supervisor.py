"""The process between the host and a program: it keeps the time, the output and the verdict, and leaves nothing alive.

It is a fresh interpreter that imports little, because hundreds are started. The program runs in its fork.
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]  # `signal` imports enum: a tenth of the start
import marshal
import os
import select
import sys
import time

from spd.sandbox import confinement, inside

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

OUTPUT_KEPT = 2048
"""Bytes kept of the output's beginning, and of its end."""
OUTPUT_LIMIT = 16 << 20
"""Bytes of output after which a program is stopped."""
CHANNEL_LIMIT = 1 << 16
"""Bytes that a program's process may say to its supervisor."""
START_UP = 30.0
"""Seconds until the program has to be running."""


def main() -> None:
    job = marshal.load(sys.stdin.buffer)
    report = marshal.dumps(supervise(job))
    sys.stdout.buffer.write(report)
    sys.stdout.buffer.flush()
    os._exit(0)  # there is nothing to tidy up


def supervise(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job: program, tests, timeout, memory, folder, and names of layers to leave out.

    Returns:
        passed, reason, seconds, output, and `layers`: for each layer of the confinement why it does not hold, or "".
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a handler would let a program's signal in, see `become_first`
    layers, user = confinement.before_fork(job["folder"], job["without"])
    if not layers["namespaces"]:
        confinement.become_first()
    output, written = os.pipe()
    heard, said = os.pipe()
    nonce_read, nonce_written = os.pipe()
    program = os.fork()
    if program == 0:
        try:
            for end in (output, heard, nonce_written):
                os.close(end)
            inside.enter(job, user, layers, written=written, said=said, nonce_read=nonce_read)
        finally:
            os._exit(1)
    for end in (written, said, nonce_read):
        os.close(end)
    watch = Watch(output, heard, nonce_written, job["timeout"], layers)
    try:
        watch.until_the_end()
    finally:
        status, gone = confinement.kill_all(program, patience=0.5 if watch.reason is None else 0.0)
    layers["reaping"] = layers["reaping"] or ("" if gone else "processes went on appearing")
    watch.read_output()
    watch.stopped = watch.stopped or time.monotonic()
    return {
        "passed": watch.passed,
        "reason": watch.reason or end_by(status, job["timeout"]),
        "seconds": watch.stopped - (watch.started or watch.stopped),
        "output": watch.kept(),
        "layers": layers,
    }


class Watch:
    """Listens to a program's process until there is a verdict or the process has fallen silent.

    The process says, a line each: `layer NAME WHY` while it confines itself, `started`, and then `failed REASON` or
    `ended`. To `ended` the answer is a number made at this moment, and only its echo is a pass.

    What that covers: whatever ends a program early, by whatever door (exit, signal, crash, a closed descriptor), is no
    pass, and before the tests are over there is nothing in memory, files, arguments or environment worth printing. What
    it does not: the program shares an interpreter with its tests, so one that was written against this file can take
    part in the exchange, as one can also make all objects equal. Nothing inside one process prevents that.
    """

    def __init__(self, output: int, heard: int, nonce_written: int, timeout: float, layers: dict[str, str]) -> None:
        self._output, self._heard, self._nonce_written = output, heard, nonce_written
        self._timeout, self._layers = timeout, layers
        self._deadline = time.monotonic() + START_UP
        self._line, self._said, self._nonce = b"", 0, b""
        self._first, self._last, self._length = b"", b"", 0
        self.passed = False
        self.reason: str | None = None
        """Why the run ended; None where the process fell silent and its exit status has to say."""
        self.started: float | None = None
        self.stopped: float | None = None
        os.set_blocking(output, False)

    def until_the_end(self) -> None:
        poll = select.poll()
        for descriptor in (0, self._output, self._heard):
            poll.register(descriptor, select.POLLIN)
        listening = True
        while listening and self.reason is None:
            left = self._deadline - time.monotonic()
            if left <= 0:
                self.reason = f"timed out after {self._timeout:g} s" if self.started else "did not start"
                break
            for descriptor, _ in poll.poll(left * 1000):
                if descriptor == 0:
                    self.reason = "the caller has gone"
                elif descriptor == self._heard:
                    listening = self._listen()
                elif not self.read_output():
                    poll.unregister(self._output)
        self.stopped = time.monotonic()

    def _listen(self) -> bool:
        """Take what the process says; False when it says no more."""
        text = os.read(self._heard, 4096)
        self._said += len(text)
        *lines, self._line = (self._line + text).split(b"\n")
        for line in lines:
            if self.reason is None:
                self._hear(line)
        if self._said > CHANNEL_LIMIT:
            self.reason = self.reason or "spoke to its supervisor"
        return bool(text)

    def _hear(self, line: bytes) -> None:
        word, _, rest = line.decode("utf-8", errors="replace").partition(" ")
        if self.started is None:
            if word == "layer":
                name, _, why = rest.partition(" ")
                self._layers[name] = why
            elif word == "started":
                self.started = time.monotonic()
                self._deadline = self.started + self._timeout
            else:
                raise RuntimeError(f"a program's process could not be confined: {rest}")
        elif word == "failed":
            self.reason = rest
        elif word == "ended" and not self._nonce:
            self._nonce = os.urandom(16).hex().encode()
            os.write(self._nonce_written, self._nonce)
        elif self._nonce and line == self._nonce:
            self.passed, self.reason = True, "passed"
        else:
            self.reason = "spoke to its supervisor"

    def read_output(self) -> bool:
        """Take what has been written so far; False when all writers are gone."""
        while True:
            try:
                text = os.read(self._output, 1 << 16)
            except BlockingIOError:
                return True
            if not text:
                return False
            self._first += text[: OUTPUT_KEPT - len(self._first)]
            self._last = (self._last + text)[-OUTPUT_KEPT:]
            self._length += len(text)
            if self._length > OUTPUT_LIMIT:
                self.reason = self.reason or f"wrote more than {OUTPUT_LIMIT >> 20} MiB of output"
                return True

    def kept(self) -> bytes:
        """The output; its middle is left out where it is long."""
        new = self._length - len(self._first)
        if new <= len(self._last):
            return self._first + self._last[len(self._last) - new :]
        return b"%s\n[... %d bytes ...]\n%s" % (self._first, new - len(self._last), self._last)


def end_by(status: int | None, timeout: float) -> str:
    """Why a process that said nothing more has ended; None: it had not."""
    if status is None:
        return "closed the channel to its supervisor"
    if not os.WIFSIGNALED(status):
        return f"ended before the last test (exit status {os.waitstatus_to_exitcode(status)})"
    number = os.WTERMSIG(status)
    if number == signal.SIGXCPU:
        return f"timed out after {timeout:g} s of computing"
    if number == signal.SIGKILL:
        return "killed (out of memory?)"
    names = [name for name in dir(signal) if name.startswith("SIG") and getattr(signal, name) == number]
    return f"killed by {names[0] if names else f'signal {number}'}"
