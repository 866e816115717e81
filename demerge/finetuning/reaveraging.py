"""The stage `demerge ema`: an expert with the average of another length, made after its training.

The weights of stored averages are found by least squares of their profiles
(`demerge.finetuning.power_averages`). The sum is of the trained parameters; then the projection is
folded. Layers that were not trained stay the base's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from demerge.diffusion.model import Diffusion, not_finite
from demerge.errors import InputError, NumericalError, listed
from demerge.expert import BASE, EXPERT, Expert
from demerge.finetuning.layers import freeze_others
from demerge.finetuning.lora import FILE, write_lora
from demerge.finetuning.options import LONGEST, ReaverageOptions
from demerge.finetuning.power_averages import FOLDER, Floats, fit_profile
from demerge.finetuning.projection import attach, fold
from demerge.progress import Progress, silent
from demerge.stage import Cost
from demerge.storage.atomic import check_disk_space, check_is_new, commit_dir
from demerge.storage.checkpoint import Checkpoint, finite

POOR = 0.05
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class StoredAverage:
    """A stored average: its length, its step and its tensors."""

    sigma_rel: float
    step: int
    tensors: Checkpoint


@dataclass(frozen=True, slots=True)
class Reaveraged:
    """An expert with another average."""

    plan: ReaveragePlan

    def lines(self) -> list[str]:
        """Return nothing: the plan has said it."""
        return []

    def document(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return self.plan.document()


@dataclass(frozen=True, slots=True, eq=False)
class ReaveragePlan:
    """An expert, its stored averages, and their weights.

    Attributes:
        name: of the record, which lies next to the pipeline.
        error: of the profile, L2, relative.
    """

    options: ReaverageOptions
    name: str
    record: Expert
    snapshots: tuple[StoredAverage, ...]
    weights: Floats
    error: float

    def describe(self) -> list[str]:
        """Return what will be made, and how near it comes to the length."""
        lengths = sorted({snapshot.sigma_rel for snapshot in self.snapshots})
        stored = " ".join(f"{length:g}" for length in lengths)
        lines = [
            f"expert   {self.options.run}: {self.record.span}, {self.record.steps} steps",
            f"stored   {len(self.snapshots)} averages, sigma_rel {stored}",
            f"length   sigma_rel {self.options.sigma_rel:g}; error of its profile {self.error:.2%}",
        ]
        if self.error > POOR:
            lines.append("note     that is far off: stay near the stored lengths")
        return lines

    def cost(self) -> Cost:
        """Return the number of stored averages."""
        return Cost(steps=len(self.snapshots))

    def document(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "out": str(self.options.out),
            "sigma_rel": self.options.sigma_rel,
            "profile_error": self.error,
            "weights": [
                {"sigma_rel": each.sigma_rel, "step": each.step, "weight": float(weight)}
                for each, weight in zip(self.snapshots, self.weights, strict=True)
            ],
        }

    def run(self, progress: Progress = silent) -> Reaveraged:
        """Write the pipeline, whole or absent.

        Raises:
            InputError: if a stored average does not fit the expert.
            NumericalError: if the result holds NaN or Inf.
        """
        if self.record.options.get("lora_rank"):
            return self._write_lora(progress)
        model = Diffusion.load(self.options.run, pairs=False)
        trainable = copy.deepcopy(model.denoiser)
        frozen = freeze_others(trainable, self.record.train_layers)
        if self.record.options.get("projection") == "foldable":
            attach(trainable, frozen)
        names = self.snapshots[0].tensors.specs.keys()
        parameters = {name: p for name, p in trainable.named_parameters() if name in names}
        self._sum(parameters, progress)
        denoiser = fold(trainable, copy.deepcopy(model.denoiser))
        dtype = DTYPES.get(str(self.record.options.get("save_dtype")), torch.float32)
        nn.Module.to(denoiser, dtype=dtype)
        self._check_saved(not_finite(denoiser))
        with commit_dir(self.options.out) as folder:
            model.with_denoiser(denoiser).save(folder, keeps_projection=True)
            made = self.record.model_copy(update={"sigma_rel": self.options.sigma_rel})
            made.save(folder / self.name)
        return Reaveraged(self)

    def _write_lora(self, progress: Progress) -> Reaveraged:
        """Write the LoRA, whole or absent."""
        tensors, options = self.snapshots[0].tensors, self.record.options
        factors = {name: torch.empty_like(tensors[name]) for name in tensors}
        self._sum(factors, progress)
        dtype = DTYPES.get(str(options.get("save_dtype")), torch.float32)
        cast = {name: factor.to(dtype) for name, factor in factors.items()}
        self._check_saved(listed([name for name, factor in cast.items() if not finite(factor)]))
        part = next(iter(Checkpoint.open(self.options.run / FILE))).partition(".")[0]
        with commit_dir(self.options.out) as folder:
            write_lora(folder / FILE, cast, options, part)
            made = self.record.model_copy(update={"sigma_rel": self.options.sigma_rel})
            made.save(folder / self.name)
        return Reaveraged(self)

    def _check_saved(self, bad: str) -> None:
        if bad:
            what = f"the average of {self.options.run} holds NaN or Inf in {bad}"
            raise NumericalError(what, fix="train the expert again with --save-dtype float32")

    @torch.no_grad()
    def _sum(self, parameters: Mapping[str, Tensor], progress: Progress) -> None:
        """Overwrite the parameters by the weighted sum of the stored averages, in float64."""
        shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
        for i, (snapshot, weight) in enumerate(zip(self.snapshots, self.weights, strict=True)):
            tensors = snapshot.tensors
            if {name: tuple(spec.shape) for name, spec in tensors.specs.items()} != shapes:
                what = f"{tensors.place.path}: its parameters are not those of {self.options.run}"
                raise InputError(what, fix="use the folder as `demerge finetune` wrote it")
            for name, total in sums.items():
                total.add_(tensors[name].to(total), alpha=float(weight))
            progress(i + 1, len(self.snapshots))
        for name, parameter in parameters.items():
            parameter.copy_(sums[name])


def plan(options: ReaverageOptions) -> ReaveragePlan:
    """Read the record and the stored averages of an expert, and fit the length.

    Raises:
        UsageError: if the output exists.
        InputError: if the folder is no expert, or has no stored averages or damaged ones.
    """
    run = options.run
    check_is_new(options.out)
    name = BASE if (run / BASE).is_file() else EXPERT
    record = Expert.load(run / name)
    snapshots = tuple(_open(file) for file in sorted((run / FOLDER).glob("*.safetensors")))
    steps = record.steps or 0
    if not snapshots or max(snapshot.step for snapshot in snapshots) > steps:
        fix = "train it with --ema-lengths 0.05 --ema-lengths 0.10"
        raise InputError(f"{run} has no stored averages of its {steps} steps", fix=fix)
    weights_of_run = [file for file in run.rglob("*.safetensors") if file.parent.name != FOLDER]
    check_disk_space(options.out, sum(file.stat().st_size for file in weights_of_run))
    stored = [(snapshot.sigma_rel, snapshot.step) for snapshot in snapshots]
    weights, error = fit_profile(stored, options.sigma_rel, steps)
    return ReaveragePlan(options, name, record, snapshots, weights, error)


def _open(file: Path) -> StoredAverage:
    """Open a stored average.

    Raises:
        InputError: if the file is damaged, or does not say its length and step.
    """
    tensors = Checkpoint.open(file)
    try:
        length, step = float(tensors.metadata["sigma_rel"]), int(tensors.metadata["step"])
        if not 0 < length <= LONGEST or step < 1:
            raise ValueError(f"length {length} at step {step}")
    except (KeyError, ValueError) as error:
        what = f"{file}: it does not say of which length and step it is: {error}"
        raise InputError(what, fix="use the folder as `demerge finetune` wrote it") from error
    return StoredAverage(length, step, tensors)
