"""How a base's outputs answer to experts: differences of outputs, and the loss as their quadratic.

    r   = f(theta_0) - y                                    the base's error at (x_t, t, c)
    u_p = [f(theta_0 + s tau_p) - f(theta_0)] / s           tau_p: task vector of an expert, or its
                                                            part in one block or layer
    dL_R(w) = sum_p w_p 2 E<r, u_p> + sum_pq w_p w_q E<u_p, u_q>
                                    E over x_0, eps and t ~ U(R), <,> the mean over elements

is what the loss of range R changes by, for f(theta_0 + sum_p w_p tau_p) = f(theta_0) + sum_p w_p
u_p: exact if f is linear in the weights. Else it leaves out how f bends along each tau_p beyond the
chord of length s, and between two of them. `measure_bend` measures what is left out at given
weights, on the same samples.

Samples lie in M groups of disjoint images, so that groups are independent. A group has the same
images in each range. Sample j of J of a group has t in the j-th of J equal parts of R. Image, t and
noise are functions of (seed, range, group, j), the same for the base and all experts. Only [R M P
P] is kept. The outputs of MEMORY bytes of samples are held at once, of a batch at least; for each
such part every task vector is put into the model once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from demerge.conflict import Array
from demerge.data import ImageData
from demerge.diffusion.conditioning import Condition
from demerge.diffusion.model import Diffusion, squared_error
from demerge.errors import NumericalError, UsageError
from demerge.merging import MergeSession
from demerge.progress import Progress, silent
from demerge.randomness import normal, permutation, uniform
from demerge.timesteps import Partition, TimestepRange

BATCH = 64
MEMORY = 1 << 28  # bytes of outputs that are held at once; one batch's are held in any case
COLUMNS = 1 << 12


@dataclass(frozen=True, slots=True, eq=False)
class Responses:
    """The loss of R ranges around a base as a function of P weights, for each of M groups."""

    ranges: Partition  # of timesteps
    blocks: tuple[str, ...]  # with weights of their own; empty for the model's
    K: int  # the number of experts; P = K or B K, expert by expert within each block
    loss: Array  # E|r|^2 [R M]
    slope: Array  # 2 E<r, u_p> [R M P]
    products: Array  # E<u_p, u_q> [R M P P]

    def __post_init__(self) -> None:
        if not all(np.isfinite(values).all() for values in (self.loss, self.slope, self.products)):
            what = "the responses to the experts are not finite"
            raise NumericalError(what, fix="check the weights of the experts")
        if not (self.loss.mean(1) > 0).all():
            what = "the base's loss in a range is 0, it cannot fall"
            raise NumericalError(what, fix="check the base and the data")

    @property
    def P(self) -> int:
        """The number of weights."""
        return int(self.slope.shape[-1])

    @property
    def M(self) -> int:
        """The number of groups of samples."""
        return int(self.slope.shape[1])

    @property
    def shares(self) -> Array:
        """The share of [0, T) that each range covers, [R]."""
        return np.array([len(span) / self.ranges.total for span in self.ranges])

    def change(self, w: Array) -> Array:
        """Return dL_R(w) on each group, [R M]; w [P], or [M P] for weights of each group's own."""
        W = np.broadcast_to(w, (self.M, self.P))
        linear = np.einsum("rmp,mp->rm", self.slope, W)
        return np.asarray(linear + np.einsum("mp,rmpq,mq->rm", W, self.products, W))


@dataclass(frozen=True, slots=True)
class Cell:
    """B samples: x_t and y [B *], t [B], and the condition."""

    x_t: Tensor
    t: Tensor
    y: Tensor
    condition: Condition


@dataclass(frozen=True, slots=True)
class Draws:
    """The samples of a measurement: M groups of J samples in each range."""

    model: Diffusion
    data: ImageData
    ranges: Partition
    samples: int = 512
    groups: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name, n in (("samples per range", self.samples), ("images", len(self.data))):
            if n < self.groups:
                fix = "give more, or fewer groups"
                raise UsageError(f"{n} {name} do not fill {self.groups} groups", fix=fix)

    @property
    def J(self) -> int:
        """The number of samples of a group in a range."""
        return self.samples // self.groups

    def cells(self, span: TimestepRange, r: int, m: int, size: int) -> Iterator[Cell]:
        """Yield the samples of group m in range r, `size` at a time."""
        model, step = self.model, r * self.groups + m
        images = permutation(len(self.data), self.seed, "coefficients-image")[m :: self.groups]
        for numbers in torch.arange(self.J).split(size):
            key: dict[str, Any] = {"samples": numbers.tolist(), "step": step}
            chosen = [images[j % len(images)] for j in numbers.tolist()]
            x0, condition = model.encode_from(self.data, chosen)
            noise = normal(model.sample_shape, self.seed, "coefficients-noise", **key)
            position = (numbers + uniform(self.seed, "coefficients-t", **key)) / self.J
            noise, t = noise.to(model.device), model.timesteps(span, position).to(model.device)
            yield Cell(model.add_noise(x0, noise, t), t, model.target(x0, noise, t), condition)

    def count_passes(self, P: int) -> int:
        """Return how many samples go through a model for P weights and the bend at two of them."""
        return len(self.ranges) * self.groups * self.J * (P + 3)

    def count_merges(self, P: int) -> int:
        """Return about how often `measure_responses` puts weights into the model."""
        parts = math.ceil(self._sample_bytes(P) * self.groups * self.J / MEMORY)
        return len(self.ranges) * parts * (P + 1)

    def count_bytes(self, P: int) -> int:
        """Return the bytes of outputs that are held at once, and of the products that are kept."""
        sample, samples = self._sample_bytes(P), self.groups * self.J
        outputs = min(max(MEMORY, sample * min(BATCH, self.J)), sample * samples)
        return outputs + 8 * len(self.ranges) * self.groups * (P + 1) ** 2

    def parts(self, span: TimestepRange, r: int, P: int) -> Iterator[list[tuple[int, Cell]]]:
        """Yield the samples of range r with their groups, as many at once as MEMORY allows."""
        part: list[tuple[int, Cell]] = []
        held = 0
        for m in range(self.groups):
            for cell in self.cells(span, r, m, BATCH):
                size = len(cell.t) * self._sample_bytes(P)
                if part and held + size > MEMORY:
                    yield part
                    part, held = [], 0
                part.append((m, cell))
                held += size
        yield part

    def _sample_bytes(self, P: int) -> int:
        """Return the bytes that are held of one sample: x_t, y, and the outputs."""
        return 4 * (P + 5) * math.prod(self.model.sample_shape)


