"""One process at a time in a folder: a lock that the system releases when its holder ends."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from demerge.errors import ResourceError, UsageError

NAME = "lock"


class FolderInUse(UsageError):
    """Another process holds the lock of a folder."""


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, which is created if missing, while the block runs.

    Nothing is held on a system without such locks (Windows).

    Raises:
        ResourceError: if the folder cannot be written.
        FolderInUse: if another process holds the lock, with its number and host.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / NAME).open("a+", encoding="utf-8", errors="replace")
    except OSError as error:
        fix = "choose a folder you may write to"
        raise ResourceError(f"{folder} cannot be written: {error}", fix=fix) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).strip() or "unknown"
            what = f"another process ({holder}) is working in {folder.parent}"
            raise FolderInUse(what, fix="wait for it to end, or choose another folder") from None
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
