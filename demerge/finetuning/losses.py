"""The losses of a finished expert for people: a table and a plot of its log.

losses.csv    step, loss, and one column per tenth of [0, T), named by its timesteps
losses.svg    the loss of each tenth over the steps
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

from demerge.finetuning.trainer import ExpertTraining, Observer
from demerge.storage.atomic import commit_bytes, commit_text

Line = Mapping[str, Any]


class LossFiles(Observer):
    """Writes losses.csv and losses.svg next to the log of a finished expert."""

    def finish(self, training: ExpertTraining, folder: Path) -> None:
        """Write both files, if there is a log."""
        log = training.folder / "log.jsonl"
        if not log.is_file():
            return
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        bins = name_bins(training.base.T, len(lines[0]["loss_by_bin"]))
        commit_text(folder / "losses.csv", loss_table(lines, bins))
        # matplotlib takes longer to load than a small training
        from demerge.finetuning.loss_plot import draw_losses
        from demerge.reporting.theme import render

        commit_bytes(folder / "losses.svg", render(draw_losses(lines, bins)))


def name_bins(T: int, bins: int) -> list[str]:
    """Return the timesteps of each bin of equal width: 0000-0100 and so on."""
    edges = [-(-T * i // bins) for i in range(bins + 1)]
    return [f"{start:04d}-{stop:04d}" for start, stop in pairwise(edges)]


def loss_table(lines: Sequence[Line], bins: Sequence[str]) -> str:
    """Return lines of the log as CSV; a bin without samples is empty."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", "loss", *bins])
    for line in lines:
        writer.writerow([line["step"], line["loss"], *line["loss_by_bin"]])
    return text.getvalue()
