"""SHA-256 remembered: what was computed of a file of the same path, size, time and inode is not computed twice.

The memory is one JSON file in the user's cache folder (`$XDG_CACHE_HOME/demerge/sha256.json`). What is damaged in it is
forgotten, and a folder that cannot be written is done without. A file that was changed within the last seconds is not
remembered, since another change may leave its time the same.
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
MOST = 10_000  # entries; the oldest go first
DIGEST = re.compile("[0-9a-f]{64}")


class Hashing:
    """The hashes of some files, computed in the background from the moment this is made.

    Attributes:
        known: whether all of them were remembered.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        memory = _recall()
        self._keys = {file: _key("file", [file]) for file in files}
        self._found: dict[Path, str] = {
            file: memory[key] for file, key in self._keys.items() if key in memory
        }
        unknown = [file for file in self._keys if file not in self._found]
        self.known = not unknown
        pool = ThreadPoolExecutor(os.cpu_count() or 1)
        self._coming: dict[Path, Future[str]] = {
            file: pool.submit(sha256, file) for file in unknown
        }
        pool.shutdown(wait=False)

    def result(self) -> Mapping[Path, str]:
        """Return the hash of each file, as soon as all are known."""
        new = {file: coming.result() for file, coming in self._coming.items()}
        _remember(
            {
                self._keys[file]: found
                for file, found in new.items()
                if _settled("file", [file], self._keys[file])
            }
        )
        self._coming = {}
        self._found |= new
        return self._found


def remembered(kind: str, files: Sequence[Path], compute: Callable[[], str]) -> str:
    """Return the SHA-256 that `compute` makes of some files, from memory where it is there; `kind` says what of them."""
    key = _key(kind, files)
    found = _recall().get(key)
    if found is None:
        found = compute()
        _remember({key: found} if _settled(kind, files, key) else {})
    return found


def remembered_content(checkpoint: Checkpoint) -> str:
    """Return `content_sha256` of a checkpoint, or of the part of its files that it shows, from memory if it is known."""
    names = hashlib.sha256("\n".join(sorted(map(modern, checkpoint))).encode()).hexdigest()
    return remembered(
        f"content {names[:16]}", checkpoint.place.files, lambda: content_sha256(checkpoint)
    )


def _key(kind: str, files: Sequence[Path]) -> str:
    stats = [(real, real.stat()) for real in (file.resolve() for file in files)]
    text = "\t".join(
        [kind, *(f"{real}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}" for real, stat in stats)]
    )
    return hashlib.sha256(os.fsencode(text)).hexdigest()


def _settled(kind: str, files: Sequence[Path], key: str) -> bool:
    """Whether the files are still those that were read, and long enough unchanged for their time to say so."""
    newest = max(file.stat().st_mtime_ns for file in files)
    return _key(kind, files) == key and time.time_ns() - newest > SETTLED


def _place() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "demerge" / "sha256.json"


def _recall() -> dict[str, str]:
    try:
        memory = json.loads(_place().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, RuntimeError):
        return {}
    entries = memory.items() if isinstance(memory, dict) else ()
    return {
        key: value for key, value in entries if isinstance(value, str) and DIGEST.fullmatch(value)
    }


def _remember(new: Mapping[str, str]) -> None:
    """Add to the memory; another process may do so at the same time, and one of the two is then forgotten."""
    if not new:
        return
    memory = {**{key: value for key, value in _recall().items() if key not in new}, **new}
    with contextlib.suppress(DemergeError, OSError, RuntimeError):
        commit_text(
            _place(), json.dumps(dict(list(memory.items())[-MOST:]), indent=0, ensure_ascii=False)
        )
