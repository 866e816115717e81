"""Averages of the parameters by powers of the step, of which any other length can be made later.

    mean_t = beta_t mean_{t-1} + (1 - beta_t) theta_t,    beta_t = (1 - 1/t)^(gamma + 1)
    sigma_rel = sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3)))     width by t, so a length
    weight of theta_i in mean_t: (i / t)^(gamma + 1) - ((i - 1) / t)^(gamma + 1)

These are the averages of EDM2 (arXiv 2312.02696, section 3 and appendix C). Their profiles are
nearly a basis: the profile of any length is a sum of stored ones, by least squares, and so the
average of that length is the same sum of stored averages (`demerge ema`).

The average is of the trained parameters, W and K of the projection each, as the trainer's own
average is. W K is not linear in (W, K): sums of folded weights would be neither the average of the
products nor the product of the averages. So stored averages are not folded, and the sum is.

A step that was skipped repeats its parameters. Each length costs one more copy of the trained
parameters in memory and in each checkpoint, one pass over them per step, and one copy on disk for
each snapshot, all in float32.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from demerge.finetuning.options import FinetuneOptions
from demerge.storage.checkpoint import commit_tensors

FOLDER = "ema"
Floats = NDArray[np.float64]


def exponent(sigma_rel: float) -> float:
    """Return gamma + 1 of a length, with gamma > -1 the largest root of its equation."""
    square = sigma_rel**-2
    return float(np.roots([1, 7, 16 - square, 12 - square]).real.max()) + 1


def profile(sigma_rel: float, step: int, steps: int) -> Floats:
    """Return the weights [steps] of the parameters after step 1, 2 and so on in mean_step."""
    times = np.minimum(np.arange(steps + 1) / step, 1)
    weights: Floats = np.diff(times ** exponent(sigma_rel))
    return weights


def fit_profile(
    stored: Sequence[tuple[float, int]], sigma_rel: float, steps: int
) -> tuple[Floats, float]:
    """Return the weights of stored averages whose sum is nearest to the average of a length.

    Args:
        stored: the length and the step of each.

    Returns:
        one weight per stored average, with the sum 1, and the relative L2 error of the profile.
    """
    A = np.stack([profile(length, step, steps) for length, step in stored], axis=1)
    b = profile(sigma_rel, steps, steps)
    x = np.linalg.lstsq(A, b)[0].astype(np.float64)
    x = x / x.sum()
    return x, float(np.linalg.norm(A @ x - b) / np.linalg.norm(b))


class PowerAverages:
    """The running averages of one expert, one for each of `ema_lengths`, and their snapshots.

    Attributes:
        means: tensors `power.LENGTH.NAME`, which a checkpoint holds too.
    """

    def __init__(self, parameters: Mapping[str, Tensor], options: FinetuneOptions) -> None:
        self.options, self.parameters = options, dict(parameters)
        self.lengths = sorted(set(options.ema_lengths))
        self.means = {
            f"power.{length}.{name}": p.detach().clone()
            for length in self.lengths
            for name, p in parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int, folder: Path) -> None:
        """Take in the parameters after `step`; store a snapshot in `folder` if one is due.

        No kernel waits for the host, so that the device goes on.
        """
        values = [p.detach() for p in self.parameters.values()]
        for length in self.lengths:
            weight = 1 - (1 - 1 / step) ** exponent(length)
            torch._foreach_lerp_(list(self._of(length).values()), values, weight)
        is_last = step == self.options.max_train_steps
        if is_last or step % self.options.steps_between_snapshots() == 0:
            self._store(step, folder)

    def _of(self, length: float) -> dict[str, Tensor]:
        """Return the averages of one length by the names of the parameters."""
        return {name: self.means[f"power.{length}.{name}"] for name in self.parameters}

    def _store(self, step: int, folder: Path) -> None:
        for length in self.lengths:
            path = folder / FOLDER / f"{length}-{step:08d}.safetensors"
            metadata = {"sigma_rel": f"{length}", "step": str(step)}
            commit_tensors(path, self._of(length), metadata)

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Load `means` as a checkpoint held them."""
        for name, mean in self.means.items():
            mean.copy_(tensors[name])


def copy_snapshots(state: Path, expert: Path) -> None:
    """Copy the snapshots, if there are any, to the folder of the finished expert."""
    if (state / FOLDER).is_dir():
        shutil.copytree(state / FOLDER, expert / FOLDER)


def disk_bytes_of_averages(options: FinetuneOptions, experts: int, trained: int) -> int:
    """Return the bytes on disk of all snapshots, and of the averages in checkpoints.

    The snapshots of one expert exist twice when it is committed.
    """
    snapshots = -(-options.max_train_steps // options.steps_between_snapshots())
    copies = snapshots * (experts + 1) + options.checkpoints_total_limit + 1
    return 4 * trained * len(options.ema_lengths) * copies
