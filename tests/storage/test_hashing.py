"""Hashes of files: right, remembered, forgotten where the file changed or the memory is damaged."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from demerge.storage import hashing as hashes
from demerge.storage.hashing import Hashing


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    age(path, 10)
    return path


def age(path: Path, seconds: float) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns - int(seconds * 1e9)))


def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read from now on."""
    seen: list[Path] = []
    monkeypatch.setattr(
        hashes,
        "sha256",
        lambda path: seen.append(path) or hashlib.sha256(path.read_bytes()).hexdigest(),
    )
    return seen


def test_a_hash_is_right_and_remembered(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = read(monkeypatch)
    first = Hashing([file, file])
    assert not first.known
    assert first.result() == {file: hashlib.sha256(b"one").hexdigest()}
    again = Hashing([file])
    assert again.known and again.result() == first.result()
    assert seen == [file]


def test_another_content_of_the_same_size_is_read_again(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Hashing([file]).result()
    file.write_bytes(b"two")
    age(file, 5)
    assert Hashing([file]).result() == {file: hashlib.sha256(b"two").hexdigest()}


def test_a_file_that_has_just_changed_is_not_remembered(file: Path) -> None:
    file.write_bytes(b"two")
    Hashing([file]).result()
    assert not Hashing([file]).known


@pytest.mark.parametrize("damage", ["", "[1]", '{"a": "b"}', "{" * 100_000, '{"x": null}'])
def test_a_damaged_memory_is_forgotten(file: Path, damage: str) -> None:
    Hashing([file]).result()
    hashes._memory_path().write_text(damage)
    assert not Hashing([file]).known
    assert Hashing([file]).result() == {file: hashlib.sha256(b"one").hexdigest()}


def test_a_memory_that_cannot_be_written_is_done_without(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert Hashing([file]).result() == {file: hashlib.sha256(b"one").hexdigest()}
