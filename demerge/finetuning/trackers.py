"""Trackers of experiments: what the log says, sent on through accelerate's tracker classes.

A tracker gets the loss, the loss by timesteps, the learning rate, the skipped steps and the images
per second, at each line of the log. A tracker that fails is turned off with one line; the training
goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from demerge.errors import UsageError
from demerge.finetuning import objective
from demerge.finetuning.losses import name_bins
from demerge.finetuning.options import FinetuneOptions
from demerge.finetuning.trainer import ExpertTraining, Observer

PROJECT = "demerge"


def check_trackers(options: FinetuneOptions) -> None:
    """Check that the package of each tracker is installed.

    Raises:
        UsageError: if not, with what to install.
    """
    for name in options.report_to:
        if find_spec(name) is None:
            what = f"--report-to {name} needs the package {name}, which is not installed"
            raise UsageError(what, fix=f"pip install {name}, or leave the option out")


class Trackers(Observer):
    """Sends each line of the log to the trackers; each expert is a run of its own.

    Args:
        folder: gets the folder RANGE with the files of the trackers that write some.
    """

    def __init__(self, names: tuple[str, ...], folder: Path) -> None:
        self.names, self.folder = names, folder
        self._running: dict[str, Any] = {}
        self._of: ExpertTraining | None = None
        self._last = (0, 0.0)

    def stepped(self, training: ExpertTraining) -> None:
        """Start the trackers at the first step that is seen of an expert."""
        if self._of is training:
            return
        self._of, self._last = training, (training.step, time.perf_counter())
        for name in self.names:
            self._try(training, name, partial(self._start, training, name))

    def logged(self, training: ExpertTraining, line: dict[str, Any]) -> None:
        """Send a line of the log."""
        values, step = self._values(training, line), line["step"]
        for name, tracker in list(self._running.items()):
            self._try(training, name, partial(tracker.log, values, step=step))

    def finish(self, training: ExpertTraining, folder: Path) -> None:
        """Close the trackers."""
        for name, tracker in list(self._running.items()):
            self._try(training, name, tracker.finish)
        self._running, self._of = {}, None

    def _start(self, training: ExpertTraining, name: str) -> None:
        """Start one tracker; accelerate's need its state of processes, but no Accelerator."""
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState(cpu=training.base.device.type == "cpu")
        run, kind = str(training.range), LOGGER_TYPE_TO_CLASS[name]
        if name == "tensorboard":
            tracker = kind(run, self.folder)
        else:
            settings: dict[str, Any] = {"name": run, "config": training.options.document()}
            if name == "wandb":
                settings["dir"] = str(self.folder / run)
                (self.folder / run).mkdir(parents=True, exist_ok=True)
            tracker = kind(PROJECT, **settings)
        tracker.start()
        self._running[name] = tracker

    def _values(self, training: ExpertTraining, line: dict[str, Any]) -> dict[str, float]:
        (before, then), now = self._last, time.perf_counter()
        self._last, step = (line["step"], now), line["step"]
        bins = name_bins(training.base.T, len(line["loss_by_bin"]))
        losses = {
            f"loss/{name}": loss for name, loss in zip(bins, line["loss_by_bin"], strict=True)
        }
        values = {
            "loss": line["loss"],
            **losses,
            "learning_rate": objective.learning_rate(training.options, step - 1),
            "skipped_steps": training.skipped,
        }
        if step > before:
            images = (step - before) * training.options.samples_per_step(training.world.size)
            values["images_per_second"] = images / (now - then)
        return {name: value for name, value in values.items() if value is not None}

    def _try(self, training: ExpertTraining, name: str, act: Callable[[], object]) -> None:
        """Do something with a tracker; turn it off if that fails."""
        try:
            act()
        except Exception as error:  # whatever a foreign service raises
            self._running.pop(name, None)
            reason = (str(error) or type(error).__name__).splitlines()[0]
            training.say(f"the tracker {name} failed and is off: {reason}")
