"""Where the experts of a finetune are trained. No record holds these options."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from demerge.durations import parse_seconds, write_seconds
from demerge.errors import UsageError
from demerge.options import Options, option

PANEL = "Many experts"
OWN = {"array": "leave it out", "time": "give --time-limit", "signal": "leave it out"}


def parse_sbatch(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Read options of sbatch as NAME=VALUE.

    A value becomes part of a `#SBATCH` line, which has no sure way to quote.

    Raises:
        UsageError: if a text is none, or its value has spaces, quotes or the like.
    """
    pairs = []
    for text in texts:
        name, _, value = text.partition("=")
        name = name.removeprefix("--").replace("_", "-")
        if not re.fullmatch(r"[a-z][a-z-]*", name) or not re.fullmatch(r"[\w.,:/@+|&*%=-]+", value):
            fix = "write NAME=VALUE without spaces or quotes, for example partition=gpu"
            raise UsageError(f"--sbatch {text!r} is not an option of sbatch", fix=fix)
        if name in OWN:
            raise UsageError(f"--sbatch {name} is set by demerge", fix=OWN[name])
        pairs.append((name, value))
    return tuple(pairs)


@dataclass(frozen=True, kw_only=True, repr=False)
class ExecutorOptions(Options):
    """Who runs the tasks; a task is the finetune of one range."""

    executor: Literal["local", "ray", "slurm"] = option(
        "local",
        "Who trains the ranges: this machine, a Ray cluster, or a job array of Slurm.",
        panel=PANEL,
        recorded=False,
    )
    num_workers: int | None = option(
        None,
        "Experts that --executor local trains at the same time.",
        panel=PANEL,
        ge=1,
        shown_default="one per visible GPU",
        recorded=False,
    )
    retries: int = option(
        5,
        "How often Ray or Slurm starts a task again whose node failed or whose time ended.",
        panel=PANEL,
        ge=0,
        recorded=False,
    )
    time_limit: float = option(
        86400.0,
        "Time of a Slurm job.",
        panel=PANEL,
        parse=parse_seconds,
        write=write_seconds,
        shown_default="24h",
        metavar="TIME",
        recorded=False,
    )
    sbatch: Sequence[tuple[str, str]] = option(
        (),
        "Option of sbatch, for example partition=gpu. May be repeated.",
        panel=PANEL,
        parse=parse_sbatch,
        multiple=True,
        metavar="NAME=VALUE",
        recorded=False,
    )
    submit: bool = option(False, "Also submit the job array to Slurm.", panel=PANEL, recorded=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.sbatch, Mapping):
            object.__setattr__(self, "sbatch", tuple(self.sbatch.items()))
        self.require("time_limit", self.time_limit >= 300, "at least 5m")
        is_slurm = self.executor == "slurm"
        self.require("submit", is_slurm or not self.submit, "False without --executor slurm")
        self.require("sbatch", is_slurm or not self.sbatch, "empty without --executor slurm")
        is_free = self.executor == "local" or self.num_workers is None
        self.require("num_workers", is_free, "left out with --executor ray or slurm")
