"""A program whose work is shared by forked processes, all of which run it.

    parent    hands out the indices of items, and takes the values made of them
    worker    makes the values it is asked for, and receives the result from which all go on

Both come to the same calls of `WorkerPool` in the same order. Processes, because threads that call
many small operations wait for one another: two of them took 1.1 to 2 times the CPU time of one. A
worker is forked once, when the program begins: what it holds needs no pickling, and what it has
mapped or allocated serves all of its work. (Two workers forked anew for each pass over a model took
16 % more CPU time.) Tensors travel in shared memory if they fit. A worker ends with its parent.

    parent -> worker    the index of an item, at most AHEAD waiting; in the end the pickled result
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from demerge.errors import ResourceError

AHEAD = 4  # items that a worker is given before it has answered
SLOT = 1 << 21  # bytes of shared memory for the tensors of one answer
ALIGNMENT = 64
CAN_FORK = sys.platform == "linux"  # elsewhere a fork may crash once system libraries were used
Item = TypeVar("Item")
Value = TypeVar("Value")
Result = TypeVar("Result")
Failure = BaseException | None


@dataclass(eq=False, slots=True)
class WorkerPool:
    """The `size` processes that share the work of a program; a lone one does all of it itself."""

    size: int = 1

    def imap(self, function: Callable[[Item], Value], items: Sequence[Item]) -> Iterator[Value]:
        """Yield function(item) in the order of the items; nothing in a worker."""
        yield from map(function, items)

    def reduce_and_broadcast(
        self,
        function: Callable[[Item], Value],
        items: Sequence[Item],
        combine: Callable[[Iterator[Value]], Result],
    ) -> Result:
        """Return combine(function(item) in the order of the items), made once and known to all."""
        return combine(map(function, items))


ALONE = WorkerPool()
Program = Callable[[WorkerPool], Iterable[Value]]


def run(program: Program[Value], workers: int) -> Iterator[Value]:
    """Yield what program(pool) yields, its work shared by forked workers if more than one."""
    if workers <= 1 or not CAN_FORK:
        yield from program(ALONE)
        return
    processes = [_Process.fork(program, workers) for _ in range(workers)]
    try:
        yield from program(_Parent(workers, processes))
    finally:
        for process in processes:
            process.stop()


@dataclass(eq=False, slots=True)
class _Parent(WorkerPool):
    """The pool as the parent sees it."""

    processes: Sequence[_Process] = ()

    def imap(self, function: Callable[[Item], Value], items: Sequence[Item]) -> Iterator[Value]:
        yield from self._values(len(items), AHEAD * self.size)
        self._broadcast(None)

    def reduce_and_broadcast(
        self,
        function: Callable[[Item], Value],
        items: Sequence[Item],
        combine: Callable[[Iterator[Value]], Result],
    ) -> Result:
        result = combine(self._values(len(items), len(items)))
        self._broadcast(result)
        return result

    def _values(self, n: int, ahead: int) -> Iterator[Any]:
        """Hand out n items and yield their values; at most `ahead` wait for an earlier one.

        The error of an item is raised in its turn: the same one whichever worker is faster.
        """
        ready: dict[int, tuple[Any, Failure]] = {}
        handed_out = 0
        for i in range(n):
            while i not in ready:
                for process in sorted(self.processes, key=lambda process: process.waiting):
                    if process.waiting < AHEAD and handed_out < min(n, i + ahead):
                        process.hand_out(handed_out)
                        handed_out += 1
                busy = {process.pipe: process for process in self.processes if process.waiting}
                for pipe in wait(list(busy)):
                    index, value, failure = busy[pipe].receive()  # type: ignore[index]
                    ready[index] = value, failure
            value, failure = ready.pop(i)
            if failure is not None:
                raise failure
            yield value

    def _broadcast(self, result: Any) -> None:
        message = _dump(result, memoryview(bytearray()))
        for process in self.processes:
            process.send(message)


@dataclass(eq=False, slots=True)
class _Process:
    """A forked process, seen from its parent."""

    pid: int
    pipe: Connection
    shared: mmap.mmap
    waiting: int = 0
    received: int = 0
    status: int | None = None

    @classmethod
    def fork(cls, program: Program[Any], size: int) -> _Process:
        ours, theirs = Pipe()
        shared = mmap.mmap(-1, AHEAD * SLOT)
        with warnings.catch_warnings():  # Python 3.12 warns of threads: a worker takes no lock
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            ours.close()
            _serve(_Worker(size, pipe=theirs, shared=shared), program)
        theirs.close()
        return cls(pid, ours, shared)

    def hand_out(self, index: int) -> None:
        self.waiting += 1
        self.send(b"%d" % index)

    def send(self, message: bytes) -> None:
        """Send a message; if the process has died, `receive` reports it."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send_bytes(message)

    def receive(self) -> tuple[int, Any, Failure]:
        try:
            message = self.pipe.recv_bytes()
        except (EOFError, ConnectionResetError) as error:
            self.status = os.waitpid(self.pid, 0)[1]
            code = os.waitstatus_to_exitcode(self.status)
            ending = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
            what = f"a worker process ended with {ending}"
            raise ResourceError(what, fix="use --num-workers 1, which needs less memory") from error
        index, value, failure = _Unpickler(message, _slot(self.shared, self.received)).load()
        self.waiting, self.received = self.waiting - 1, self.received + 1
        return index, value, failure

    def stop(self) -> None:
        self.pipe.close()
        if self.status is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


