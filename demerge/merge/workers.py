"""Work on items in order, shared by forked processes.

Processes, since threads that call many small operations wait for one another: two of them took 1.1 times to twice the CPU
time of one. A worker is forked when the work begins, so functions and what they hold need not be pickled; its results
travel back, tensors in shared memory where they fit. It ends when its parent does, however that ends.

    parent -> worker    the index of the next item, at most AHEAD waiting
    worker -> parent    (index, value), or the error that ended it
"""

from __future__ import annotations

import io
import math
import mmap
import os
import pickle
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import reduce
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from demerge.errors import ResourceError

AHEAD = 4  # items that a worker is given before it has answered
SLOT = 1 << 21  # bytes of shared memory for the tensors of one answer
ALIGNMENT = 64
PARTS = 8  # partial sums of each worker
CAN_FORK = sys.platform == "linux"  # elsewhere a fork of a process that has used its system's libraries may crash
Item = TypeVar("Item")
Value = TypeVar("Value")


def ordered(
    function: Callable[[Item], Value], items: Sequence[Item], workers: int, ahead: int | None = None
) -> Iterator[Value]:
    """Yield function(item) in the order of the items; in this process for one worker.

    Args:
        ahead: how many values may wait for one before them; two for each worker by default.

    Raises:
        ResourceError: where a worker was killed.
    """
    workers = min(workers, len(items)) if CAN_FORK else 1
    if workers <= 1:
        yield from map(function, items)
        return
    crew = [_Worker.forked(function, items) for _ in range(workers)]
    try:
        yield from _in_order(crew, len(items), ahead or AHEAD * workers)
    finally:
        for worker in crew:
            worker.stop()


def total(
    function: Callable[[Item], Tensor],
    items: Sequence[Item],
    workers: int,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Tensor:
    """Return the sum of function(item) over one item or more, of integers: each worker adds up its own, part by part.

    Args:
        progress: called as progress(done, of) after each part.
    """
    parts = min(len(items), PARTS * workers)
    runs = [items[len(items) * i // parts : len(items) * (i + 1) // parts] for i in range(parts)]
    sums = ordered(lambda run: reduce(Tensor.add_, map(function, run)), runs, workers)
    found = next(sums)
    progress(1, parts)
    for done, value in enumerate(sums, 2):
        found.add_(value)
        progress(done, parts)
    return found


def _in_order(crew: Sequence[_Worker], n: int, ahead: int) -> Iterator[Any]:
    ready: dict[int, Any] = {}
    given = 0
    for i in range(n):
        while i not in ready:
            for worker in sorted(crew, key=lambda worker: worker.waiting):
                if worker.waiting < AHEAD and given < min(n, i + ahead):
                    worker.give(given)
                    given += 1
            for connection in wait([worker.pipe for worker in crew if worker.waiting]):
                worker = next(worker for worker in crew if worker.pipe is connection)
                index, value = worker.receive()
                ready[index] = value
        yield ready.pop(i)


@dataclass(eq=False, slots=True)
class _Worker:
    """A forked process, seen from its parent."""

    pid: int
    pipe: Connection
    shared: mmap.mmap
    waiting: int = 0
    received: int = 0
    status: int | None = field(default=None)

    @classmethod
    def forked(cls, function: Callable[[Item], Value], items: Sequence[Item]) -> _Worker:
        ours, theirs = Pipe()
        shared = mmap.mmap(-1, AHEAD * SLOT)
        with warnings.catch_warnings():  # Python 3.12 warns where there are threads: a worker takes none of their locks
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            ours.close()
            _serve(theirs, shared, function, items)
        theirs.close()
        return cls(pid, ours, shared)

    def give(self, index: int) -> None:
        """Let it work on an item; where it has died, `receive` says so."""
        self.waiting += 1
        with suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send_bytes(str(index).encode())

    def receive(self) -> tuple[int, Any]:
        try:
            message = self.pipe.recv_bytes()
        except (EOFError, ConnectionResetError) as error:
            self.status = os.waitpid(self.pid, 0)[1]
            raise ResourceError(
                f"a worker process ended with {_ending(self.status)}", fix="use --threads 1, which needs the least memory"
            ) from error
        index, value, failure = _Loads(message, _slot(self.shared, self.received)).load()
        self.waiting, self.received = self.waiting - 1, self.received + 1
        if failure is not None:
            raise failure
        return index, value

    def stop(self) -> None:
        """End it, whatever it is at."""
        self.pipe.close()
        if self.status is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


def _ending(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


# -- in the worker -------------------------------------------------------------------------------------------------------


def _serve(pipe: Connection, shared: mmap.mmap, function: Callable[[Item], Value], items: Sequence[Item]) -> NoReturn:
    """Answer until the parent closes the pipe or is gone; nothing of the parent is cleaned up or flushed here."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        answered = 0
        while True:
            index = int(pipe.recv_bytes())
            pipe.send_bytes(_answer(function, items, index, _slot(shared, answered)))
            answered += 1
    finally:
        os._exit(0)


def _answer(function: Callable[[Item], Value], items: Sequence[Item], index: int, slot: memoryview) -> bytes:
    try:
        return _dumped((index, function(items[index]), None), slot)
    except BaseException as error:
        error.add_note("".join(traceback.format_exception(error)))
        try:
            return _dumped((index, None, error), slot)
        except Exception:
            return _dumped((index, None, RuntimeError(f"{type(error).__name__}: {error}")), slot)


# -- values between them -------------------------------------------------------------------------------------------------


def _slot(shared: mmap.mmap, count: int) -> memoryview:
    start = count % AHEAD * SLOT
    return memoryview(shared)[start : start + SLOT]


def _dumped(value: Any, slot: memoryview) -> bytes:
    stream = io.BytesIO()
    _Dumps(stream, slot).dump(value)
    return stream.getvalue()


class _Dumps(pickle.Pickler):
    """Pickles values, tensors of the CPU apart: in shared memory, or as bytes where that is full."""

    def __init__(self, stream: io.BytesIO, slot: memoryview) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self._slot, self._used = slot, 0

    def persistent_id(self, value: Any) -> Any:
        """Return where a tensor is; None for what is pickled as usual."""
        if type(value) is not Tensor:
            return None
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        if self._used + len(data) > len(self._slot):
            return value.dtype, tuple(value.shape), bytes(data)
        start = self._used
        self._slot[start : start + len(data)] = data
        self._used = math.ceil((start + len(data)) / ALIGNMENT) * ALIGNMENT
        return value.dtype, tuple(value.shape), start


class _Loads(pickle.Unpickler):
    """Unpickles values; tensors are copied out of the shared memory, which the next answer may overwrite."""

    def __init__(self, message: bytes, slot: memoryview) -> None:
        super().__init__(io.BytesIO(message))
        self._slot = slot

    def persistent_load(self, place: Any) -> Tensor:
        """Return a tensor."""
        dtype, shape, held = place
        found = torch.empty(shape, dtype=dtype)
        into = found.reshape(-1).view(torch.uint8).numpy().data
        into[:] = memoryview(held) if isinstance(held, bytes) else self._slot[held : held + len(into)]
        return found
