"""The batches of a training run, made ahead.

Image, flip, timestep, noise and dropped caption of a sample are functions of (seed, step, sample)
alone. Sample numbers count over the whole step: over its batches, and over the processes that share
it. So neither the number of processes nor the size of a batch changes what a step sees.

While the device works on one step, the next one is drawn: by a thread on the CPU, where a step is
long, and by a process for a GPU, since a thread would keep the interpreter from launching kernels.
The values are the same.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from demerge.data import ImageData
from demerge.data.values import as_floats
from demerge.diffusion.conditioning import Condition, rows
from demerge.diffusion.encoded import Encoder, images_of
from demerge.diffusion.model import Diffusion
from demerge.finetuning.buckets import batches_of_epoch, make_buckets
from demerge.finetuning.objective import draw_timesteps
from demerge.finetuning.options import FinetuneOptions
from demerge.parallel import ALONE, World
from demerge.randomness import normal, permutation, uniform
from demerge.timesteps import TimestepRange


@dataclass(frozen=True, slots=True)
class Batch:
    """What a step needs of B samples: x_0 [B *], noise [B *], t [B], and the condition."""

    x0: Tensor
    noise: Tensor
    t: Tensor
    condition: Condition = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.t)

    def tensors(self) -> list[Tensor]:
        """Return all tensors, each with B rows."""
        return [self.x0, self.noise, self.t, *self.condition.values()]

    def copy(self) -> Batch:
        """Return the batch in memory of its own."""
        condition = {name: tensor.clone() for name, tensor in self.condition.items()}
        return Batch(self.x0.clone(), self.noise.clone(), self.t.clone(), condition)

    def chunk(self, parts: int) -> Iterator[Batch]:
        """Yield the batch in `parts` pieces of about one size, fewer if it has fewer samples."""
        size = -(-len(self) // parts)
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            condition = rows(self.condition, part)
            yield Batch(self.x0[part], self.noise[part], self.t[part], condition)


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A batch before it is encoded, in the host's memory.

    Attributes:
        images: uint8 [B C H W]; or x_0 [B *] in float32, if it is encoded.
        text: what the text encoders made of the captions, if they are encoded.
    """

    images: Tensor
    noise: Tensor
    t: Tensor
    captions: list[str] | None
    labels: list[int] | None
    u: Tensor | None  # decides whose label is dropped
    text: Condition | None = None
    bucket: int = 0

    def pin_memory(self) -> _Drawn:
        """Return the batch in pinned memory; torch's loader calls it."""
        pin = {name: getattr(self, name).pin_memory() for name in ("images", "noise", "t")}
        text = self.text and {name: tensor.pin_memory() for name, tensor in self.text.items()}
        return replace(self, text=text, **pin)


Draw = Callable[[int], list[_Drawn]]


class _Steps(IterableDataset[list[_Drawn]]):
    """What each step draws, in order."""

    def __init__(self, draw: Draw, steps: range) -> None:
        self.draw, self.steps = draw, steps

    def __iter__(self) -> Iterator[list[_Drawn]]:
        return map(self.draw, self.steps)


def _by_thread(draw: Draw, steps: range) -> Generator[list[_Drawn]]:
    """Yield what each step draws; a thread is one step ahead."""
    with ThreadPoolExecutor(1, thread_name_prefix="demerge-batches") as thread:
        ahead = None
        for step in steps:
            drawn = (ahead or thread.submit(draw, step)).result()
            following = step + 1
            ahead = thread.submit(draw, following) if following in steps else None
            yield drawn


def _by_process(draw: Draw, steps: range) -> Generator[list[_Drawn]]:
    """Yield what each step draws; a forked process is two steps ahead."""
    yield from DataLoader(
        _Steps(draw, steps),
        batch_size=None,
        num_workers=1,
        prefetch_factor=2,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context="fork",
        worker_init_fn=_leave_signals,
    )


