"""`demerge data check`: what a source of images holds, and what in it is broken."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from demerge.cli.common import Json, emit, progress, show

if TYPE_CHECKING:
    from demerge.data import Scan

SHOWN = 6
MOST_BROKEN = 100
UNUSABLE = 3

app = typer.Typer(no_args_is_help=True, help="Look at data before a model does.")


@app.callback()
def data() -> None:
    """Look at data before a model does."""


@app.command()
def check(
    source: Annotated[
        str,
        typer.Argument(
            help="digits, hf:NAME, a folder of images, CIFAR-10 batches, idx files or .npz."
        ),
    ],
    json: Json = False,
) -> None:
    """Read every image; tell counts, broken files, sizes, captions, a verdict. Exit code 3 unless all of it is usable."""
    from demerge.data import scan

    with progress(1, "check") as bar:
        found = scan(source, progress=bar)
    emit(found.document(), None, json)
    if not json:
        show("\n".join(_lines(found)))
    if not found.usable:
        raise typer.Exit(UNUSABLE)


def _lines(found: Scan) -> list[str]:
    hidden = max(0, len(found.broken) - MOST_BROKEN)
    captions = "none" if found.captions is None else f"{found.captions} of {found.readable}"
    rows = [
        ("images", f"{found.files:,}, {found.readable:,} readable"),
        ("splits", _counts(found.splits)),
        ("sizes", _sizes(found.sizes)),
        ("modes", _counts(found.modes)),
        ("captions", captions),
        ("notes", _counts(found.notes)),
        *(("link", f"{name}: {what}") for name, what in found.links.items()),
        ("others", _counts(found.passed_over)),
        *(("broken", f"{name}: {reason}") for name, reason in found.broken[:MOST_BROKEN]),
        ("broken", f"and {hidden:,} more; --json lists all" if hidden else ""),
        ("verdict", found.verdict),
    ]
    return [f"{name:9} {text}" for name, text in rows if text]


def _sizes(counts: dict[str, int]) -> str:
    if len(counts) <= SHOWN:
        return _counts(counts)
    shorter = [min(map(int, size.split("x"))) for size in counts]
    longer = [max(map(int, size.split("x"))) for size in counts]
    spans = (
        f"shorter side {min(shorter)} to {max(shorter)}, longer side {min(longer)} to {max(longer)}"
    )
    return f"{len(counts):,} sizes, {spans}"


def _counts(counts: dict[str, int]) -> str:
    shown = [f"{name} ({count:,})" for name, count in list(counts.items())[:SHOWN]]
    return ", ".join([*shown, *([f"{len(counts) - SHOWN} more"] if len(counts) > SHOWN else [])])
