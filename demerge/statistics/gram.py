"""The input Gram matrices of a model on a range of timesteps, for `demerge merge --method regmean`.

    G [in in] = E[x x^T],   x [in] the input of a layer W [out in], over the positions and examples of the range

for linear layers and for convolutions with kernels of size 1, whose inputs are the pixels. G is named like the layer's
weight. A layer that is called several times in one pass has all its inputs in the mean. Sums are float64.

Paper: RegMean (arXiv 2212.09849).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from demerge.data import ImageData
from demerge.diffusion.model import Diffusion
from demerge.diffusion.numerics import accumulator
from demerge.errors import UsageError
from demerge.statistics.examples import Collected, Progress, Sampler, evaluated, silent
from demerge.timesteps import TimestepRange

BATCH = 8
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Sum:
    """sum x x^T [in in] float64 and the number of inputs x it holds."""

    total: Tensor
    rows: int = 0

    def add(self, x: Tensor) -> None:
        """Add inputs [n in]."""
        wide = x.to(self.total.device, self.total.dtype)
        self.total.addmm_(wide.T, wide)
        self.rows += len(x)

    @property
    def mean(self) -> Tensor:
        """E[x x^T] [in in], symmetric to the bit, float32 on the CPU."""
        return ((self.total + self.total.T) / (2 * self.rows)).float().cpu()


def range_gram(
    model: Diffusion,
    data: ImageData,
    range: TimestepRange,
    *,
    samples: int = 256,
    seed: int = 0,
    progress: Progress = silent,
) -> Collected:
    """Return G for each layer that is called, float32 on the CPU; the facts hold how many inputs each one saw.

    Raises:
        UsageError: where there is no sample, the range reaches beyond the model's timesteps, or no layer has a Gram matrix.
        NumericalError: where the model's prediction for an example is not finite.
    """
    sampler = Sampler(model, data, range, samples, seed)
    layers = layers_of(model.denoiser)
    if not layers:
        raise UsageError(
            "the model has no linear layer and no 1 x 1 convolution", fix="leave gram out of --what"
        )
    sums = {
        name: Sum(accumulator((width(layer),) * 2, model.device)) for name, layer in layers.items()
    }
    with evaluated(model.denoiser), torch.no_grad(), _hooked(layers, sums):
        for numbers, examples in sampler.batches(BATCH):
            output = model.predict(examples.x_t, examples.t, examples.condition)
            sampler.check_finite(numbers, output.flatten(1).sum(1), "the prediction")
            progress(numbers.stop, samples)
    called = {name: total for name, total in sums.items() if total.rows}
    facts = {
        "inputs": {name: total.rows for name, total in called.items()},
        "never called": sorted(sums.keys() - called),
    }
    return Collected({name: total.mean for name, total in called.items()}, facts)


def layers_of(module: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that have a Gram matrix, by the name of their weight in the state dict."""
    return {
        f"{name}.weight".lstrip("."): layer
        for name, layer in module.named_modules()
        if _has_gram(layer)
    }


def width(layer: Any) -> int:
    """Return the length of an input x of a layer."""
    return int(layer.weight.shape[1])


def _has_gram(layer: nn.Module) -> bool:
    if isinstance(layer, CONVOLUTIONS):
        padded = layer.padding not in ("valid", "same") and any(layer.padding)
        return max(layer.kernel_size) == 1 and layer.groups == 1 and not padded
    return isinstance(layer, nn.Linear)


@contextmanager
def _hooked(layers: Mapping[str, nn.Module], sums: Mapping[str, Sum]) -> Iterator[None]:
    """Add the inputs of each call of a layer to its sum."""
    hooks = [
        layer.register_forward_pre_hook(partial(_add, sums[name]), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _add(
    total: Sum, layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    total.add(rows(layer, arguments[0] if arguments else keywords["input"]))


def rows(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the inputs [n in] of a layer: the rows of [.. in], or the pixels of [B in *] on which the kernel is put."""
    if isinstance(layer, CONVOLUTIONS):
        every: Any = (..., *(slice(None, None, step) for step in layer.stride))
        x = x[every].movedim(-1 - len(layer.stride), -1)
    return x.reshape(-1, x.shape[-1])
