"""Files and folders that are whole or absent, and as readable as any other."""

from __future__ import annotations

import os
import sys

import pytest

from spd.files import atomic_file, atomic_folder, write_text


def test_a_folder_is_whole_or_absent(tmp_path):
    with pytest.raises(KeyError), atomic_folder(tmp_path / "out") as temporary:
        (temporary / "half").touch()
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_survives_a_failure(tmp_path):
    write_text(tmp_path / "out", "before")
    with pytest.raises(KeyError), atomic_file(tmp_path / "out") as temporary:
        temporary.write_text("half")
        raise KeyError
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out", "before")]


def test_results_are_as_readable_as_other_files(tmp_path):
    """What mkstemp, mkdtemp and safetensors make is private."""
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "x")
        with atomic_folder(tmp_path / "folder") as temporary:
            (temporary / "below").mkdir(mode=0o700)
            (temporary / "below" / "weights").touch(mode=0o600)
    finally:
        os.umask(before)
    modes = {path.relative_to(tmp_path).as_posix(): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"file": 0o640, "folder": 0o750, "folder/below": 0o750, "folder/below/weights": 0o640}


@pytest.mark.skipif(sys.platform != "linux", reason="finds a handle's file under /proc")
def test_bytes_are_on_the_disk_before_they_take_their_name(tmp_path, monkeypatch):
    done = []
    fsync, rename, replace = os.fsync, os.rename, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda handle: done.append(os.readlink(f"/proc/self/fd/{handle}")) or fsync(handle)
    )
    monkeypatch.setattr(os, "rename", lambda *names: done.append("rename") or rename(*names))
    monkeypatch.setattr(os, "replace", lambda *names: done.append("rename") or replace(*names))
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "weights").touch()
    write_text(tmp_path / "file", "x")
    weights, folder, first, file, second = done
    assert (weights, first, second) == (f"{folder}/weights", "rename", "rename")
    assert os.path.dirname(file) == os.path.dirname(folder) == str(tmp_path)
