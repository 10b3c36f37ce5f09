"""The files that completions are kept in: appended as they are made, by one process or by several, and resumed.

A process alone appends to `out`. Worker i of n appends to a file of its own beside it, NAME.shard-i-of-n.jsonl; whoever
finds that all prompts are done writes all completions into `out` and removes the workers' files. What was written is
never generated again, whichever file it is in.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self
from zlib import crc32

from spd.errors import InputError, InUse
from spd.files import parse_json, read_jsonl, read_object, regular_file, remove_leftovers, write_json, write_text
from spd.lock import locked

SETTINGS = ".settings.json"
CHECKSUM = "crc32"
"""Of the rest of its line: a disk's wrong bit is no other completion. Lines from elsewhere need none."""
WORKERS = "workers"
"""Beside the settings, until all is merged: the number of the workers, and what their deal of the prompts rests on."""
LONGEST = 1 << 28
"""Bytes in a line: no completion has so many."""
PATIENCE, ALONE = 60.0, 1.0
"""Seconds that a worker waits for another that enters or merges, and that a process alone waits."""


@dataclass(frozen=True)
class Generation:
    """A completion as it was sampled.

    Args:
        index: the prompt's position in what was passed.
        prompt: the prompt.
        completion: the text after it, without the end-of-sequence token.
        tokens: the sampled token ids, the end-of-sequence token included; training takes these, since text does not
            always lead back to the tokens it came from. Empty for text from elsewhere, which is then tokenised.
        finished: whether the model ended by itself, or came to a stop string, rather than at the length limit.
    """

    index: int
    prompt: str
    completion: str
    tokens: list[int]
    finished: bool


def read_generations(path: str | Path) -> list[Generation]:
    """The completions of a finished `out` file, in the order of the prompts.

    Raises:
        InputError: no such file, a line that is not a completion, or a file that a kill left incomplete.
    """
    path = Path(path)
    if not os.path.isfile(path):
        waiting = " yet, its workers have not all finished" if shard_files(path) else ""
        raise InputError(f"generations: there is no file {path}{waiting}")
    try:
        generations = sorted((_generation(record) for record in read_jsonl(path)), key=lambda each: each.index)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: not written by generate ({error})") from None
    settings = path.with_suffix(SETTINGS)
    count = read_object(settings).get("prompts") if os.path.lexists(settings) else len(generations)
    if type(count) is not int:
        raise InputError(f"{settings}: not written by generate (it does not say how many prompts there are)")
    if len(generations) != count or [generation.index for generation in generations] != list(range(count)):
        raise InputError(f"{path}: incomplete, some prompts have no completion yet; run spd generate again")
    return generations


