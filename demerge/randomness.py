"""Keyed random streams: value = f(seed, purpose, step, sample).

No generator is ever carried from one draw to the next, so there is no state to store in a
checkpoint, and a value does not depend on batch size, order, process or device. The key is hashed
(BLAKE2b) into a 128-bit key of numpy's counter-based Philox generator; each (seed, purpose, key)
has a stream of its own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_LOW = 2**64 - 1


def key_of(seed: int, purpose: str, *key: int | str) -> int:
    """Return the 128-bit key of a stream."""
    text = "\x1f".join([str(seed), purpose, *map(str, key)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def generator(seed: int, purpose: str, *key: int | str) -> np.random.Generator:
    """Return the generator of the stream (seed, purpose, key)."""
    return np.random.Generator(np.random.Philox(key=key_of(seed, purpose, *key)))


def normal(
    shape: Sequence[int], seed: int, purpose: str, *, samples: Sequence[int], step: int = 0
) -> Tensor:
    """Draw standard normal values [B *shape], float32 on the CPU.

    Row b depends on (seed, purpose, step, samples[b]) alone: the first values of that generator.
    """
    rows = np.empty((len(samples), *shape), dtype=np.float32)
    flat = rows.reshape(len(rows), math.prod(shape))
    streams = _generators(seed, purpose, step, samples)
    for row, stream in zip(flat, streams, strict=True):
        stream.standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(rows)


def uniform(seed: int, purpose: str, *, samples: Sequence[int], step: int = 0) -> Tensor:
    """Draw uniform values in [0, 1), [B] float64; value b depends on samples[b], as in `normal`."""
    values = [stream.random() for stream in _generators(seed, purpose, step, samples)]
    return torch.tensor(values, dtype=torch.float64)


def permutation(n: int, seed: int, purpose: str, *key: int | str) -> list[int]:
    """Return a permutation of range(n) that depends on (seed, purpose, key)."""
    return [int(i) for i in generator(seed, purpose, *key).permutation(n)]


def _generators(
    seed: int, purpose: str, step: int, samples: Sequence[int]
) -> Iterator[np.random.Generator]:
    """Yield the generator of each sample's stream: one object, since a new one costs more."""
    philox = np.random.Philox(key=0)
    stream = np.random.Generator(philox)
    start: Any = philox.state
    start["buffer"] = start["state"]["counter"] = (0, 0, 0, 0)  # read faster than an array
    for sample in samples:
        key = key_of(seed, purpose, step, sample)
        start["state"]["key"] = (key & _LOW, key >> 64)
        philox.state = start
        yield stream
