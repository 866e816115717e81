"""The input Gram matrices of a model on a range of timesteps, for `demerge merge --method regmean`.

    G [in in] = E[x x^T],   x [in] the input of a layer W [out in]

over the positions and examples of the range,

for linear layers and for convolutions with kernels of size 1, whose inputs are the pixels. G is
named like the layer's weight. If a layer is called several times in one pass, the mean is over all
its inputs. Sums are float64.

Paper: RegMean (arXiv 2212.09849).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from demerge.data import ImageData
from demerge.diffusion.model import Diffusion
from demerge.diffusion.numerics import accumulator
from demerge.errors import UsageError
from demerge.progress import Progress, silent
from demerge.statistics.examples import Collected, Sampler, eval_mode
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
    """Return G for each layer that is called; the facts count the inputs of each.

    Raises:
        UsageError: if no sample can be drawn from the range, or no layer has a Gram matrix.
        NumericalError: if the model's prediction for an example is not finite.
    """
    sampler = Sampler(model, data, range, samples, seed)
    layers = gram_layers(model.denoiser)
    if not layers:
        what = "the model has no linear layer and no 1 x 1 convolution"
        raise UsageError(what, fix="leave gram out of --statistics")
    sums: dict[str, Sum] = {}
    for name, layer in layers.items():
        sums[name] = Sum(accumulator((input_width(layer),) * 2, model.device))
    with eval_mode(model.denoiser), torch.no_grad(), _hooked(layers, sums):
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


def gram_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that have a Gram matrix, by the name of their weight."""
    named = module.named_modules()
    return {f"{name}.weight".lstrip("."): layer for name, layer in named if _has_gram(layer)}


def input_width(layer: Any) -> int:
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
    with ExitStack() as hooks:
        for name, layer in layers.items():
            add = partial(_add, sums[name])
            hook = layer.register_forward_pre_hook(add, with_kwargs=True)
            hooks.callback(hook.remove)
        yield


def _add(total: Sum, layer: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    total.add(matrix_inputs(layer, inputs[0] if inputs else keywords["input"]))


def matrix_inputs(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the inputs [n in] of a layer: rows of [.. in], or the pixels of [B in *] it reads."""
    if isinstance(layer, CONVOLUTIONS):
        every: Any = (..., *(slice(None, None, step) for step in layer.stride))
        x = x[every].movedim(-1 - len(layer.stride), -1)
    return x.reshape(-1, x.shape[-1])
