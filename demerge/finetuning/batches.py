"""The batches of a training run, made ahead by a thread.

Image, flip, timestep, noise and dropped caption of a sample are functions of (seed, step, sample)
alone. Sample numbers count over the whole step: over its batches, and over the processes that share
it. So neither the number of processes nor the size of a batch changes what a step sees.

While the device works on one step, a thread draws the next one, and puts it into pinned memory if
the device is a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace

from torch import Tensor

from demerge.data import ImageData
from demerge.data.values import as_floats
from demerge.diffusion.model import Diffusion
from demerge.finetuning.objective import draw_timesteps
from demerge.finetuning.options import FinetuneOptions
from demerge.parallel import ALONE, World
from demerge.randomness import normal, permutation, uniform
from demerge.timesteps import TimestepRange


@dataclass(frozen=True, slots=True)
class Batch:
    """What a step needs of B samples: x_0 [B *], noise [B *], t [B], and the condition or None."""

    x0: Tensor
    noise: Tensor
    t: Tensor
    condition: Tensor | None = None

    def __len__(self) -> int:
        return len(self.t)

    def tensors(self) -> list[Tensor]:
        """Return the tensors that are not None."""
        values = (getattr(self, field.name) for field in fields(self))
        return [value for value in values if value is not None]

    def copy(self) -> Batch:
        """Return the batch in memory of its own."""
        condition = None if self.condition is None else self.condition.clone()
        return Batch(self.x0.clone(), self.noise.clone(), self.t.clone(), condition)

    def chunk(self, parts: int) -> Iterator[Batch]:
        """Yield the batch in `parts` pieces of about one size, fewer if it has fewer samples."""
        size = -(-len(self) // parts)
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            condition = None if self.condition is None else self.condition[rows]
            yield Batch(self.x0[rows], self.noise[rows], self.t[rows], condition)


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A batch before it is encoded: images uint8 [B C H W] in the host's memory."""

    images: Tensor
    noise: Tensor
    t: Tensor
    captions: list[str] | None
    labels: list[int] | None
    u: Tensor | None  # decides whose label is dropped

    def pinned(self) -> _Drawn:
        pin = {name: getattr(self, name).pin_memory() for name in ("images", "noise", "t")}
        return replace(self, **pin)


class Batches:
    """The batches of each step of one process."""

    def __init__(
        self,
        base: Diffusion,
        data: ImageData,
        span: TimestepRange,
        options: FinetuneOptions,
        world: World = ALONE,
    ) -> None:
        self.base, self.data, self.span, self.options = base, data, span, options
        self.world = world
        self._orders: dict[int, list[int]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="demerge-batches")
        self._ahead: tuple[int, Future[list[_Drawn]]] | None = None

    def step(self, step: int) -> list[Batch]:
        """Return the batches of a step on the model's device, one for each accumulation.

        The next step is begun.
        """
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = (step, self._thread.submit(self._draw_step, step))
        drawn = self._ahead[1].result()
        following = step + 1
        if following < self.options.max_train_steps:
            self._ahead = (following, self._thread.submit(self._draw_step, following))
        return [self._encode(batch) for batch in drawn]

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _draw_step(self, step: int) -> list[_Drawn]:
        o, world = self.options, self.world
        starts = [
            (micro * world.size + world.rank) * o.train_batch_size
            for micro in range(o.gradient_accumulation_steps)
        ]
        return [self._draw(step, range(a, a + o.train_batch_size)) for a in starts]

    def _draw(self, step: int, samples: Sequence[int]) -> _Drawn:
        o, n = self.options, len(self.data)
        samples = list(samples)
        sources = [s // 2 for s in samples] if o.antithetic else samples

        def draw(purpose: str) -> Tensor:
            return uniform(o.seed, purpose, samples=sources, step=step)

        first = step * o.samples_per_step(self.world.size) // (2 if o.antithetic else 1)
        indices = [self._order((first + s) // n)[(first + s) % n] for s in sources]
        images = self.data.images(indices)
        if o.random_flip:
            marked = draw("flip") < 0.5
            images[marked] = images[marked].flip(-1)
        captions, labels = self.data.annotations(indices)
        if captions is not None and self.base.requires_text:
            keep = (draw("caption") >= o.caption_dropout).tolist()
            captions = [text if kept else "" for text, kept in zip(captions, keep, strict=True)]
        noise = normal(self.base.sample_shape, o.seed, "noise", samples=sources, step=step)
        if o.antithetic:
            noise[[s % 2 == 1 for s in samples]] *= -1
        t = draw_timesteps(self.span, self.base.T, o, step, sources)
        u = draw("label") if self.base.classes is not None else None
        drawn = _Drawn(images, noise, t, captions, labels, u)
        return drawn.pinned() if self.base.device.type == "cuda" else drawn

    def _encode(self, drawn: _Drawn) -> Batch:
        device, classes = self.base.device, self.base.classes
        images, noise, t = (
            tensor.to(device, non_blocking=True) for tensor in (drawn.images, drawn.noise, drawn.t)
        )
        x0, condition = self.base.encode(as_floats(images), drawn.captions, drawn.labels)
        if condition is not None and classes is not None and drawn.u is not None:
            condition = classes.drop(condition, drawn.u)
        return Batch(x0, noise, t, condition)

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            self._orders.pop(epoch - 2, None)
            self._orders[epoch] = permutation(len(self.data), self.options.seed, "order", epoch)
        return self._orders[epoch]
