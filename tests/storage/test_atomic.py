"""The writer: output is whole or absent, whatever fails and whenever the program dies."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from demerge.errors import ResourceError, UsageError
from demerge.storage.atomic import (
    append_line,
    commit_dir,
    commit_file,
    commit_json,
    commit_text,
    sha256,
    truncate,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, str]]:
    """The order of fsync and rename: ("sync", file or folder) and ("rename", its new name)."""
    seen: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def note_sync(descriptor: int) -> None:
        seen.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def note_rename(function):
        def wrapped(source, target) -> None:
            seen.append(("rename", os.path.basename(target)))
            function(source, target)

        return wrapped

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "rename", note_rename(rename))
    monkeypatch.setattr(os, "replace", note_rename(replace))
    return seen


# -- order and durability ---------------------------------------------------------------------------------------------


def test_a_file_is_synced_before_the_rename_and_its_folder_after(tmp_path, calls):
    commit_text(tmp_path / "a.txt", "new")
    assert calls == [
        ("sync", f".a.txt.{os.getpid()}.tmp"),
        ("rename", "a.txt"),
        ("sync", tmp_path.name),
    ]


def test_all_in_a_folder_is_synced_before_the_rename_and_its_parent_after(tmp_path, calls):
    with commit_dir(tmp_path / "d") as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "x").write_bytes(b"1")
        (temporary / "y").write_bytes(b"2")
    synced = [name for kind, name in calls[: calls.index(("rename", "d"))] if kind == "sync"]
    assert sorted(synced) == sorted(["inner", "x", "y", f".d.{os.getpid()}.tmp"])
    assert calls[-1] == ("sync", tmp_path.name)


def test_what_was_written_is_what_is_read(tmp_path):
    path = commit_json(tmp_path / "deep" / "a.json", {"b": 1, "a": "ü"})
    assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.read_text(encoding="utf-8") == '{\n  "b": 1,\n  "a": "ü"\n}\n'
    assert (
        sha256(tmp_path / "deep" / "a.json")
        == hashlib.sha256((tmp_path / "deep" / "a.json").read_bytes()).hexdigest()
    )
    assert names(tmp_path / "deep") == ["a.json"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        commit_json(tmp_path / "nan.json", float("nan"))


def test_logs_append_and_are_cut(tmp_path):
    log = tmp_path / "log.jsonl"
    append_line(log, "one")
    size = log.stat().st_size
    append_line(log, "two\n")
    assert log.read_text() == "one\ntwo\n"
    truncate(log, size)
    assert log.read_text() == "one\n"


def test_the_umask_is_respected(tmp_path):
    before = os.umask(0o027)
    try:
        commit_text(tmp_path / "a", "x")
        with commit_dir(tmp_path / "d"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o750


@pytest.mark.parametrize("name", ["a b", "数据", "a[1]*?", "x.tmp", "-rf"])
def test_odd_names(tmp_path, name):
    (tmp_path / f".{name}.999999999.tmp").write_text("stray")
    commit_text(tmp_path / name, "x")
    assert names(tmp_path) == [name]


# -- what fails -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", range(4))
def test_a_full_disk_at_the_kth_write_keeps_the_old_file(tmp_path, k):
    path = commit_text(tmp_path / "a.bin", "old")

    def write(stream) -> None:
        for i in range(4):
            if i == k:
                raise OSError(errno.ENOSPC, "No space left on device")
            stream.write(b"new")

    with pytest.raises(ResourceError, match=r"a\.bin: the disk is full \([\d,]+ bytes free\)"):
        commit_file(path, write)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_system_call_keeps_the_old_file(tmp_path, monkeypatch, call):
    path = commit_text(tmp_path / "a", "old")

    def fail(*_: object) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(ResourceError):
        commit_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_parent_that_cannot_be_made_is_a_resource_error(tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(ResourceError, match="cannot be written"):
        commit_text(tmp_path / "new" / "a", "x")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_folder_that_cannot_be_written_is_a_resource_error(tmp_path, monkeypatch, code):
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(ResourceError, match="cannot be written"):
        commit_text(tmp_path / "a", "x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder(tmp_path):
    (tmp_path / "d").mkdir(mode=0o555)
    with pytest.raises(ResourceError, match="cannot be written"):
        commit_text(tmp_path / "d" / "a", "x")


def test_an_error_in_the_block_leaves_the_old_folder(tmp_path):
    with commit_dir(tmp_path / "d") as temporary:
        (temporary / "x").write_text("old")
    with pytest.raises(KeyboardInterrupt), commit_dir(tmp_path / "d", replace=True) as temporary:
        (temporary / "x").write_text("new")
        raise KeyboardInterrupt
    assert (tmp_path / "d" / "x").read_text() == "old"
    assert names(tmp_path) == ["d"]


def test_a_folder_that_cannot_be_put_in_place_gives_the_old_one_back(tmp_path, monkeypatch):
    with commit_dir(tmp_path / "d") as temporary:
        (temporary / "x").write_text("old")
    rename, renamed = os.rename, []

    def fail_second(source, target) -> None:
        renamed.append(target)
        if len(renamed) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_second)
    with pytest.raises(ResourceError), commit_dir(tmp_path / "d", replace=True):
        pass
    assert (tmp_path / "d" / "x").read_text() == "old"
    assert names(tmp_path) == ["d"]


def test_an_existing_folder_is_kept_unless_replaced(tmp_path):
    (tmp_path / "d").mkdir()
    with commit_dir(tmp_path / "d") as temporary:
        (temporary / "x").write_text("one")
    with pytest.raises(UsageError, match="exists already"), commit_dir(tmp_path / "d"):
        pass
    with commit_dir(tmp_path / "d", replace=True) as temporary:
        (temporary / "y").write_text("two")
    assert names(tmp_path / "d") == ["y"]
    assert names(tmp_path) == ["d"]


# -- strays -----------------------------------------------------------------------------------------------------------


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_strays_of_the_dead_and_of_an_earlier_self_are_swept_those_of_the_living_stay(tmp_path):
    for pid in (ended_process(), os.getpid(), os.getppid()):
        (tmp_path / f".a.{pid}.tmp").write_text("half")
        (tmp_path / f".b.{pid}.tmp").mkdir()
    (tmp_path / ".a.999999999.5.tmp").write_text("of a file named a.999999999, by process 5")
    commit_text(tmp_path / "a", "whole")
    with commit_dir(tmp_path / "b"):
        pass
    (tmp_path / ".a.999999999.5.tmp").unlink()
    assert names(tmp_path) == sorted([f".a.{os.getppid()}.tmp", f".b.{os.getppid()}.tmp", "a", "b"])


def test_a_folder_moved_aside_by_one_who_died_is_put_back(tmp_path):
    aside = tmp_path / f".d.{ended_process()}.old.tmp"
    aside.mkdir()
    (aside / "x").write_text("old")
    with pytest.raises(UsageError, match="exists already"), commit_dir(tmp_path / "d"):
        pass


WRITER = """
import sys
from pathlib import Path
from demerge.storage.atomic import commit_dir, commit_text
root, n = Path(sys.argv[1]), 0
print("ready", flush=True)
while True:
    n += 1
    text = str(n % 10) * 200_000
    commit_text(root / "file", text)
    with commit_dir(root / "folder", replace=True) as temporary:
        for part in "abc":
            (temporary / part).write_text(text)
"""


def test_killed_at_any_moment_it_leaves_whole_files(tmp_path):
    for trial in range(5):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(0.02 + 0.013 * trial)
            process.send_signal(signal.SIGKILL)
        if (tmp_path / "file").exists():
            text = (tmp_path / "file").read_text()
            assert len(text) == 200_000
            assert len(set(text)) == 1
        if (tmp_path / "folder").exists():
            assert len({(tmp_path / "folder" / part).read_text() for part in "abc"}) == 1
    commit_text(tmp_path / "file", "end")
    with commit_dir(tmp_path / "folder", replace=True):
        pass
    assert names(tmp_path) == ["file", "folder"]