# -- in the worker ---------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class _Worker(WorkerPool):
    """The pool as a worker sees it."""

    pipe: Connection = field(kw_only=True)
    shared: mmap.mmap = field(kw_only=True)
    answered: int = 0

    def imap(self, function: Callable[[Item], Value], items: Sequence[Item]) -> Iterator[Value]:
        self._answer_until_result(function, items)
        yield from ()

    def reduce_and_broadcast(
        self,
        function: Callable[[Item], Value],
        items: Sequence[Item],
        combine: Callable[[Iterator[Value]], Result],
    ) -> Result:
        result: Result = self._answer_until_result(function, items)
        return result

    def _answer_until_result(self, function: Callable[[Item], Value], items: Sequence[Item]) -> Any:
        while (message := self.pipe.recv_bytes()).isdigit():
            slot = _slot(self.shared, self.answered)
            self.pipe.send_bytes(_answer(function, items, int(message), slot))
            self.answered += 1
        return _Unpickler(message, memoryview(b"")).load()


def _serve(pool: _Worker, program: Program[Any]) -> NoReturn:
    """Run the program until it or the parent ends; nothing of the parent is flushed here."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for _ in program(pool):
            pass
    finally:
        os._exit(0)


def _answer(
    function: Callable[[Item], Value], items: Sequence[Item], index: int, slot: memoryview
) -> bytes:
    try:
        return _dump((index, function(items[index]), None), slot)
    except BaseException as error:
        error.add_note("".join(traceback.format_exception(error)))
        try:
            return _dump((index, None, error), slot)
        except Exception:
            return _dump((index, None, RuntimeError(f"{type(error).__name__}: {error}")), slot)


# -- values between them ---------------------------------------------------------------------------


def _slot(shared: mmap.mmap, count: int) -> memoryview:
    start = count % AHEAD * SLOT
    return memoryview(shared)[start : start + SLOT]


def _dump(value: Any, slot: memoryview) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, slot).dump(value)
    return stream.getvalue()


def _bytes_of(tensor: Tensor) -> memoryview:
    data: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return data


class _Pickler(pickle.Pickler):
    """Pickles values, tensors apart: in shared memory, or as bytes if that is full."""

    def __init__(self, stream: io.BytesIO, slot: memoryview) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self._slot, self._used = slot, 0

    def persistent_id(self, value: Any) -> Any:
        """Return dtype, shape and place of a tensor; None for what is pickled as usual."""
        if type(value) is not Tensor:
            return None
        data = _bytes_of(value.detach().cpu().contiguous())
        start, end = self._used, self._used + len(data)
        if end > len(self._slot):
            return value.dtype, tuple(value.shape), bytes(data)
        self._slot[start:end] = data
        self._used = math.ceil(end / ALIGNMENT) * ALIGNMENT
        return value.dtype, tuple(value.shape), start


class _Unpickler(pickle.Unpickler):
    """Unpickles values; tensors are copied, since the next answer overwrites them."""

    def __init__(self, message: bytes, slot: memoryview) -> None:
        super().__init__(io.BytesIO(message))
        self._slot = slot

    def persistent_load(self, place: Any) -> Tensor:
        dtype, shape, data = place
        tensor = torch.empty(shape, dtype=dtype)
        target = _bytes_of(tensor)
        if isinstance(data, int):
            data = self._slot[data : data + len(target)]
        target[:] = data
        return tensor
