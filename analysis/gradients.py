"""Gradients of the loss by bin of timesteps and group of samples, and their inner products.

    s_i^m = grad_theta (1/B) sum_b |y - f(x_t, t)|^2,    t uniform in bin i, samples b of group m

at the base model, in eval mode (no dropout), in float32. Gradients of all cells (i, m) must meet in pairs, so all are kept
at once, [N M D]; where that passes `memory`, coordinates are kept in parts and the cells are run through once per part:
inner products add up over parts, and every draw is a function of its key, so each pass sees the same samples.

Draws (x0, eps, position of t in its bin) are shared between the bins of a group, never between groups: differences between
bins are then not those of their samples, and the statistic that pairs different groups stays unbiased (see similarity.py).
Images are drawn with replacement: the mean gradient estimated is the one over the data set, for which a base was trained.
Positions are stratified: of B draws, draw b lies in [b/B, (b+1)/B) of its bin. With `antithetic`, B/2 draws are each taken
with eps and -eps, which takes away the noise that is odd in eps.

The metric `adam` scales coordinate p by v_p^(-1/4), v the mean of squared gradients over all cells, so that <a, b> becomes
sum_p a_p b_p / sqrt(v_p), as an Adam step weighs it; in `euclid` a few tensors carry nearly all of it, noise included.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from demerge.conflict import MIN_GROUPS, Array, ConflictMap, Origin
from demerge.data import ImageData
from demerge.diffusion import Diffusion
from demerge.errors import NumericalError, ResourceError, UsageError
from demerge.randomness import normal, uniform
from demerge.timesteps import Partition, TimestepRange

Progress = Callable[[int, int, str], None]
Draw = tuple[Tensor, Tensor | None, Tensor, Tensor]

DRAWS = ("shared", "independent")
METRICS = ("euclid", "adam")
MEMORY = 2 << 30
MAX_PARTS = 16
COLUMNS = 1 << 15
MAX_LOG_SNR = 20.0  # schedules that end in pure noise have log SNR = -inf


@dataclass(frozen=True, slots=True)
class Cost:
    """What a measurement will take: backward passes of B samples each, and bytes for the gradients it keeps."""

    passes: int
    parts: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.passes} backward passes, {self.bytes / 1e6:,.0f} MB of gradients"


def cost(model: Diffusion, *, bins: int, groups: int, memory: int = MEMORY) -> Cost:
    """Return what `measure` will take.

    Raises:
        ResourceError: where the gradients would have to be kept in more than 16 parts.
    """
    D, parts = model.parameters, _parts(model.parameters, memory // (4 * bins * groups))
    if len(parts) > MAX_PARTS:
        raise ResourceError(
            f"{bins * groups} gradients of {D:,} parameters fit {memory / 1e9:.1f} GB in {len(parts)} parts only",
            fix="allow more memory, or take fewer bins or groups",
        )
    return Cost(bins * groups * len(parts), len(parts), 4 * bins * groups * (parts[0].stop - parts[0].start))


def measure(
    model: Diffusion,
    data: ImageData,
    *,
    bins: int = 20,
    groups: int = 8,
    batch_size: int = 16,
    seed: int = 0,
    draws: str = "shared",
    antithetic: bool = False,
    metric: str = "euclid",
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> ConflictMap:
    """Measure how the gradients of `bins` equal bins of timesteps conflict, on `groups` groups of `batch_size` samples.

    Args:
        draws: `shared` between the bins of a group, or `independent` as a cross-check.
        antithetic: whether each draw is taken with its noise and with the opposite; the batch size must be even.
        metric: of inner products, `euclid` or `adam`.
        memory: bytes that the kept gradients may take.
        progress: called as progress(done, total, what) after each backward pass.

    Raises:
        UsageError: where an argument is out of its range or the data does not fit the model.
        ResourceError: where the gradients do not fit the memory.
        NumericalError: where a gradient is not finite.
    """
    _check_arguments(data, groups, batch_size, draws, antithetic, metric, memory)
    partition = Partition.uniform(model.T, bins)
    total = cost(model, bins=bins, groups=groups, memory=memory)
    denoiser = copy.deepcopy(model.denoiser).float().eval().requires_grad_(True)
    student = model.with_denoiser(denoiser)
    gram: Array = np.zeros((bins * groups, bins * groups))
    done = 0
    for part in _parts(model.parameters, memory // (4 * bins * groups)):
        rows = torch.empty(bins * groups, part.stop - part.start, device=model.device)
        for cell, loss in _losses(student, data, partition, groups, batch_size, seed, draws, antithetic):
            rows[cell] = _gradient(loss, denoiser)[part]
            if not bool(rows[cell].isfinite().all()):
                raise NumericalError(
                    f"the gradient in bin {partition[cell // groups]} is not finite", fix="check the model's weights"
                )
            done += 1
            if progress is not None:
                progress(done, total.passes, f"bin {partition[cell // groups]}")
        gram += products(rows if metric == "euclid" else rows.mul_(adam_scale(rows)))
    origin = Origin(model.sha256, data.fingerprint, model.parameters, "exact", draws, antithetic, metric, batch_size, seed)
    return ConflictMap(
        partition,
        gram.reshape(bins, groups, bins, groups),
        model.snr().log().clamp(-MAX_LOG_SNR, MAX_LOG_SNR).numpy(),
        origin,
    )


def products(rows: Tensor) -> Array:
    """Return the inner products [R R] of the rows of [R D], blocks of float32 products summed in float64."""
    gram: Array = np.zeros((len(rows), len(rows)))
    for block in rows.split(COLUMNS, dim=1):
        gram += (block @ block.T).cpu().double().numpy()
    return (gram + gram.T) / 2


def adam_scale(rows: Tensor) -> Tensor:
    """Return v^(-1/4) [D], v the mean square of each coordinate of rows [R D]; 1 where v = 0 and there is nothing to scale."""
    root = torch.linalg.vector_norm(rows, dim=0) / len(rows) ** 0.5
    return torch.where(root > 0, root, 1).rsqrt()


def _check_arguments(
    data: ImageData, groups: int, batch_size: int, draws: str, antithetic: bool, metric: str, memory: int
) -> None:
    if groups < MIN_GROUPS:
        raise UsageError(f"{groups} groups are too few for errors", fix=f"use at least {MIN_GROUPS}")
    if batch_size < 1 or memory < 1 or len(data) < 1:
        raise UsageError(
            f"batch size {batch_size}, {memory} bytes and {len(data)} images must all be at least 1", fix="give more"
        )
    for name, value, known in (("draws", draws, DRAWS), ("metric", metric, METRICS)):
        if value not in known:
            raise UsageError(f"{name} '{value}' is unknown", fix=f"use one of {', '.join(known)}")
    if antithetic and batch_size % 2:
        raise UsageError(f"batch size {batch_size} makes no antithetic pairs", fix="give an even one")


def _parts(D: int, limit: int) -> list[slice]:
    """Split the coordinates [0, D) into parts of at most `limit`, and at least one."""
    width = min(D, max(1, limit))
    return [slice(start, min(start + width, D)) for start in range(0, D, width)]


def _losses(
    model: Diffusion, data: ImageData, bins: Partition, groups: int, B: int, seed: int, draws: str, antithetic: bool
) -> Iterator[tuple[int, Tensor]]:
    """Yield (cell, mean loss) for all cells i * groups + m, group after group."""
    for m in range(groups):
        shared = _draw(model, data, m, B, seed, antithetic) if draws == "shared" else None
        for i, span in enumerate(bins):
            x0, condition, noise, position = shared or _draw(model, data, groups * (1 + i) + m, B, seed, antithetic)
            t = _timesteps(span, position).to(model.device)
            yield i * groups + m, model.loss(x0, noise, t, condition).mean()


def _draw(model: Diffusion, data: ImageData, key: int, B: int, seed: int, antithetic: bool) -> Draw:
    """Return x0 [B *], the condition, noise [B *] and positions in [0, 1) [B] of one key."""
    n = B // 2 if antithetic else B
    samples = range(n)
    chosen = (uniform(seed, "analysis-image", samples=samples, step=key) * len(data)).long().tolist()
    captions = [data.captions[i] for i in chosen] if model.requires_text and data.captions is not None else None
    x0, condition = model.encode(data.floats(chosen), captions)
    noise = normal(model.sample_shape, seed, "analysis-noise", samples=samples, step=key).to(model.device)
    position = (torch.arange(n) + uniform(seed, "analysis-t", samples=samples, step=key)) / n
    if not antithetic:
        return x0, condition, noise, position
    twice = None if condition is None else torch.cat([condition, condition])
    return torch.cat([x0, x0]), twice, torch.cat([noise, -noise]), torch.cat([position, position])


def _timesteps(span: TimestepRange, position: Tensor) -> Tensor:
    """Return the timesteps [B] at positions in [0, 1) of a range; each t of the range covers an equal share."""
    return span.start + (position * len(span)).long().clamp(max=len(span) - 1)


def _gradient(loss: Tensor, denoiser: nn.Module) -> Tensor:
    """Return the gradient [D] in the order of the parameters, 0 for those that the loss does not reach.

    All of it is taken even where a part is kept: torch 2.13 crashes on the CPU in the backward of some group norms when one
    of their parameters alone is asked for.
    """
    parameters = list(denoiser.parameters())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.reshape(-1) for gradient in gradients])
