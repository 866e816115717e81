"""The diagonal Fisher of a model on a range of timesteps, for `demerge merge --method fisher`.

    F [*] = (1/n) sum_j g_j^2,   g_j = grad_theta |y - f(x_t, t, c)|^2 for one example j, t ~ U[start, stop)

The gradients are squared for each example before they are averaged (arXiv 2111.09832); the square of a batch's gradient
would be another, smaller quantity. One example at a time: exact, and its memory is that of one gradient.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor

from demerge.data import ImageData
from demerge.diffusion import Diffusion
from demerge.errors import NumericalError, UsageError
from demerge.randomness import normal, permutation, uniform
from demerge.timesteps import TimestepRange
from demerge.weights import commit_tensors


def range_fisher(
    model: Diffusion, data: ImageData, range: TimestepRange, *, samples: int = 256, seed: int = 0
) -> dict[str, Tensor]:
    """Return F for each tensor of the state dict, float32 on the CPU; 0 for what the loss does not depend on.

    Raises:
        UsageError: where there is no sample, or the range reaches beyond the model's timesteps.
        NumericalError: where a gradient is not finite.
    """
    if samples < 1 or range.stop > model.T:
        raise UsageError(f"{samples} samples of {range} cannot be drawn", fix=f"give samples >= 1 and stay in [0, {model.T})")
    single = model.with_denoiser(copy.deepcopy(model.denoiser).eval().requires_grad_(True))
    parameters = dict(single.denoiser.named_parameters())
    sums = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in parameters.items()}
    order = permutation(len(data), seed, "fisher order")
    for sample in torch.arange(samples).tolist():
        loss = _loss(single, data, order[sample % len(data)], range, seed, sample)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(sums, gradients, strict=True):
            if gradient is not None:
                sums[name] += gradient.cpu().double().square()
    if not all(bool(torch.isfinite(total).all()) for total in sums.values()):
        raise NumericalError(f"the gradients of range {range} are not finite", fix="check the model and the images")
    constant = {n: torch.zeros_like(t, device="cpu") for n, t in single.denoiser.state_dict().items() if n not in sums}
    return {name: (total / samples).float().cpu() for name, total in sums.items()} | constant


def save_fisher(fisher: dict[str, Tensor], path: Path) -> Path:
    """Write F as safetensors; `fisher.safetensors` beside an expert.json is found by `demerge merge`."""
    return commit_tensors(path, fisher)


def _loss(model: Diffusion, data: ImageData, index: int, range: TimestepRange, seed: int, sample: int) -> Tensor:
    captions = [data.captions[index]] if data.captions is not None and model.requires_text else None
    x0, condition = model.encode(data.floats([index]), captions)
    position = uniform(seed, "fisher timestep", samples=[sample])
    t = (range.start + position * len(range)).long().to(x0.device)
    noise = normal(x0.shape[1:], seed, "fisher noise", samples=[sample]).to(x0.device)
    return model.loss(x0, noise, t, condition).sum()