def _leave_signals(worker: int) -> None:
    """Let the parent alone answer signals; it ends this process."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Batches:
    """The batches of each step of one process.

    Args:
        encoders: give x_0 and text that were encoded before, one for each bucket; none encode them
            at each step.
        by_process: whether a process draws ahead; by default for a GPU on Linux.
    """

    def __init__(
        self,
        base: Diffusion,
        data: ImageData,
        span: TimestepRange,
        options: FinetuneOptions,
        world: World = ALONE,
        by_process: bool | None = None,
        encoders: Sequence[Encoder] = (),
    ) -> None:
        self.buckets, self.encoders = make_buckets(base, data, options), encoders
        self.base, self.data, self.span, self.options = base, data, span, options
        self.world = world
        self._orders: dict[int, list[int]] = {}
        if by_process is None:
            by_process = base.device.type == "cuda" and sys.platform == "linux"
        self._make = _by_process if by_process else _by_thread
        self._ahead: Generator[list[_Drawn]] | None = None
        self._next = -1

    def step(self, step: int) -> list[Batch]:
        """Return the batches of a step on the model's device, one for each accumulation.

        The next step is begun.
        """
        end = self.options.max_train_steps
        if self._ahead is None or step != self._next or step >= end:
            self.close()
            self._ahead = self._make(self._draw_step, range(step, max(step + 1, end)))
        self._next = step + 1
        return [self._encode(batch) for batch in next(self._ahead)]

    def close(self) -> None:
        """End the thread or the process."""
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = None

    def _draw_step(self, step: int) -> list[_Drawn]:
        o, world = self.options, self.world
        starts = [
            (micro * world.size + world.rank) * o.train_batch_size
            for micro in range(o.gradient_accumulation_steps)
        ]
        return [self._draw(step, range(a, a + o.train_batch_size)) for a in starts]

    def _draw(self, step: int, samples: Sequence[int]) -> _Drawn:
        o = self.options
        samples = list(samples)
        sources = [s // 2 for s in samples] if o.antithetic else samples

        def draw(purpose: str) -> Tensor:
            return uniform(o.seed, purpose, samples=sources, step=step)

        number, indices = self._indices(step, samples, sources)
        bucket = self.buckets[number]
        base, data = bucket.base, bucket.data
        mirrored = draw("flip") < 0.5 if o.random_flip else torch.zeros(len(samples)).bool()
        captions, labels = data.annotations(indices)
        if captions is not None and base.requires_text:
            keep = (draw("caption") >= o.caption_dropout).tolist()
            captions = [text if kept else "" for text, kept in zip(captions, keep, strict=True)]
        text = None
        if not self.encoders:
            images = images_of(data, indices, mirrored)
        else:
            encoder = self.encoders[number]
            images = encoder.x0(indices, mirrored.tolist())
            text = encoder.text(captions) if captions is not None else None
        noise = normal(base.sample_shape, o.seed, "noise", samples=sources, step=step)
        if o.antithetic:
            noise[[s % 2 == 1 for s in samples]] *= -1
        shift = (o.shift or base.shift) if base.is_flow else None
        t = draw_timesteps(self.span, base.T, o, step, sources, shift)
        u = draw("label") if base.classes is not None else None
        return _Drawn(images, noise, t, captions, labels, u, text, number)

    def _indices(
        self, step: int, samples: Sequence[int], sources: Sequence[int]
    ) -> tuple[int, list[int]]:
        """Return the number of the bucket, and the images of the samples of a batch."""
        o, n = self.options, len(self.data)
        pairs = 2 if o.antithetic else 1
        if o.aspect_ratio_buckets is None:
            first = step * o.samples_per_step(self.world.size) // pairs
            return 0, [self._order((first + s) // n)[(first + s) % n] for s in sources]
        counts = tuple(len(bucket.data) for bucket in self.buckets)
        size = o.train_batch_size // pairs
        per_epoch = sum(-(-count // size) for count in counts)
        batch = step * o.gradient_accumulation_steps * self.world.size
        epoch, place = divmod(batch + samples[0] // o.train_batch_size, per_epoch)
        number, images = batches_of_epoch(counts, size, o.seed, epoch)[place]
        return number, [images[s - sources[0]] for s in sources]

    def _encode(self, drawn: _Drawn) -> Batch:
        base = self.buckets[drawn.bucket].base
        device, classes = base.device, base.classes
        images, noise, t = (
            tensor.to(device, non_blocking=True) for tensor in (drawn.images, drawn.noise, drawn.t)
        )
        if not self.encoders:
            x0, condition = base.encode(as_floats(images), drawn.captions, drawn.labels)
        elif drawn.text is None:
            x0, condition = images, base.condition(len(t), drawn.captions, drawn.labels)
        else:
            text = {name: v.to(device, non_blocking=True) for name, v in drawn.text.items()}
            x0, condition = (
                images,
                text | base.family.extra(torch.empty(len(t), device=device)),
            )
        if classes is not None and drawn.u is not None:
            condition["class_labels"] = classes.drop(condition["class_labels"], drawn.u)
        # in one order in memory, so that no kernel sees whether it was encoded before
        return Batch(x0.contiguous(), noise, t, condition)

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            self._orders.pop(epoch - 2, None)
            self._orders[epoch] = permutation(len(self.data), self.options.seed, "order", epoch)
        return self._orders[epoch]
