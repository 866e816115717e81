"""The only writer: what demerge leaves on disk is whole or absent.

A file or folder is written next to its place under a temporary name, synced, renamed into place,
and the folder that holds it is synced. A program that is killed at any moment leaves the old
content or the new, and at most a stray `.NAME.PID.tmp`. The next write to the same place by any
process removes it once its writer is dead.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from demerge.errors import ResourceError, UsageError

MAX_NAME = 230  # bytes of a name that its temporary name can hold whole
CHOOSE = "choose a place inside folders that you may write to"


def commit_file(path: Path | str, write: Callable[[BinaryIO], object]) -> Path:
    """Write a file by `write(stream)` and put it in place atomically and durably.

    Raises:
        ResourceError: if the disk is full or the folder cannot be written.
    """
    path = Path(path)
    with _explain_errors(path):
        temporary = _temporary(path)
        try:
            with temporary.open("xb") as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(path.parent)
    return path


def commit_bytes(path: Path | str, content: bytes) -> Path:
    """Write bytes; see `commit_file`."""
    return commit_file(path, lambda stream: stream.write(content))


def commit_text(path: Path | str, text: str) -> Path:
    """Write UTF-8 text; what is not text, such as bytes of an odd file name, becomes `?`."""
    return commit_bytes(path, text.encode("utf-8", "replace"))


def commit_json(path: Path | str, document: Any) -> Path:
    """Write a JSON document, keys in their order; NaN is refused."""
    text = json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False)
    return commit_text(path, text + "\n")


@contextlib.contextmanager
def commit_dir(path: Path | str, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder to fill, then put it in place atomically and durably.

    With `replace`, an existing folder is moved aside and deleted once the new one is in place.

    Raises:
        UsageError: if the folder exists already and `replace` is false.
        ResourceError: if the disk is full or the folder cannot be written.
    """
    path = Path(path)
    with _explain_errors(path):
        temporary = _temporary(path)
        aside = temporary.with_suffix(".old.tmp")
        check_is_new(path, replace)
        temporary.mkdir()
        try:
            yield temporary
            for inner in sorted(temporary.rglob("*")):
                _respect_umask(inner)
                _sync(inner)
            _sync(temporary)
            if path.exists():
                os.rename(path, aside)
            os.rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            if aside.exists() and not path.exists():
                os.rename(aside, path)
            raise
        _sync(path.parent)
        shutil.rmtree(aside, ignore_errors=True)


def commit_files(
    path: Path | str, files: Iterable[tuple[str, bytes]], *, replace: bool = False
) -> Path:
    """Write a folder of files, (name, content) each; names may lie in folders. See `commit_dir`."""
    with commit_dir(path, replace=replace) as temporary:
        for name, content in files:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_bytes(content)
    return Path(path)


def check_is_new(path: Path | str, replace: bool = False) -> Path:
    """Return the path of an output, once it is known that nothing is written over.

    Raises:
        UsageError: if `path` exists and is not an empty folder, or cannot exist.
    """
    path = place_for(path)
    if replace or not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return path
    raise UsageError(f"{path} exists already", fix="choose another place or remove it first")


def place_for(out: Path | str) -> Path:
    """Return the path of an output, once it is known that it can exist.

    Raises:
        UsageError: if a part of the path is a file or too long for a name, or if the current folder
            was deleted.
    """
    out = Path(out)
    try:
        out.exists()  # its own name may be too long
        above = _existing_folder(out)
    except OSError as error:
        raise UsageError(f"{out} cannot exist: {error.strerror}", fix=CHOOSE) from error
    if not above.is_dir():
        raise UsageError(f"{out} cannot exist: {above} is a file", fix=CHOOSE)
    return out


def new_safetensors(out: Path | str) -> Path:
    """Return the path of a new .safetensors file.

    Raises:
        UsageError: if it exists or cannot exist, or does not end in .safetensors.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        fix = f"for example {out.with_suffix('.safetensors')}"
        raise UsageError(f"'{out}' does not end in .safetensors", fix=fix)
    return check_is_new(out)


def check_disk_space(out: Path | str, needed: int) -> None:
    """Check that the disk holds what is about to be written.

    Raises:
        ResourceError: if not, naming needed and free bytes.
    """
    free = shutil.disk_usage(_existing_folder(place_for(out))).free
    if free < needed:
        what = f"{out} needs {needed:,} bytes, {free:,} are free"
        raise ResourceError(what, fix="free some space or choose another disk")


def append_line(path: Path, line: str) -> None:
    """Append one line to a log; a log is the only kind of file that may end in half a line."""
    with _explain_errors(path), path.open("a", encoding="utf-8") as stream:
        stream.write(line.rstrip("\n") + "\n")


def open_log(path: Path) -> BinaryIO:
    """Open a log to append what another program prints; its folder is created if missing."""
    with _explain_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("ab")


def truncate(path: Path, size: int) -> None:
    """Shorten a log to its first `size` bytes."""
    with _explain_errors(path):
        os.truncate(path, size)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _temporary(path: Path) -> Path:
    """Return the temporary name of this process for a place; remove those of dead ones."""
    place_for(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
        what = f"{path}: its folder cannot be created: {error.strerror}: {error.filename}"
        raise UsageError(what, fix=CHOOSE) from error
    name = path.name
    if len(os.fsencode(name)) >= MAX_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    pattern = re.compile(re.escape(f".{name}.") + r"(\d+)(\.old)?\.tmp")
    for stray in list(path.parent.iterdir()):
        match = pattern.fullmatch(stray.name)
        if match is None or _is_other_process(int(match[1])):
            continue
        if match[2] and not path.exists():
            os.rename(stray, path)
        elif stray.is_dir():
            shutil.rmtree(stray)
        else:
            stray.unlink(missing_ok=True)
    return path.parent / f".{name}.{os.getpid()}.tmp"


def _is_other_process(pid: int) -> bool:
    """Return whether `pid` is a running process other than this one.

    In a container a restarted program has its old number.
    """
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _respect_umask(path: Path) -> None:
    """Give a file the mode that a new one would have: safetensors writes 0600."""
    if path.is_file():
        mask = os.umask(0)
        os.umask(mask)
        path.chmod(0o666 & ~mask)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _explain_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(_existing_folder(path)).free
            what = f"{path}: the disk is full ({free:,} bytes free); nothing was changed"
            raise ResourceError(what, fix="free some space and run again") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            what = f"{path}: the folder cannot be written"
            raise ResourceError(what, fix="choose a folder you may write to") from error
        raise


def _existing_folder(path: Path) -> Path:
    """Return the nearest thing above a place that exists: a folder, if the place can exist."""
    return next(above for above in path.absolute().parents if above.exists())
