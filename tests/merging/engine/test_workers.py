"""Work shared by forked processes: the order, the values, the errors, and that nobody is left
behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from demerge.errors import InputError, ResourceError
from demerge.merging.engine.workers import CAN_FORK, SLOT, WorkerPool, run

pytestmark = pytest.mark.skipif(not CAN_FORK, reason="workers are forked on Linux alone")
DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.uint8,
    torch.bool,
]


def ordered(function: Callable[[int], Any], items: Sequence[int], workers: int) -> Iterator[Any]:
    return run(lambda pool: pool.imap(function, items), workers)


def value(i: int) -> dict[str, object]:
    time.sleep(0.003 * (i * 7 % 5))
    return {
        "i": i,
        "pid": os.getpid(),
        "tensors": [torch.full((i, 2), i).to(dtype) for dtype in DTYPES],
    }


def test_values_come_in_order_from_several_processes() -> None:
    found = list(ordered(value, range(40), 3))
    assert [row["i"] for row in found] == list(range(40))
    assert len({row["pid"] for row in found} - {os.getpid()}) == 3
    for row in found:
        for got, expected in zip(row["tensors"], value(row["i"])["tensors"], strict=True):
            assert got.dtype == expected.dtype and torch.equal(got, expected)


def test_a_lone_process_does_it_all_and_no_items_are_none() -> None:
    assert list(ordered(lambda i: os.getpid(), [0, 1], 1)) == [os.getpid()] * 2
    assert list(ordered(lambda i: i, [], 4)) == []


def test_tensors_outlive_their_place_and_may_be_larger_than_it() -> None:
    def made(i: int) -> tuple[Tensor, Tensor, Tensor]:
        return (
            torch.full((SLOT // 4 - i,), i),
            torch.arange(10).view(2, 5).T + i,
            torch.tensor(float(i)),
        )

    for i, found in enumerate(list(ordered(made, range(12), 2))):
        assert all(map(torch.equal, found, made(i)))


@pytest.mark.parametrize("workers", [1, 3])
def test_all_go_on_from_what_one_process_made_of_all_values(workers: int) -> None:
    combined = []

    def program(pool: WorkerPool) -> Iterator[tuple[int, list[int], Tensor]]:
        def combine(values: Iterator[Tensor]) -> Tensor:
            combined.append(os.getpid())
            return torch.stack(list(values))

        squares = pool.reduce_and_broadcast(lambda i: torch.tensor(i * i), range(50), combine)
        nothing = pool.reduce_and_broadcast(lambda i: i, [], list)
        rest = pool.reduce_and_broadcast(
            lambda i: i + int(squares.sum()), range(3), list
        )  # a worker has to know the squares
        return pool.imap(lambda i: (os.getpid(), nothing + rest, squares + i), range(20))

    found = list(run(program, workers))
    squares = torch.arange(50) ** 2
    assert combined == [os.getpid()]
    assert all(
        rest == [40425, 40426, 40427] and torch.equal(x, squares + i)
        for i, (_, rest, x) in enumerate(found)
    )
    assert len({pid for pid, *_ in found}) == workers and (workers == 1) == (
        {pid for pid, *_ in found} == {os.getpid()}
    )


def test_an_error_of_the_program_itself_ends_all() -> None:
    def program(pool: WorkerPool) -> Iterator[int]:
        yield from pool.imap(lambda i: os.getpid(), range(20))
        raise InputError("no", fix="yes")

    seen: set[int] = set()
    with pytest.raises(InputError, match="no"):
        for pid in run(program, 3):
            seen.add(pid)
    assert len(seen) > 1 and not any(map(alive, seen))


def test_an_error_keeps_its_class_its_fix_and_where_it_was_raised() -> None:
    def fails(i: int) -> int:
        if i == 3:
            raise InputError("tensor x holds NaN", fix="use another")
        return i

    found = []
    with pytest.raises(InputError, match="tensor x holds NaN") as raised:
        for i in ordered(fails, range(10), 2):
            found.append(i)
    assert (
        found == [0, 1, 2]
        and raised.value.fix == "use another"
        and "in fails" in raised.value.__notes__[0]
    )


def test_an_error_that_cannot_travel_is_told() -> None:
    def fails(i: int) -> int:
        error = ValueError(f"item {i}")
        error.lock = threading.Lock()  # type: ignore[attr-defined]
        raise error

    with pytest.raises(RuntimeError, match="ValueError: item 0"):
        list(ordered(fails, range(3), 2))


def test_the_error_is_that_of_the_first_item_whichever_worker_is_faster() -> None:
    def fails(i: int) -> int:
        time.sleep(0.2 * (i == 0))
        raise ValueError(f"item {i}")

    with pytest.raises(ValueError, match="item 0"):
        list(ordered(fails, range(3), 2))


def test_a_killed_worker_is_an_error_and_the_others_end() -> None:
    def work(i: int) -> int:
        if i == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid()

    seen: set[int] = set()
    with pytest.raises(ResourceError, match="SIGKILL"):
        for pid in ordered(work, range(20), 3):
            seen.add(pid)
    assert seen and not any(map(alive, seen))


def test_who_stops_listening_leaves_nobody_behind() -> None:
    running = ordered(lambda i: os.getpid(), range(1000), 2)
    seen = {next(running) for _ in range(20)}
    running.close()
    assert len(seen) == 2 and not any(map(alive, seen))


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    def work(i: int) -> int:
        (tmp_path / str(os.getpid())).touch()
        time.sleep(0.01)
        return i

    parent = os.fork()
    if parent == 0:
        try:
            list(ordered(work, range(10_000), 3))
        finally:
            os._exit(0)
    pids = until(lambda: [int(file.name) for file in tmp_path.iterdir()], 3)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert until(lambda: [pid for pid in pids if not alive(pid)], 3)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(found: Callable[[], list[int]], n: int) -> list[int]:
    for _ in range(500):
        if len(found()) == n:
            break
        time.sleep(0.01)
    assert len(found()) == n
    return found()
