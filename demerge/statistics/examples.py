"""Examples of a range: the images, timesteps and noise on which its statistics are measured.

    x_t ~ q(x_t | x_0),   t ~ U[start, stop),   y = target(x_0, eps, t)

Example j is a function of (seed, j) alone: every statistic of one seed sees the same examples, in
batches of any size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from demerge.data import ImageData
from demerge.diffusion.conditioning import Condition
from demerge.diffusion.model import Diffusion
from demerge.errors import NumericalError, UsageError
from demerge.randomness import normal, permutation, uniform
from demerge.timesteps import TimestepRange


@dataclass(frozen=True, slots=True)
class Examples:
    """B examples: x_t and y [B *], t [B], and the condition."""

    x_t: Tensor
    y: Tensor
    t: Tensor
    condition: Condition

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all tensors, each with its B rows."""
        return (self.x_t, self.y, self.t, *self.condition.values())


@dataclass(frozen=True, slots=True)
class Collected:
    """A statistic: tensors by the names of the weights, and how they were measured."""

    tensors: Mapping[str, Tensor]  # float32 on the CPU
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sampler:
    """Draws the examples of a range."""

    model: Diffusion
    data: ImageData
    span: TimestepRange
    samples: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.span.stop > self.model.T:
            fix = f"give samples >= 1 and a range within [0, {self.model.T})"
            raise UsageError(f"{self.samples} samples of {self.span} cannot be drawn", fix=fix)

    def images_of(self, numbers: Sequence[int]) -> list[int]:
        """Return which images the examples show."""
        order = permutation(len(self.data), self.seed, "stats image")
        return [order[number % len(order)] for number in numbers]

    def batches(self, size: int) -> Iterator[tuple[range, Examples]]:
        """Yield the numbers of the examples and the examples, `size` at a time."""
        for start in range(0, self.samples, size):
            numbers = range(start, min(start + size, self.samples))
            yield numbers, self._draw(numbers)

    def check_finite(self, numbers: range, values: Tensor, what: str) -> None:
        """Check that all values [B] of a batch are finite."""
        finite = torch.isfinite(values).tolist()
        if all(finite):
            return
        number = numbers[finite.index(False)]
        where = f"sample {number} (image {self.images_of([number])[0]} of {self.data.name})"
        what = f"{what} of {where} of range {self.span} is not finite"
        raise NumericalError(what, fix="check the model and this image")

    @torch.no_grad()
    def _draw(self, numbers: Sequence[int]) -> Examples:
        model = self.model
        x0, condition = model.encode_from(self.data, self.images_of(numbers))
        position = uniform(self.seed, "stats timestep", samples=numbers)
        t = model.timesteps(self.span, position).to(x0.device)
        noise = normal(x0.shape[1:], self.seed, "stats noise", samples=numbers).to(x0.device)
        return Examples(model.add_noise(x0, noise, t), model.target(x0, noise, t), t, condition)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode, and each of its parts back into its own mode afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
