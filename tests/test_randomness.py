"""Keyed streams: a value depends on its key and on nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from demerge.randomness import generator, key_of, normal, permutation, uniform

ORDERS = st.lists(st.integers(0, 50), min_size=1, max_size=8, unique=True)


@given(ORDERS)
def test_a_sample_does_not_depend_on_its_batch(samples):
    batch = normal((2, 3), 7, "noise", samples=samples, step=3)
    alone = torch.cat([normal((2, 3), 7, "noise", samples=[i], step=3) for i in samples])
    assert torch.equal(batch, alone)
    assert torch.equal(
        uniform(7, "t", samples=samples, step=3),
        torch.cat([uniform(7, "t", samples=[i], step=3) for i in samples]),
    )


def test_every_part_of_the_key_matters():
    keys = [key_of(0, "noise", 0, 0), key_of(1, "noise", 0, 0), key_of(0, "flip", 0, 0)]
    keys += [
        key_of(0, "noise", 1, 0),
        key_of(0, "noise", 0, 1),
        key_of(0, "noise", "0", "1", ""),
        key_of(0, "noise", 1),
    ]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**128 for key in keys)


def test_neighbouring_parts_do_not_run_together():
    assert key_of(0, "a", 11, 1) != key_of(0, "a", 1, 11)
    assert key_of(1, "1") != key_of(11, "")


def test_nothing_global_is_read_or_written():
    torch.manual_seed(0)
    np.random.seed(0)
    first = normal((4,), 0, "noise", samples=[0])
    state = torch.get_rng_state()
    torch.manual_seed(99)
    assert torch.equal(normal((4,), 0, "noise", samples=[0]), first)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_golden_values_hold_across_versions():
    assert key_of(0, "noise", 0, 0) == 0x3E38BBCD543FD7EB543259BC0FF10F68
    assert permutation(8, 0, "order", 0) == [0, 7, 2, 3, 5, 4, 6, 1]
    assert normal((2,), 0, "noise", samples=[0])[0].tolist() == pytest.approx(
        [1.0043243, 1.1007638]
    )


def test_moments_and_shapes():
    draws = normal((4, 5), 0, "noise", samples=range(500))
    assert (draws.shape, draws.dtype) == ((500, 4, 5), torch.float32)
    assert abs(float(draws.mean())) < 0.03
    assert abs(float(draws.std()) - 1) < 0.03
    values = uniform(0, "t", samples=range(2000))
    assert values.dtype == torch.float64
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(float(values.mean()) - 0.5) < 0.03
    assert normal((3,), 0, "noise", samples=[]).shape == (0, 3)


@given(st.integers(0, 200), st.integers(0, 5))
def test_permutations_are_permutations(n, seed):
    assert sorted(permutation(n, seed, "order", 1)) == list(range(n))
    assert permutation(n, seed, "order", 1) == permutation(n, seed, "order", 1)


def test_streams_are_uncorrelated():
    a, b = (generator(0, "noise", i).standard_normal(5000) for i in (0, 1))
    assert abs(float(np.corrcoef(a, b)[0, 1])) < 0.05


@given(st.integers(0, 2**63 - 1), ORDERS)
def test_all_samples_at_once_equal_one_generator_each(seed, samples):
    slow = [generator(seed, "t", 5, i) for i in samples]
    assert uniform(seed, "t", samples=samples, step=5).tolist() == [g.random() for g in slow]
    slow = [generator(seed, "t", 5, i).standard_normal(7, dtype=np.float32) for i in samples]
    assert np.array_equal(normal((7,), seed, "t", samples=samples, step=5), np.stack(slow))
