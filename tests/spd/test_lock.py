"""One process at a time on a run folder, a file of completions, an adapter."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import spd
from spd.files import atomic_folder
from spd.lock import INSIDE, locked

HOLD = """
import sys, time
from pathlib import Path
from spd.lock import locked
with locked(Path(sys.argv[1]), "out"):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def another_process_holds(path: Path) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", HOLD, str(path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_the_second_process_is_told_who_holds_it(tmp_path):
    out = tmp_path / "new" / "out.jsonl"
    with another_process_holds(out) as process:
        with (
            pytest.raises(spd.InputError, match=r"^out: .*out\.jsonl is in use by another run") as refused,
            locked(out, "out"),
        ):
            pass
        assert f"process {process.pid} on {os.uname().nodename}, since 20" in str(refused.value)
        assert "\n" not in str(refused.value)
        assert process.poll() is None
    with locked(out, "out"):  # it has just been killed
        pass


def test_what_a_killed_process_left_is_taken_over_and_goes(tmp_path):
    out, lock = tmp_path / "out", tmp_path / ".out.lock"
    with another_process_holds(out) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert json.loads(lock.read_text())["pid"] == process.pid
        with locked(out, "out"):
            assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert not lock.exists()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[]", b'{"pid": "many"}', b'{"pid": 1}', b"9" * 10_000])
def test_a_lock_file_of_garbage_locks_nothing_and_breaks_no_message(tmp_path, content):
    lock = tmp_path / INSIDE
    lock.write_bytes(content)
    with locked(lock, "run folder"):
        lock.write_bytes(content)
        with (
            pytest.raises(spd.InputError, match=f"^run folder: {tmp_path} is in use by another run$"),
            locked(lock, "run folder"),
        ):
            pass
    assert not lock.exists()


def test_another_thread_of_this_process_is_refused_too(tmp_path):
    refused = []

    def contend() -> None:
        try:
            with locked(tmp_path / "out", "out"):
                pass
        except spd.InputError as error:
            refused.append(str(error))

    with locked(tmp_path / "out", "out"):
        thread = threading.Thread(target=contend)
        thread.start()
        thread.join()
    assert len(refused) == 1
    assert f"process {os.getpid()} " in refused[0]


def test_what_lies_in_a_locked_folder_can_be_locked_and_the_lock_ends_with_an_exception(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / INSIDE, "run folder"), locked(tmp_path / "out", "out"):
        raise KeyError
    assert not list(tmp_path.iterdir())
    with locked(tmp_path / INSIDE, "run folder"):
        pass


def test_a_folder_that_is_made_under_its_lock_is_no_litter(tmp_path):
    out = tmp_path / "adapter"
    with locked(out, "out"):
        with atomic_folder(out) as temporary:
            (temporary / "weights").touch()
        assert [path.name for path in out.iterdir()] == ["weights"]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_where_nothing_can_be_written_it_says_so_in_one_line(tmp_path):
    tmp_path.chmod(0o555)
    folder = tmp_path if os.geteuid() else Path("/sys")  # which refuses new files even to root
    with (
        pytest.raises(spd.InputError, match=f"^out: {folder}/out cannot be locked, {folder}/.out.lock: ") as refused,
        locked(folder / "out", "out"),
    ):
        pass
    assert "\n" not in str(refused.value)
    tmp_path.chmod(0o755)


def test_a_file_system_without_locks_is_refused_and_nothing_is_left_there(tmp_path, monkeypatch):
    """A marker in place of the kernel's lock would outlive a killed process, and lock for ever."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.raises(spd.InputError, match=r"^out: .* its file system has no file locks"),
        locked(tmp_path / "o", "out"),
    ):
        pass
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    with locked(tmp_path / "o", "out"):
        pass


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("years of work")
    (tmp_path / ".out.lock").symlink_to(precious)
    with pytest.raises(spd.InputError, match="cannot be locked"), locked(tmp_path / "out", "out"):
        pass
    assert precious.read_text() == "years of work"


def test_a_crowd_enters_one_at_a_time(tmp_path):
    """Each adds one to a number in a file, read and written apart: a lock that two hold at once loses some."""
    count = tmp_path / "count"
    count.write_text("0")
    script = """
import sys
from pathlib import Path
from spd.errors import InputError
from spd.lock import locked
count, entered = Path(sys.argv[1]), 0
while entered < 100:
    try:
        with locked(count, "count"):
            count.write_text(str(int(count.read_text()) + 1))
            entered += 1
    except InputError:
        pass
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    crowd = [subprocess.Popen([sys.executable, "-c", script, str(count)], env=environment) for _ in range(3)]
    assert [process.wait(timeout=60) for process in crowd] == [0, 0, 0]
    assert count.read_text() == "300"
