"""What the commands share: progress on stderr, the result on stdout, signals that end a run."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, TypeVar

import typer

from demerge.stage import Plan, Preview, Result

R = TypeVar("R", bound=Result)

LINE_SECONDS = 3.0

DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def printable(text: str) -> str:
    """Return the text without control characters that a hostile name could send to a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def say(*lines: str) -> None:
    """Print lines for the person at the terminal, on stderr."""
    for line in lines:
        print(printable(line), file=sys.stderr, flush=True)


def show(*lines: str) -> None:
    """Print lines of a command's result, on stdout."""
    for line in lines:
        print(printable(line))


def emit(result: dict[str, Any], path: Path | None, as_json: bool) -> None:
    """Print a command's result on stdout: one JSON document, or the path of the output."""
    if as_json:
        text = json.dumps(result, indent=2, ensure_ascii=False, default=str)
        print("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text))
    elif path is not None:
        show(str(path))


def execute(plan: Plan[R], name: str, *, out: Path | None = None, json: bool = False) -> R:
    """Print a plan, run it with a bar that `name` stands in front of, and print the result.

    The plan goes to stderr. The lines of the result go to stderr too if there is an output path or
    a JSON document for stdout, and else to stdout.
    """
    say(*plan.describe())
    with progress(plan.cost().steps, name) as bar:
        result = plan.run(bar)
    tell = say if json or out is not None else show
    tell(*result.lines())
    emit(result.document(), out, json)
    return result


def preview(plan: Preview, *, json: bool = False) -> None:
    """Print what a planned stage will do, for `--dry-run`: lines on stderr, JSON on stdout."""
    say(*plan.describe())
    emit(plan.document(), None, json)


@contextmanager
def progress(total: int, what: str) -> Iterator[Any]:
    """Draw a bar on stderr; the value is a `demerge.progress.Progress`.

    Off a terminal it prints a line every few seconds instead, so that short work is silent.
    """
    if not sys.stderr.isatty():
        last = time.monotonic()

        def print_line(done: int, total: int, text: str = "") -> None:
            nonlocal last
            if time.monotonic() - last >= LINE_SECONDS:
                last = time.monotonic()
                say(f"{what} {done}/{total} {text}".rstrip())

        yield print_line
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)

        def update(done: int, total: int, text: str = "") -> None:
            description = printable(f"{what} {text}")
            bar.update(task, completed=done, total=total, description=description)

        yield update


@contextmanager
def stop_signals() -> Iterator[Any]:
    """Catch Ctrl-C, SIGTERM and SIGUSR1; the value is a function that returns whether one came.

    A second signal ends the program at once. After Ctrl-C the block raises KeyboardInterrupt in
    place of `Preempted`, for exit code 130.
    """
    from demerge.errors import Preempted

    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if seen:
            raise SystemExit(128 + number)
        seen.append(number)
        say("stopping after this step; a second signal stops at once")

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGUSR1"):
        numbers.append(signal.SIGUSR1)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: bool(seen)
    except Preempted as stopped:
        if signal.SIGINT in seen:
            say(f"demerge: {stopped}")
            raise KeyboardInterrupt from stopped
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