@torch.inference_mode()
def measure_responses(
    draws: Draws, session: MergeSession, *, step: float = 1.0, progress: Progress = silent
) -> Responses:
    """Measure how the losses answer to the experts of a session, per block if it has groups.

    Args:
        step: s, the length of the chord along each task vector; 1 for the expert itself.
        progress: counts samples sent through a model.
    """
    model = draws.model.with_denoiser(copy.deepcopy(draws.model.denoiser).eval())
    M, P, size = draws.groups, math.prod(session.shape), math.prod(model.sample_shape)
    gram, done, total = np.zeros((len(draws.ranges), M, P + 1, P + 1)), 0, draws.count_passes(P)
    rows = torch.eye(P + 1)[:, 1:] * step  # the base, then one expert at a time
    labels = ["the base"]
    for group in session.groups or ("",):
        labels += [f"expert {k}{group and f' in {group}'}" for k in range(session.shape[-1])]
    for r, span in enumerate(draws.ranges):
        for part in draws.parts(span, r, P):
            lengths = [len(cell.t) for _, cell in part]
            moved = np.empty((P + 1, sum(lengths), size), dtype=np.float32)
            for p, row in enumerate(rows):
                session.apply(row.view(session.shape), model.denoiser)
                outputs = torch.cat(
                    [model.predict(cell.x_t, cell.t, cell.condition).float() for _, cell in part]
                )
                _check_finite(outputs, labels[p], span)
                moved[p] = outputs.flatten(1).cpu().numpy()
                done += len(outputs)
                progress(done, total, f"range {span}")
            moved[1:] -= moved[0]
            moved[1:] /= step
            moved[0] -= torch.cat([cell.y for _, cell in part]).float().flatten(1).cpu().numpy()
            for (m, _), stop, length in zip(part, np.cumsum(lengths), lengths, strict=True):
                gram[r, m] += _products(moved[:, stop - length : stop].reshape(P + 1, -1))
    gram /= draws.J * size
    loss, slope, products = gram[:, :, 0, 0].copy(), 2 * gram[:, :, 0, 1:], gram[:, :, 1:, 1:]
    return Responses(draws.ranges, session.groups, session.shape[-1], loss, slope, products)


@torch.inference_mode()
def measure_bend(draws: Draws, session: MergeSession, responses: Responses, w: Array) -> Array:
    """Return what the loss at theta(w) changes by beyond dL_R(w), for w [P], [R M]."""
    model = draws.model.with_denoiser(copy.deepcopy(draws.model.denoiser).eval())
    session.apply(torch.tensor(w).view(session.shape), model.denoiser)
    loss = np.zeros_like(responses.loss)
    for r, span in enumerate(draws.ranges):
        for m in range(draws.groups):
            cells = draws.cells(span, r, m, BATCH)
            each = [squared_error(model.predict(c.x_t, c.t, c.condition), c.y) for c in cells]
            _check_finite(torch.cat(each), "the merge", span)
            loss[r, m] = float(torch.cat(each).double().mean())
    return np.asarray(loss - responses.loss - responses.change(w))


def _products(rows: NDArray[np.float32]) -> Array:
    """Return the inner products [P+1 P+1] of float32 rows [P+1 n], summed in float64."""
    gram = np.zeros((len(rows), len(rows)))
    for start in range(0, rows.shape[1], COLUMNS):
        block = rows[:, start : start + COLUMNS].astype(np.float64)
        gram += block @ block.T
    return gram


def _check_finite(outputs: Tensor, name: str, span: TimestepRange) -> None:
    if not bool(outputs.isfinite().all()):
        what = f"an output of {name} in range {span} is not finite"
        raise NumericalError(what, fix="check its weights and the data")
