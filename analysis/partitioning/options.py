"""The options of a partition into ranges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from demerge.errors import UsageError
from demerge.options import Options, option

PANEL = "Partition"
Method = Literal["gradient", "hierarchical", "uniform", "logsnr"]
Score = Literal["step", "energy", "cosine"]


def parse_range_count(text: str) -> int | None:
    """Return a number of ranges, None for `auto`.

    Raises:
        UsageError: if the text is neither.
    """
    if text == "auto":
        return None
    if not (text.isascii() and text.isdigit()):
        fix = "give a whole number from 1 on, or auto"
        raise UsageError(f"'{text}' is not a number of ranges", fix=fix)
    return int(text)


@dataclass(frozen=True, kw_only=True, repr=False)
class PartitionOptions(Options):
    """How [0, T) is partitioned into ranges."""

    ranges: int | None = option(
        4,
        "Number of ranges; auto is as many as held-out groups support.",
        ge=1,
        parse=parse_range_count,
        metavar="N|auto",
        panel=PANEL,
    )
    method: Method = option("gradient", "How boundaries are chosen.", panel=PANEL)
    score: Score = option("step", "What gradient and hierarchical maximise.", panel=PANEL)