class CompletionsFile:
    """The JSON Lines file behind a resumable generation, what its workers have beside it, and its settings.

    Used in a `with`, which holds the file it appends to for this process alone. Where `out` is finished nothing will be
    written, so nothing is held: it may lie in a folder that can only be read.

    Attributes:
        path: `out`, where all completions come to lie.
        own: the file that is appended to.
        done: the completions that were there on entering, of all workers, by index; and what `append` adds.

    Args:
        path: `out`.
        settings: what the completions depend on.
        prompts: the prompts.
        shard: (i, n): worker i of n, counted from 0.
        batch_size: what prompts are dealt to the workers by, where they are started one by one: with another, some
            prompts would be nobody's. None: they have the same anyway.

    Raises:
        InputError: on entering, where another run uses the files, they were made with other settings or prompts, or
            hold foreign or damaged lines; or other workers of this number were started with another batch size.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        prompts: Sequence[str],
        shard: tuple[int, int] = (0, 1),
        batch_size: int | None = None,
    ) -> None:
        self.path = path
        self.own = shard_path(path, *shard) if shard[1] > 1 else path
        self.done: dict[int, Generation] = {}
        self._settings = settings
        self._prompts = prompts
        self._alone = self.own == path
        self._deal = None if self._alone or batch_size is None else {"count": shard[1], "batch_size": batch_size}
        self._held = ExitStack()

    def __enter__(self) -> Self:
        if self._finished():
            return self
        with ExitStack() as held:
            with ExitStack() as briefly:
                # a process alone keeps `out`; workers keep their own files, and `out` until it is clear who is at work
                (held if self._alone else briefly).enter_context(
                    _patiently(self.path, ALONE if self._alone else PATIENCE)
                )
                self._check_settings()
                if not self._alone:
                    held.enter_context(locked(self.own, "generate"))
                for other in shard_files(self.path):
                    if self._alone or _workers(other) != _workers(self.own):
                        with locked(other, "generate"):  # workers of another number must be gone
                            pass
                for written in (self.path, self._beside):
                    remove_leftovers(written)
                self._write_settings(self._deal)
                if not self._alone:
                    self.own.touch()
            self._read(repair=True)
            self._held = held.pop_all()
        return self

    def __exit__(self, *raised: object) -> None:
        self._held.close()

    @property
    def complete(self) -> bool:
        """Whether every prompt has its completion, as far as this process knows."""
        return len(self.done) == len(self._prompts)

    def append(self, generations: Sequence[Generation]) -> None:
        """Write completions, all the way to the disk."""
        lines = "".join(_line(generation) for generation in generations)
        with open(self.own, "a", encoding="utf-8") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        self.done |= {generation.index: generation for generation in generations}

    def merge(self, order: Sequence[int]) -> bool:
        """Bring all completions together in `out`, in this order, if every prompt has one by now; whether that is so.

        Killed between the two steps, a merge leaves `out` whole and the workers' files beside it; whoever comes next
        removes those.
        """
        if not self.complete:
            self._read()
        if not self.complete:
            return False
        if shard_files(self.path):
            merged = "".join(_line(self.done[index]) for index in order)
            with nullcontext() if self._alone else _patiently(self.path, PATIENCE):
                if beside := shard_files(self.path):  # else another worker has merged them meanwhile
                    write_text(self.path, merged)
                    self._write_settings(None)
                    for each in beside:
                        each.unlink(missing_ok=True)
        return True

    @property
    def _beside(self) -> Path:
        return self.path.with_suffix(SETTINGS)

    def _finished(self) -> bool:
        """Whether `out` holds everything, and nothing else is there; `done` is all of it then."""
        if not (os.path.isfile(self.path) and os.path.isfile(self._beside)) or shard_files(self.path):
            return False
        self._check_settings()
        found, torn = self._lines(self.path)
        if torn is not None or len(found) < len(self._prompts):
            return False
        self.done = found
        return True

    def _check_settings(self) -> None:
        if self._beside.exists():
            found, settings = read_object(self._beside), self._settings
            deal = found.pop(WORKERS, None)
            changed = sorted(key for key in settings.keys() | found.keys() if found.get(key) != settings.get(key))
            if changed:
                raise InputError(
                    f"{self.path}: was made with another {', '.join(changed)}; choose another file or delete this one"
                )
            if self._deal and self._is_another(deal):
                raise InputError(
                    f"batch_size: {self.path} was begun by {deal['count']} workers with {deal.get('batch_size')}, "
                    f"got {self._deal['batch_size']}; use the same, or another number of workers for all"
                )
        elif self.path.exists() or shard_files(self.path):
            raise InputError(f"{self.path}: exists but was not written by generate ({self._beside.name} is missing)")

    def _is_another(self, deal: Any) -> bool:
        """Whether workers of this number, who have left something, had their prompts by another deal."""
        assert self._deal is not None
        return (
            isinstance(deal, dict)
            and deal.get("count") == self._deal["count"]
            and deal != self._deal
            and any(_workers(each) == _workers(self.own) for each in shard_files(self.path))
        )

    def _write_settings(self, deal: dict[str, int] | None) -> None:
        settings = self._settings | ({WORKERS: deal} if deal else {})
        if not self._beside.exists() or read_object(self._beside) != settings:
            write_json(self._beside, settings)

    def _read(self, repair: bool = False) -> None:
        """All that is there. `out` is read last: a merge writes it before it removes the others."""
        for path in [*shard_files(self.path), self.path]:
            found, torn = self._lines(path)
            if repair and torn is not None and path == self.own:
                with suppress(FileNotFoundError), open(path, "r+b") as file:  # merged by another worker meanwhile
                    file.truncate(torn)
                    os.fsync(file.fileno())
            self.done |= found

    def _lines(self, path: Path) -> tuple[dict[int, Generation], int | None]:
        """The whole lines of a file, and where a last one begins that a kill left torn, which does not count."""
        found: dict[int, Generation] = {}
        whole = 0
        with ExitStack() as opened:
            try:
                file = opened.enter_context(regular_file(path))
            except InputError:
                if not os.path.lexists(path):  # not yet made, or merged by another worker meanwhile
                    return {}, None
                raise
            for number, line in enumerate(iter(partial(file.readline, LONGEST), b""), start=1):
                if not line.endswith(b"\n") and len(line) < LONGEST:
                    return found, whole
                try:
                    generation = _generation(parse_json("not JSON", line))
                    matches = self._prompts[generation.index] == generation.prompt and generation.index not in found
                except (ValueError, TypeError, IndexError):
                    matches = False
                if not matches:
                    raise InputError(f"{path}, line {number}: not a completion of these prompts; delete the file")
                found[generation.index] = generation
                whole += len(line)
        return found, None


def shard_path(path: Path, number: int, count: int) -> Path:
    return path.with_name(f"{path.stem}.shard-{number}-of-{count}.jsonl")


def shard_files(path: Path) -> list[Path]:
    """The workers' files beside `out`."""
    name = re.compile(re.escape(path.stem) + r"\.shard-\d+-of-\d+\.jsonl")
    if not os.path.isdir(path.parent):
        return []
    return sorted(each for each in path.parent.glob("*.jsonl") if name.fullmatch(each.name))


def _workers(path: Path) -> str:
    """Of how many workers a file is one."""
    return path.stem.rpartition("-of-")[2]


@contextmanager
def _patiently(path: Path, seconds: float) -> Iterator[None]:
    """`locked`, after waiting at most so long for whoever holds it."""
    until = time.monotonic() + seconds
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(locked(path, "generate"))
                break
            except InUse:
                if time.monotonic() >= until:
                    raise
            time.sleep(0.05)
        yield


def _generation(record: Any) -> Generation:
    checksum = record.pop(CHECKSUM, None) if isinstance(record, dict) else None
    found = Generation(**record)
    good = (
        type(found.index) is int
        and found.index >= 0
        and isinstance(found.prompt, str)
        and isinstance(found.completion, str)
        and isinstance(found.tokens, list)
        and all(type(token) is int for token in found.tokens)
        and isinstance(found.finished, bool)
    )
    if not good:
        raise ValueError(f"record {found.index!r} has values of other types")
    if checksum not in (None, _checksum(found)):
        raise ValueError(f"record {found.index}: altered, its {CHECKSUM} is another")
    return found


def _checksum(generation: Generation) -> str:
    return f"{crc32(json.dumps(asdict(generation)).encode()):08x}"


def _line(generation: Generation) -> str:
    return json.dumps(asdict(generation) | {CHECKSUM: _checksum(generation)}) + "\n"
