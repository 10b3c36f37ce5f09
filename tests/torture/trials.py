"""One piece of harm to one run, what must come of it, and what did."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from tests.torture.faults import NONE, Fault
from tests.torture.results import INFORMED, differences, same_value
from tests.torture.sittings import Ending, end_with_parent, sit

GOES_ON = "the same command goes on where it stopped"
_STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}
_REMEDIES = 3
"""What a run may ask for in turn: to delete a damaged file, say, and then what was made with it."""
_PUT_BACK = (
    "config.json: missing, and it says what everything else here was made with; put it back",
    "; put it back (a new run of the same configuration writes the same)",
    "belongs to another configuration (different: ",
)
"""What it says where `config.json` is damaged, which nothing else can tell."""


@dataclass
class Tally:
    """What became of the faults of one kind."""

    kind: str
    tried: int = 0
    resumed: int = 0
    refused: int = 0
    lost: int = 0
    seconds: float = 0.0
    details: list[str] = field(default_factory=list)

    def lose(self, detail: str, count: int = 1) -> None:
        self.lost += count
        self.details.append(detail)

    def settle(self, count: int, what: str, wrong: str | None) -> None:
        """So many faults came to an end of their run, a good one if nothing is wrong."""
        if wrong:
            self.lose(f"{what}: {wrong}", count)
        else:
            self.resumed += count

    def add(self, other: Tally) -> None:
        self.tried += other.tried
        self.resumed += other.resumed
        self.refused += other.refused
        self.lost += other.lost
        self.seconds += other.seconds
        self.details += other.details


@dataclass(frozen=True)
class Bench:
    """What all trials share.

    Args:
        config: of every run.
        wanted: what an undisturbed run leaves.
        finished: its folder.
        half: the folder of a run that was killed in its second training, after the first checkpoint of it.
        seconds: how long an undisturbed run takes.
    """

    config: Path
    wanted: dict[str, str]
    finished: Path
    half: Path
    seconds: float

    def sit(self, folder: Path, fault: Fault = NONE, **more: object) -> Ending:
        return sit(folder, self.config, fault, **more)  # type: ignore[arg-type]

    def finish(self, folder: Path) -> str | None:
        """Start the run once more and let it end; what is wrong with what it leaves, if anything is."""
        ending = self.sit(folder)
        if ending.status:
            return f"does not go on: {ending}"
        return self.wrong(folder)

    def wrong(self, folder: Path) -> str | None:
        """How an ended run differs from an undisturbed one, if it does."""
        return "; ".join(differences(folder, self.wanted)) or None


class Trial(Protocol):
    kind: str

    def run(self, bench: Bench) -> Tally: ...


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        yield Path(folder).resolve()


def wrong_ending(fault: Fault, ending: Ending) -> str | None:
    """What is wrong with how a process ended that a fault struck, if anything is."""
    if fault.action in ("kill", "tear"):
        expected = ending.status == -signal.SIGKILL
    elif fault.action == "full":
        expected = ending.status == 1 and ending.one_line and "disk is full" in ending.said
    else:
        expected = ending.status == _STATUS[fault.number] and ending.one_line and GOES_ON in ending.said
    return None if expected else f"after {fault}: {ending}"


@dataclass(frozen=True)
class Chain:
    """Faults that strike one run after another, each in a sitting of its own; then it is let end."""

    kind: str
    faults: tuple[Fault, ...]

    def run(self, bench: Bench) -> Tally:
        tally, standing = Tally(self.kind), 0
        with scratch() as folder:
            out = folder / "run"
            for fault in self.faults:
                resumed = out.exists()
                ending = bench.sit(out, fault)
                if (
                    ending.status == 0 and resumed
                ):  # an earlier sitting had done that already: again, from the beginning
                    tally.settle(standing, self._before(fault), bench.wrong(out))
                    standing = 0
                    shutil.rmtree(out)
                    ending = bench.sit(out, fault)
                tally.tried += 1
                if ending.status == 0:  # it did without that write
                    tally.settle(1, f"in spite of {fault}", bench.wrong(out))
                    shutil.rmtree(out)
                elif wrong := wrong_ending(fault, ending):
                    tally.lose(wrong)
                else:
                    standing += 1
            if out.exists():
                tally.settle(standing, self._before(None), bench.finish(out))
        return tally

    def _before(self, end: Fault | None) -> str:
        faults = self.faults[: self.faults.index(end)] if end else self.faults
        return f"after {'; '.join(map(str, faults))}"


@dataclass(frozen=True)
class Moments:
    """A signal at moments that no write marks, one sitting each: shares of the time that a whole run takes."""

    kind: str
    number: int
    shares: tuple[float, ...]

    def run(self, bench: Bench) -> Tally:
        tally = Tally(self.kind)
        fault = Fault("kill" if self.number == signal.SIGKILL else "signal", "a moment", number=self.number)
        with scratch() as folder:
            out = folder / "run"
            for share in self.shares:
                ending = bench.sit(out, after=(self.number, share * bench.seconds))
                if ending.status == 0:
                    continue  # it had ended
                tally.tried += 1
                early = ending.status == -self.number  # before the command took charge of it, or after
                if not early and (wrong := wrong_ending(fault, ending)):
                    tally.lose(f"{share:.3f} of a run: {wrong}")
            if wrong := bench.finish(out):
                tally.lose(f"after {fault} {self.shares}: {wrong}", tally.tried - tally.lost)
        tally.resumed = tally.tried - tally.lost
        return tally


@dataclass(frozen=True)
class Damage:
    """One file of a run, changed while nobody looked; the run is started again.

    It may make the file anew or do without; or it refuses, names a file or folder in the run folder, and goes on once
    that is deleted, or what it names next, or is put back if the refusal asks for it.
    """

    kind: str
    state: Literal["finished", "half"]
    file: str
    harm: Literal["emptied", "last byte cut", "bit flipped", "deleted", "made an empty list"]
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.file} of a {self.state} run {self.harm} ({self.seed})"

    def run(self, bench: Bench) -> Tally:
        tally = Tally(self.kind, tried=1)
        with scratch() as folder:
            out = folder / "run"
            shutil.copytree(bench.finished if self.state == "finished" else bench.half, out)
            path = out / self.file
            changed = self._changed(path.read_bytes())
            path.unlink()
            if changed is not None:
                path.write_bytes(changed)
            ending, done = bench.sit(out), []
            while ending.refused and len(done) < _REMEDIES:
                if any(asked in ending.said for asked in _PUT_BACK):
                    shutil.copyfile(bench.finished / self.file, path)
                    done.append(f"{self.file} put back")
                elif named := _named(out, ending.said):
                    shutil.rmtree(named) if named.is_dir() else named.unlink()
                    done.append(f"{named.relative_to(out)} deleted")
                else:
                    break
                ending = bench.sit(out)
            wrong = differences(out, bench.wanted)
            if wrong == [f"{self.file} is another"] and same_value(path, bench.finished / self.file):
                wrong = []  # a final newline is gone, say, and nobody minds
            if ending.status or wrong:
                tally.lose(f"{self}: {', '.join(done) or 'nothing done'}, {ending}; {'; '.join(wrong)}")
            elif done:
                tally.refused += 1
            else:
                tally.resumed += 1
        return tally

    def _changed(self, content: bytes) -> bytes | None:
        if self.harm == "deleted":
            return None
        if self.harm == "made an empty list":
            return b"[]"
        if self.harm == "bit flipped":
            bit = random.Random(f"{self.file} {self.seed}").randrange(8 * len(content))
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            return bytes(flipped)
        return content[: {"emptied": 0, "last byte cut": -1}[self.harm]]


def _named(out: Path, said: str) -> Path | None:
    """What a message names in a run folder: the longest path that is there."""
    there = [path for path in out.rglob("*") if str(path) in said]
    return max(there, key=lambda path: len(str(path)), default=None)


@dataclass(frozen=True)
class RealDisk:
    """A disk of so many bytes, which is full at some time; then it is enlarged."""

    kind: str
    size: int

    def run(self, bench: Bench) -> Tally:
        tally = Tally(self.kind)
        with scratch() as folder, _disk(folder, self.size):
            ending = bench.sit(folder / "run")
            if ending.status:
                tally.tried += 1
                wrong = wrong_ending(Fault("full", f"a disk of {self.size} bytes"), ending)
                subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
                tally.settle(1, f"a disk of {self.size} bytes", wrong or bench.finish(folder / "run"))
        return tally

    @staticmethod
    def why_not() -> str | None:
        """Why no disk can be made on this machine, if so."""
        try:
            with scratch() as folder, _disk(folder, 1 << 20):
                return None
        except OSError as error:
            return str(error)


@contextmanager
def _disk(folder: Path, size: int) -> Iterator[None]:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        raise OSError(" ".join(mounted.stderr.split()) or "mount fails")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@dataclass(frozen=True)
class Together:
    """A second run on a folder that a first one holds, begun so much later (a share of a whole run)."""

    kind: str
    share: float

    def run(self, bench: Bench) -> Tally:
        tally = Tally(self.kind, tried=1)
        with scratch() as folder:
            out = folder / "run"
            first = os.fork()
            if first == 0:
                end_with_parent()
                os._exit(bench.sit(out).status)
            while not (out / "config.json").exists():
                time.sleep(0.005)
            time.sleep(self.share * bench.seconds)
            running = os.waitpid(first, os.WNOHANG)[0] == 0
            second = bench.sit(out)
            status = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) if running else 0
            wrong = "; ".join(differences(out, bench.wanted))
            if status or wrong:
                tally.lose(f"the first of two runs: status {status}, {wrong}")
            elif not running:
                tally.tried = 0
            elif second.refused and "in use by another run" in second.said and "process " in second.said:
                tally.refused += 1
            else:
                tally.lose(f"the second of two runs: {second}")
        return tally


@dataclass(frozen=True)
class StaleLock:
    """A lock file that nobody holds: it must not even be mentioned."""

    kind: str
    content: bytes

    def run(self, bench: Bench) -> Tally:
        tally = Tally(self.kind, tried=1)
        with scratch() as folder:
            (folder / "run").mkdir()
            (folder / "run" / ".lock").write_bytes(self.content)
            ending = bench.sit(folder / "run")
            wrong = (
                str(ending)
                if ending.status or ending.said.strip()
                else "; ".join(differences(folder / "run", bench.wanted))
            )
            if wrong:
                tally.lose(f"a stale lock of {self.content!r:.40}: {wrong}")
            else:
                tally.resumed += 1
        return tally


@dataclass(frozen=True)
class CommandLine:
    """`python -m spd run`, as a user starts it, and a signal when a certain file is there; then again, to the end."""

    kind: str
    number: int
    file: str
    profile: bool = False

    def run(self, bench: Bench) -> Tally:
        tally = Tally(self.kind)
        with scratch() as folder:
            out = folder / "run"
            command = [sys.executable, "-m", "spd", "run", str(bench.config), "--out", str(out), "--quiet"]
            command += ["--profile"] if self.profile else []
            wanted = bench.wanted | ({"profile.json": INFORMED} if self.profile else {})
            begin = time.monotonic()
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=end_with_parent
            )
            while process.poll() is None and not (out / self.file).exists():
                time.sleep(0.005)
            process.send_signal(self.number)
            said = process.communicate()[1]
            ending = Ending(process.returncode, said, time.monotonic() - begin)
            if ending.status == 0:
                return tally
            tally.tried += 1
            fault = Fault("kill" if self.number == signal.SIGKILL else "signal", self.file, number=self.number)
            wrong = wrong_ending(fault, ending)
            again = subprocess.run(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=end_with_parent
            )
            wrong = wrong or (f"does not go on: {again.stderr}" if again.returncode else None)
            # a process of its own keeps checkpoints as seldom as users' do, so its folder is compared, not its way
            tally.settle(1, "the command itself", wrong or "; ".join(differences(out, wanted)) or None)
        return tally
