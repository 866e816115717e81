"""Conventions of flow matching's time: round trips, known values, densities against samples."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from demerge.timestep_conventions import (
    Convention,
    Density,
    LogitNormal,
    Mode,
    Uniform,
    from_sigma,
    shift,
    to_sigma,
    unshift,
)
from demerge.timesteps import Partition

CONVENTIONS: tuple[Convention, ...] = ("timestep", "sigma", "index", "unshifted")
units, shifts = st.floats(0, 1), st.floats(0.05, 20)
densities = st.one_of(
    st.just(Uniform()),
    st.builds(LogitNormal, st.floats(-2, 2), st.floats(0.3, 2)),
    st.builds(Mode, st.floats(-0.99, 1.74)),
)
F64 = torch.float64
V = torch.linspace(0.005, 0.995, 199, dtype=F64)


@given(units, shifts)
def test_unshift_is_the_inverse_and_the_shift_keeps_order_and_ends(u: float, s: float) -> None:
    assert unshift(shift(u, s), s) == pytest.approx(u, abs=1e-12)
    assert shift(u, s) == pytest.approx(float(shift(torch.tensor(u, dtype=F64), s)))
    assert (shift(0.0, s), shift(1.0, s)) == pytest.approx((0, 1))
    assert (shift(u, s) >= u) == (s >= 1) or shift(u, s) == pytest.approx(u)


@given(units, shifts, st.integers(1, 2000))
def test_conventions_are_inverses(sigma: float, s: float, T: int) -> None:
    for convention in CONVENTIONS:
        value = from_sigma(sigma, convention, s, T)
        assert to_sigma(value, convention, s, T) == pytest.approx(sigma, abs=1e-9)


@pytest.mark.parametrize(("b", "index"), [(0.9, 0.357), (0.875, 0.417)])
@pytest.mark.parity
def test_wans_boundaries_have_the_published_indexes(b: float, index: float) -> None:
    assert round(from_sigma(b, "index", 5), 3) == index
    assert from_sigma(b, "timestep", 5) == pytest.approx(1000 * b)


@pytest.mark.parametrize("s", [0.5, 1, 3, 5])
@pytest.mark.parity
def test_the_shift_is_diffusers(s: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(shift=s).sigmas.double()
    u = torch.arange(1000, 0, -1, dtype=F64) / 1000
    torch.testing.assert_close(shift(u, s), theirs, atol=1e-6, rtol=0)


@given(st.integers(1, 999), shifts, st.integers(1, 60), densities)
def test_a_boundary_owns_the_same_steps_and_draws_in_every_convention(
    cut: int, s: float, steps: int, density: Density
) -> None:
    """High noise is t >= cut: the first share `index` of a sampler's steps, and u >= `unshifted`."""
    partition, T = Partition.from_cuts(1000, [cut]), 1000
    bounds = {name: from_sigma(cut / T, name, s, T) for name in CONVENTIONS}
    u = torch.cat([1 - torch.arange(steps, dtype=F64) / steps, density.quantile(V)])
    sigma = shift(u, s)
    for convention, bound in bounds.items():
        values = from_sigma(sigma, convention, s, T)
        is_high = values <= bound if convention == "index" else values >= bound
        is_sure = (sigma * T - cut).abs() > 1e-6
        routes = torch.tensor([partition.route(t) for t in (sigma * T).clamp(max=T).tolist()])
        assert torch.equal(is_high[is_sure], routes[is_sure] == 1), convention


@given(densities)
def test_cdf_inverts_quantile_and_both_ascend(density: Density) -> None:
    u = density.quantile(V)
    torch.testing.assert_close(density.cdf(u), V, atol=1e-9, rtol=0)
    assert bool((u.diff() > 0).all()) and u.dtype == density.cdf(u.float()).double().dtype
    assert bool(((u > 0) & (u < 1)).all())


@pytest.mark.parametrize(
    "density", [Uniform(), LogitNormal(), LogitNormal(1, 0.5), Mode(), Mode(-0.8)]
)
def test_cdf_is_the_share_of_draws(density: Density) -> None:
    v = torch.rand(40_000, generator=torch.Generator().manual_seed(0), dtype=F64)
    u = density.quantile(v)
    for at in (0.1, 0.5, 0.9):
        share = float((u < at).double().mean())
        assert share == pytest.approx(float(density.cdf(torch.tensor(at).double())), abs=0.01)


def test_logit_normal_draws_are_those_of_a_normal_through_a_sigmoid() -> None:
    density = LogitNormal(0.3, 1.2)
    u = torch.sigmoid(0.3 + 1.2 * torch.tensor([-1.0, 0.0, 2.0]).double())
    normal = torch.distributions.Normal(0.0, 1.0)
    expected = normal.cdf(torch.tensor([-1.0, 0.0, 2.0]).double())
    torch.testing.assert_close(density.cdf(u), expected)
    assert float(1 - LogitNormal().cdf(torch.tensor(0.9))) == pytest.approx(0.014, abs=5e-4)


@pytest.mark.parity
@pytest.mark.parametrize("scale", [1.29, -0.8])
def test_mode_is_the_density_of_the_paper(scale: float) -> None:
    from diffusers.training_utils import compute_density_for_timestep_sampling

    draws = compute_density_for_timestep_sampling(
        "mode", 1000, mode_scale=scale, generator=torch.Generator().manual_seed(0)
    )
    v = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(draws, Mode(scale).quantile(1 - v), atol=1e-5, rtol=0)
    assert Mode(2 / (math.pi - 2)).quantile(V).diff().min() >= 0
