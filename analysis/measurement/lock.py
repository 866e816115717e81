"""One process at a time in a folder: a lock on a file in it, which the system lets go when its holder ends, however it ends."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from demerge.errors import ResourceError, UsageError

NAME = "lock"


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, which is made where it is missing, while the block runs.

    Where the system has no such locks (Windows), nothing is held.

    Raises:
        ResourceError: where the folder cannot be written.
        UsageError: where another process holds it, by its number and host.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ResourceError(
            f"{folder} cannot be written: {error}", fix="choose a folder you may write to"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            raise UsageError(
                f"another process ({holder or 'it does not say which'}) is at work in {folder.parent}",
                fix="wait for it to end, or choose another folder",
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(descriptor)
