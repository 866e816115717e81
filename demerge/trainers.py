"""A range of timesteps in the words of other trainers: their flags, or lines of their configs.

They do not count alike (`demerge.timestep_conventions`). What each one does was read in its source,
which `Trainer.source` names:

    musubi          t after the shift, 0 to 1000. With its default `--timestep_sampling sigma` the
                    same numbers are steps of the shifted schedule, from noise on. Without
                    `--preserve_distribution_shape` all draws are squeezed into the range.
    kohya           t, 0 to 1000. SD and SDXL: the DDPM timestep. SD3: shifted draws are squeezed
                    into the range. Flux: not read.
    ai-toolkit      steps of a schedule of 1000 from noise on. With `timestep_type: linear`, step k
                    is t = 1000 - k. Its Wan 2.2 cuts at 875 (i2v 900) and ignores the numbers.
    diffusion-pipe  sigma after the shift; draws outside are left out.
    diffsynth       shares of the steps of the shifted schedule of 1000, from noise on.
    simpletuner     no range: a list of sigmas after the shift, drawn uniformly.
    onetrainer      u before the shift, in whole 1/1000; draws are squeezed into the range. COS_MAP,
                    SIGMOID and INVERTED_PARABOLA count after the shift instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from demerge.errors import UsageError
from demerge.timestep_conventions import MEANINGS, Convention, TrainerName, shift, unshift
from demerge.timesteps import STEPS, Partition, TimestepRange

DRAWS = 16  # sigmas of a list that stands for a range
TINY = 1e-9  # of a step, against the rounding of floats


@dataclass(frozen=True, slots=True)
class Trainer:
    """How a trainer limits the timesteps that it draws.

    Attributes:
        convention: what its numbers are.
        source: where that was read.
        note: what else must be set, or must not.
        write: its lines for a range and a shift.
        needs_shift: whether its numbers depend on a shift that its lines cannot set.
    """

    convention: Convention
    source: str
    note: str
    write: Callable[[TimestepRange, float], list[str]]
    needs_shift: bool = False


@dataclass(frozen=True, slots=True)
class TrainerLines:
    """A partition in the words of a trainer."""

    name: TrainerName
    partition: Partition
    shift: float
    is_assumed: bool = False  # nobody named the shift

    @property
    def trainer(self) -> Trainer:
        """How that trainer counts."""
        return TRAINERS[self.name]

    def lines(self) -> list[str]:
        """Return flags or lines of a config, each range under a comment."""
        text = []
        for span in self.partition:
            text += [f"# {span}", *self.trainer.write(span, self.shift)]
        return text

    def notes(self) -> list[str]:
        """Return what a person should know of the lines."""
        trainer, ratio = self.trainer, self.partition.boundary_ratio
        notes = [
            f"trainer   {self.name}, read in {trainer.source}",
            f"counts    {MEANINGS[trainer.convention]}",
            f"note      {trainer.note}",
        ]
        if self.is_assumed:
            notes.append("shift     1, since none is known: give --shift, for example 5 for Wan")
        elif self.name == "ai-toolkit" and self.shift != 1:
            notes.append(f"shift     {self.shift:g} is not used: timestep_type linear has none")
        return notes if ratio is None else [*notes, f"diffusers boundary_ratio {ratio:g}"]

    def document(self) -> dict[str, Any]:
        """Return the lines as JSON values."""
        ranges = [
            {"range": [span.start, span.stop], "lines": self.trainer.write(span, self.shift)}
            for span in self.partition
        ]
        about = {"convention": self.trainer.convention, "source": self.trainer.source}
        ratio = self.partition.boundary_ratio
        document = {"trainer": self.name, "shift": self.shift, **about, "ranges": ranges}
        return document | {"boundary_ratio": ratio}


def write_for(name: TrainerName, partition: Partition, shift: float | None = None) -> TrainerLines:
    """Return a partition in the words of a trainer.

    Args:
        shift: of the trainer's draws; 1 if it is None.

    Raises:
        UsageError: if the partition does not have 1000 timesteps, or the shift must be known.
    """
    if partition.total != STEPS:
        what = f"{name} counts {STEPS} timesteps, the partition has {partition.total}"
        raise UsageError(what, fix=f"partition a base of {STEPS} timesteps")
    if shift is None and TRAINERS[name].needs_shift:
        what = f"{name} counts the steps of a schedule that its pipeline shifts; shift is not given"
        raise UsageError(what, fix="give --shift 5 for Wan, --shift 3 for FLUX.1 and Z-Image")
    return TrainerLines(name, partition, 1.0 if shift is None else shift, shift is None)


def count_steps_from(t: int, s: float) -> int:
    """Return how many steps of the schedule sigma_k = shift(1 - k / 1000), k < 1000, reach t.

    A range [start, stop) has the steps from count(stop) to count(start). Step 0, t = 1000, belongs
    to the range that stops there.
    """
    if t == STEPS:
        return 0
    return min(STEPS, math.floor(STEPS * (1 - unshift(t / STEPS, s)) + TINY) + 1)


def _check_steps(span: TimestepRange, s: float, first: int, stop: int) -> None:
    """Refuse a range that lies between two of the thousand steps that a trainer counts in."""
    if first >= stop:
        what = f"no step of a schedule of {STEPS} with shift {s:g} lies in {span}"
        raise UsageError(what, fix="widen the range")


def _musubi(span: TimestepRange, s: float) -> list[str]:
    draws = f"--timestep_sampling shift --discrete_flow_shift {s:g} --preserve_distribution_shape"
    return [f"{draws} --min_timestep {span.start} --max_timestep {span.stop}"]


def _kohya(span: TimestepRange, s: float) -> list[str]:
    draws = "" if s == 1 else f"--training_shift {s:g} "
    return [f"{draws}--min_timestep {span.start} --max_timestep {span.stop}"]


def _ai_toolkit(span: TimestepRange, s: float) -> list[str]:
    first, last = count_steps_from(span.stop, 1.0), count_steps_from(span.start, 1.0)
    return [
        "train:",
        "  noise_scheduler: flowmatch",
        "  timestep_type: linear",
        f"  min_denoising_steps: {first}",
        f"  max_denoising_steps: {min(last, STEPS - 1)}",
    ]


def _diffusion_pipe(span: TimestepRange, s: float) -> list[str]:
    low, high = span.start / STEPS, span.stop / STEPS
    return ["[model]", f"shift = {float(s)}", f"min_t = {low}", f"max_t = {high}"]


def _diffsynth(span: TimestepRange, s: float) -> list[str]:
    first, stop = count_steps_from(span.stop, s), count_steps_from(span.start, s)
    _check_steps(span, s, first, stop)
    low, high = first / STEPS, stop / STEPS
    return [f"--min_timestep_boundary {low:g} --max_timestep_boundary {high:g}"]


def _simpletuner(span: TimestepRange, s: float) -> list[str]:
    low, high = unshift(span.start / STEPS, s), unshift(span.stop / STEPS, s)
    middles = [low + (high - low) * (i + 0.5) / DRAWS for i in range(DRAWS)]
    sigmas = ",".join(f"{shift(u, s):.6f}" for u in reversed(middles))
    return [f"--flow_custom_timesteps {sigmas}"]


def _onetrainer(span: TimestepRange, s: float) -> list[str]:
    first = math.ceil(STEPS * unshift(span.start / STEPS, s) - TINY)
    stop = math.floor(STEPS * unshift(span.stop / STEPS, s) + TINY)
    _check_steps(span, s, first, stop)
    return [
        f'"timestep_shift": {float(s)},',
        '"dynamic_timestep_shifting": false,',
        '"timestep_distribution": "UNIFORM",',
        f'"min_noising_strength": {first / STEPS},',
        f'"max_noising_strength": {stop / STEPS},',
    ]


TRAINERS: Mapping[TrainerName, Trainer] = {
    "musubi": Trainer(
        "timestep",
        "kohya-ss/musubi-tuner: src/musubi_tuner/hv_train_network.py, docs/wan.md",
        "without --timestep_sampling and --preserve_distribution_shape the numbers mean something "
        "else. One run for both experts of Wan 2.2: --timestep_boundary",
        _musubi,
    ),
    "kohya": Trainer(
        "timestep",
        "kohya-ss/sd-scripts: library/train_util.py, library/sd3_train_utils.py",
        "for SD, SDXL and SD3; only SD3 has --training_shift. Its Flux scripts ignore the range",
        _kohya,
    ),
    "ai-toolkit": Trainer(
        "index",
        "ostris/ai-toolkit: jobs/process/BaseSDTrainProcess.py, "
        "toolkit/samplers/custom_flowmatch_sampler.py",
        "other timestep_types give the steps other t. arch wan22_14b ignores the steps and cuts by "
        "itself: set model_kwargs train_high_noise and train_low_noise instead",
        _ai_toolkit,
    ),
    "diffusion-pipe": Trainer(
        "sigma",
        "tdrussell/diffusion-pipe: models/wan/wan.py, utils/common.py",
        "draws are logit-normal unless timestep_sample_method is uniform",
        _diffusion_pipe,
    ),
    "diffsynth": Trainer(
        "index",
        "modelscope/DiffSynth-Studio: diffsynth/diffusion/loss.py, "
        "diffsynth/diffusion/flow_match.py",
        "min is the noisy end. --shift is the pipeline's own, which no flag changes",
        _diffsynth,
        needs_shift=True,
    ),
    "simpletuner": Trainer(
        "sigma",
        "bghira/SimpleTuner: documentation/distillation/GLANCE.md",
        "flow matching alone; the list replaces the draws and the schedule",
        _simpletuner,
    ),
    "onetrainer": Trainer(
        "unshifted",
        "Nerogar/OneTrainer: modules/modelSetup/mixin/ModelSetupNoiseMixin.py",
        "LOGIT_NORMAL and HEAVY_TAIL count like UNIFORM, the other distributions after the shift",
        _onetrainer,
    ),
}
