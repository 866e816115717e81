"""Keyed random streams: value = f(seed, purpose, step, sample).

No generator is ever carried from one draw to the next, so there is no state to store in a
checkpoint, and a value does not depend on batch size, order, process or device. The key is hashed
(BLAKE2b) into a 128-bit key of numpy's counter-based Philox generator; each (seed, purpose, key)
has a stream of its own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ZERO = np.zeros(4, dtype=np.uint64)
_M0, _M1 = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)  # Philox's multipliers
_W0, _W1 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)  # and its key schedule


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
    philox = np.random.Philox(key=0)
    draw = np.random.Generator(philox).standard_normal
    state = philox.state
    state["state"]["counter"] = _ZERO
    flat = rows.reshape(len(rows), math.prod(shape))
    for row, key in zip(flat, _keys(seed, purpose, step, samples), strict=True):
        state["state"]["key"] = key
        philox.state = state  # costs a third of a new generator
        draw(out=row, dtype=np.float32)
    return torch.from_numpy(rows)


def uniform(seed: int, purpose: str, *, samples: Sequence[int], step: int = 0) -> Tensor:
    """Draw uniform values in [0, 1), [B] float64; value b depends on samples[b], as in `normal`."""
    first = _philox(_keys(seed, purpose, step, samples))
    return torch.from_numpy((first >> np.uint64(11)) * 2.0**-53)


def permutation(n: int, seed: int, purpose: str, *key: int | str) -> list[int]:
    """Return a permutation of range(n) that depends on (seed, purpose, key)."""
    return [int(i) for i in generator(seed, purpose, *key).permutation(n)]


def _keys(seed: int, purpose: str, step: int, samples: Sequence[int]) -> NDArray[np.uint64]:
    """Return the keys of a stream per sample, [B 2], the low half first."""
    keys = [key_of(seed, purpose, step, i).to_bytes(16, "little") for i in samples]
    return np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 2)


def _philox(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the first word of Philox4x64-10 for each key [B 2], as numpy's generator draws it.

    Ten rounds on the counter (1, 0, 0, 0), all keys at once (Salmon et al., SC 2011).
    """
    k0, k1 = keys[:, 0].copy(), keys[:, 1].copy()
    c0, c1, c2, c3 = np.ones_like(k0), np.zeros_like(k0), np.zeros_like(k0), np.zeros_like(k0)
    for _ in range(10):
        high0, low0 = _multiply(_M0, c0)
        high1, low1 = _multiply(_M1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _W0, k1 + _W1
    return c0


def _multiply(a: np.uint64, b: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return the high and the low 64 bits of a b."""
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    a0, a1, b0, b1 = a & low, a >> half, b & low, b >> half
    middle = a1 * b0 + (a0 * b0 >> half)
    rest = a0 * b1 + (middle & low)
    return a1 * b1 + (middle >> half) + (rest >> half), a * b
