"""SHA-256 remembered: the hash of a file of the same path, size, time and inode is computed once.

The memory is one JSON file in the user's cache folder (`$XDG_CACHE_HOME/demerge/sha256.json`). What
is damaged in it is forgotten, and a folder that cannot be written is no error. A file that was
changed within the last seconds is not remembered: another change may leave its time the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from demerge.errors import DemergeError
from demerge.storage.atomic import commit_text, sha256
from demerge.storage.checkpoint import Checkpoint, content_sha256, modern

SETTLED = 2_000_000_000  # nanoseconds since the last change
MAX_ENTRIES = 10_000  # the oldest go first
DIGEST = re.compile("[0-9a-f]{64}")


class Hashing:
    """The hashes of some files, computed in the background from the moment this is made.

    Attributes:
        known: whether all of them were remembered.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        memory = _load_memory()
        self._keys = {file: _key("file", [file]) for file in files}
        self._hashes = {file: memory[key] for file, key in self._keys.items() if key in memory}
        pool = ThreadPoolExecutor(os.cpu_count() or 1)
        new = [file for file in self._keys if file not in self._hashes]
        self._pending: dict[Path, Future[str]] = {file: pool.submit(sha256, file) for file in new}
        pool.shutdown(wait=False)
        self.known = not self._pending

    def result(self) -> Mapping[Path, str]:
        """Return the hash of each file, as soon as all are known."""
        settled = {}
        for file, pending in self._pending.items():
            self._hashes[file] = pending.result()
            if _is_settled("file", [file], self._keys[file]):
                settled[self._keys[file]] = self._hashes[file]
        _remember(settled)
        self._pending = {}
        return self._hashes


def remembered(kind: str, files: Sequence[Path], compute: Callable[[], str]) -> str:
    """Return the SHA-256 of what `kind` names of some files: by `compute`, or from memory."""
    key = _key(kind, files)
    digest = _load_memory().get(key)
    if digest is None:
        digest = compute()
        _remember({key: digest} if _is_settled(kind, files, key) else {})
    return digest


def remembered_content(checkpoint: Checkpoint) -> str:
    """Return `content_sha256` of the shown part of a checkpoint, from memory if it is known."""
    names = hashlib.sha256("\n".join(sorted(map(modern, checkpoint))).encode()).hexdigest()
    kind = f"content {names[:16]}"
    return remembered(kind, checkpoint.place.files, lambda: content_sha256(checkpoint))


def _key(kind: str, files: Sequence[Path]) -> str:
    parts = [kind]
    for file in files:
        real = file.resolve()
        stat = real.stat()
        parts.append(f"{real}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}")
    return hashlib.sha256(os.fsencode("\t".join(parts))).hexdigest()


def _is_settled(kind: str, files: Sequence[Path], key: str) -> bool:
    """Return whether the files are unchanged, and old enough for their time to say so."""
    newest = max(file.stat().st_mtime_ns for file in files)
    return _key(kind, files) == key and time.time_ns() - newest > SETTLED


def _memory_path() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "demerge" / "sha256.json"


def _load_memory() -> dict[str, str]:
    try:
        memory = json.loads(_memory_path().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, RuntimeError):
        return {}
    entries = memory.items() if isinstance(memory, dict) else ()
    return {key: v for key, v in entries if isinstance(v, str) and DIGEST.fullmatch(v)}


def _remember(new: Mapping[str, str]) -> None:
    """Add to the memory; if another process does so at the same time, one of the two is lost."""
    if not new:
        return
    memory = {key: value for key, value in _load_memory().items() if key not in new}
    latest = dict([*memory.items(), *new.items()][-MAX_ENTRIES:])
    with contextlib.suppress(DemergeError, OSError, RuntimeError):
        commit_text(_memory_path(), json.dumps(latest, indent=0, ensure_ascii=False))
