"""A program whose work is shared by forked processes, all of which run it.

    parent    hands out the numbers of items, and takes what is made of them
    worker    makes of the items what it is asked to, and is told what came of all of them, where the program goes on from it

Both come to the same calls of `WorkerPool` in the same order. Processes, since threads that call many small operations wait for
one another: two of them took 1.1 times to twice the CPU time of one. A worker is forked once, when the program begins: what
it holds need not be pickled, and what it has mapped or allocated serves all of its work. (Forked anew for each pass over a
model, two workers took 16 % more CPU time.) Tensors travel in shared memory where they fit. A worker ends when its parent
does, however that ends.

    parent -> worker    the index of the next item, at most AHEAD waiting; after the last the result, pickled
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
CAN_FORK = (
    sys.platform == "linux"
)  # elsewhere a fork of a process that has used its system's libraries may crash
Item = TypeVar("Item")
Value = TypeVar("Value")
Result = TypeVar("Result")


@dataclass(eq=False, slots=True)
class WorkerPool:
    """The `size` processes that share the work of a program; a lone one does all of it itself."""

    size: int = 1

    def ordered(self, function: Callable[[Item], Value], items: Sequence[Item]) -> Iterator[Value]:
        """Yield function(item) in the order of the items; nothing in a worker.

        Raises:
            ResourceError: where a worker was killed.
        """
        yield from map(function, items)

    def agreed(
        self,
        function: Callable[[Item], Value],
        items: Sequence[Item],
        combine: Callable[[Iterator[Value]], Result],
    ) -> Result:
        """Return combine(the values function(item) in the order of the items), which one process makes and all know.

        Raises:
            ResourceError: where a worker was killed.
        """
        return combine(map(function, items))


ALONE = WorkerPool()


def run(program: Callable[[WorkerPool], Iterable[Value]], workers: int) -> Iterator[Value]:
    """Yield what program(crew) yields, its work shared by forked workers where there are to be more than one."""
    if workers <= 1 or not CAN_FORK:
        yield from program(ALONE)
        return
    hands = [_Worker.forked(program, workers) for _ in range(workers)]
    try:
        yield from program(_Parent(workers, hands))
    finally:
        for hand in hands:
            hand.stop()


@dataclass(eq=False, slots=True)
class _Parent(WorkerPool):
    """The crew as the parent sees it."""

    workers: Sequence[_Worker] = ()

    def ordered(self, function: Callable[[Item], Value], items: Sequence[Item]) -> Iterator[Value]:
        yield from self._in_order(len(items), AHEAD * self.size)
        self._tell(None)

    def agreed(
        self,
        function: Callable[[Item], Value],
        items: Sequence[Item],
        combine: Callable[[Iterator[Value]], Result],
    ) -> Result:
        result = combine(self._in_order(len(items), len(items)))
        self._tell(result)
        return result

    def _in_order(self, n: int, ahead: int) -> Iterator[Any]:
        """Hand out n items and yield their values, of which at most `ahead` wait for one before them.

        The error of an item is raised in its turn, so that it is the same one whichever worker is the faster.
        """
        ready: dict[int, tuple[Any, BaseException | None]] = {}
        given = 0
        for i in range(n):
            while i not in ready:
                for worker in sorted(self.workers, key=lambda worker: worker.waiting):
                    if worker.waiting < AHEAD and given < min(n, i + ahead):
                        worker.give(given)
                        given += 1
                for connection in wait([worker.pipe for worker in self.workers if worker.waiting]):
                    worker = next(worker for worker in self.workers if worker.pipe is connection)
                    index, value, failure = worker.receive()
                    ready[index] = value, failure
            value, failure = ready.pop(i)
            if failure is not None:
                raise failure
            yield value

    def _tell(self, result: Any) -> None:
        message = _dumped(result, memoryview(bytearray()))
        for worker in self.workers:
            worker.send(message)


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
    def forked(cls, program: Callable[[WorkerPool], Iterable[Any]], size: int) -> _Worker:
        ours, theirs = Pipe()
        shared = mmap.mmap(-1, AHEAD * SLOT)
        with (
            warnings.catch_warnings()
        ):  # Python 3.12 warns where there are threads: a worker takes none of their locks
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            ours.close()
            _serve(_Hand(size, pipe=theirs, shared=shared), program)
        theirs.close()
        return cls(pid, ours, shared)

    def give(self, index: int) -> None:
        """Let it work on an item."""
        self.waiting += 1
        self.send(b"%d" % index)

    def send(self, message: bytes) -> None:
        """Send a message; where it has died, `receive` says so."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send_bytes(message)

    def receive(self) -> tuple[int, Any, BaseException | None]:
        try:
            message = self.pipe.recv_bytes()
        except (EOFError, ConnectionResetError) as error:
            self.status = os.waitpid(self.pid, 0)[1]
            raise ResourceError(
                f"a worker process ended with {_ending(self.status)}",
                fix="use --threads 1, which needs the least memory",
            ) from error
        index, value, failure = _Loads(message, _slot(self.shared, self.received)).load()
        self.waiting, self.received = self.waiting - 1, self.received + 1
        return index, value, failure

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


@dataclass(eq=False, slots=True)
class _Hand(WorkerPool):
    """The crew as a worker sees it."""

    pipe: Connection = field(kw_only=True)
    shared: mmap.mmap = field(kw_only=True)
    answered: int = 0

    def ordered(self, function: Callable[[Item], Value], items: Sequence[Item]) -> Iterator[Value]:
        self._told(function, items)
        yield from ()

    def agreed(
        self,
        function: Callable[[Item], Value],
        items: Sequence[Item],
        combine: Callable[[Iterator[Value]], Result],
    ) -> Result:
        result: Result = self._told(function, items)
        return result

    def _told(self, function: Callable[[Item], Value], items: Sequence[Item]) -> Any:
        """Make what is handed out, and return the result that ends it."""
        while (message := self.pipe.recv_bytes()).isdigit():
            self.pipe.send_bytes(
                _answer(function, items, int(message), _slot(self.shared, self.answered))
            )
            self.answered += 1
        return _Loads(message, memoryview(b"")).load()


def _serve(crew: _Hand, program: Callable[[WorkerPool], Iterable[Any]]) -> NoReturn:
    """Run the program until its end, or until the parent is gone; nothing of the parent is cleaned up or flushed here."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for _ in program(crew):
            pass
    finally:
        os._exit(0)


def _answer(
    function: Callable[[Item], Value], items: Sequence[Item], index: int, slot: memoryview
) -> bytes:
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
        into[:] = (
            memoryview(held) if isinstance(held, bytes) else self._slot[held : held + len(into)]
        )
        return found
