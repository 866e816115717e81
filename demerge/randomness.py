"""Keyed random streams: value = f(seed, purpose, step, sample).

No generator is ever carried from one draw to the next, so there is no state to store in a
checkpoint, and a value does not depend on batch size, order, process or device. The key is hashed
(BLAKE2b) into a 128-bit key of numpy's counter-based Philox generator; each (seed, purpose, key)
has a stream of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


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

    Row b depends on (seed, purpose, step, samples[b]) alone.
    """
    rows = [
        generator(seed, purpose, step, i).standard_normal(tuple(shape), dtype=np.float32)
        for i in samples
    ]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, *shape)


def uniform(seed: int, purpose: str, *, samples: Sequence[int], step: int = 0) -> Tensor:
    """Draw uniform values in [0, 1), [B] float64; value b depends on samples[b], as in `normal`."""
    return torch.tensor(
        [generator(seed, purpose, step, i).random() for i in samples], dtype=torch.float64
    )


def permutation(n: int, seed: int, purpose: str, *key: int | str) -> list[int]:
    """Return a permutation of range(n) that depends on (seed, purpose, key)."""
    return [int(i) for i in generator(seed, purpose, *key).permutation(n)]
