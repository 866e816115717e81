"""The options of `demerge stats`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from demerge.errors import UsageError
from demerge.options import DataOptions, DeviceOptions, SeedOptions, again, option

STATISTICS = ("fisher", "gram")


def parse_statistics(text: str) -> tuple[str, ...]:
    """Read names separated by commas; a name that is given twice counts once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",")))


@dataclass(frozen=True, kw_only=True, repr=False)
class StatisticsOptions(DataOptions, DeviceOptions):
    """Which statistics are measured, of which models and ranges."""

    models: list[str] = option(
        help="Experts, or other pipeline folders or Hub ids.", argument=True, metavar="MODEL..."
    )
    ranges: str | None = option(
        None,
        "uniform:N, joint, a partition.json, START:STOP, or a list that covers [0, T).",
        shown_default="the expert's own range",
    )
    out: Path | None = option(
        None,
        "Folder that gets one folder per range.",
        flags=("-o", "--out"),
        shown_default="next to each expert.json",
    )
    statistics: tuple[str, ...] = option(
        STATISTICS,
        "Names separated by commas: fisher, the mean squared gradients; gram, the mean products of"
        " layer inputs (for regmean).",
        parse=parse_statistics,
    )
    samples: int = option(256, "Images per range, each with a timestep and noise.", ge=1)
    seed: int = again(SeedOptions, "seed")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.statistics:
            if name not in STATISTICS:
                fix = f"use {' or '.join(STATISTICS)}"
                raise UsageError(f"statistic '{name}' is unknown", fix=fix)

    @property
    def recorded(self) -> dict[str, int]:
        """The options that a statistic depends on."""
        return {"samples": self.samples, "seed": self.seed}
