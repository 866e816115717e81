"""Closed-form coefficients: a known optimum, prediction against measurement, no false promise."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from demerge.analysis.experts import responses as module
from demerge.analysis.experts.closed_form import Change, Coefficients, predict, solve_coefficients
from demerge.analysis.experts.options import CoefficientsOptions
from demerge.analysis.experts.responses import (
    Draws,
    Responses,
    measure_bend,
    measure_responses,
)
from demerge.analysis.planning.coefficients import (
    CoefficientsResult,
    layer_patterns,
    merge_groups,
)
from demerge.data import ImageData
from demerge.diffusion.model import Diffusion
from demerge.errors import NumericalError, UsageError
from demerge.merging import MergeSession
from demerge.timesteps import Partition

State = dict[str, Tensor]


def result_of(made: Coefficients) -> CoefficientsResult:
    return CoefficientsResult(made, {}, Path("w.json"))


class Parts(nn.Module):
    """f(x, t) = (a + b) x + c t / 30: linear in its weights, in two blocks."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.mid_block = nn.ParameterDict(
            {"a": torch.linspace(0.2, 0.9, side * side).reshape(1, side, side)}
        )
        self.conv_out = nn.ParameterDict(
            {"b": torch.full((1, side, side), 0.1), "c": torch.zeros(1, side, side)}
        )
        self.config = FrozenDict(sample_size=side, in_channels=1)

    def forward(self, x: Tensor, t: Tensor) -> Any:
        out = self.conv_out
        return SimpleNamespace(
            sample=(self.mid_block["a"] + out["b"]) * x + out["c"] * t.view(-1, 1, 1, 1) / 30
        )


@pytest.fixture
def images() -> ImageData:
    """Forty grey images of 3 x 3."""
    from demerge.data.values import Array as Pixels

    values = np.random.default_rng(1).integers(0, 256, (40, 1, 3, 3), dtype=np.uint8)
    return ImageData("toy", "all", (1, 3, 3), "toy", Pixels(values), tuple(range(40)))


@pytest.fixture
def model() -> Diffusion:
    """A Diffusion around `Parts`, T = 30."""
    import diffusers

    return Diffusion(
        Parts(3), diffusers.DDPMScheduler(num_train_timesteps=30, beta_start=0.01, beta_end=0.3)
    )


@pytest.fixture
def draws(model: Diffusion, images: ImageData) -> Draws:
    return Draws(model, images, Partition.from_cuts(30, [10]), samples=200, groups=8, seed=3)


def moved(base: nn.Module, K: int, scale: float = 0.3) -> list[State]:
    """K experts, each with a random task vector."""
    g = torch.Generator().manual_seed(5)
    return [
        {n: p + scale * torch.randn(p.shape, generator=g) for n, p in base.state_dict().items()}
        for _ in range(K)
    ]


def session(model: Diffusion, experts: list[State], **more: Any) -> MergeSession:
    return MergeSession(model.denoiser.state_dict(), experts, **more)


@torch.no_grad()
def loss_of(draws: Draws, denoiser: nn.Module) -> np.ndarray:
    """The mean loss of each range and group [R M], measured on the samples of the draws."""
    losses = torch.zeros(len(draws.ranges), draws.groups)
    for r, span in enumerate(draws.ranges):
        for m in range(draws.groups):
            cells = draws.cells(span, r, m, 7)
            each = [(denoiser(c.x_t, c.t).sample - c.y).square().flatten(1).mean(1) for c in cells]
            losses[r, m] = torch.cat(each).mean()
    return losses.double().numpy()


def at(draws: Draws, source: MergeSession, w: Any) -> nn.Module:
    """The model with theta(w)."""
    denoiser = copy.deepcopy(draws.model.denoiser)
    source.apply(torch.as_tensor(w), denoiser)
    return denoiser


# -- the quadratic form --------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["model", "block", "layer"])
def test_predicted_change_is_the_measured_one_where_the_model_is_linear(
    draws: Draws, per: Any
) -> None:
    groups = merge_groups(per, draws.model.denoiser)
    source = session(draws.model, moved(draws.model.denoiser, 3), groups=groups)
    found = measure_responses(draws, source)
    base = loss_of(draws, draws.model.denoiser)
    np.testing.assert_allclose(found.loss, base, rtol=1e-5)
    assert (
        found.blocks
        == {"model": (), "block": ("mid", "out"), "layer": ("mid_block", "conv_out")}[per]
    )
    for seed in range(3):
        w = np.random.default_rng(seed).normal(size=source.shape)
        measured = loss_of(draws, at(draws, source, w)) - base
        np.testing.assert_allclose(found.change(w.ravel()), measured, rtol=1e-4, atol=1e-5)


def test_the_chord_has_the_length_asked_for_and_a_linear_model_does_not_notice(
    draws: Draws,
) -> None:
    source = session(draws.model, moved(draws.model.denoiser, 2))
    one, short = measure_responses(draws, source), measure_responses(draws, source, step=0.25)
    np.testing.assert_allclose(short.products, one.products, rtol=1e-4, atol=1e-5)


def test_the_bend_is_what_the_quadratic_form_does_not_see(draws: Draws) -> None:
    source, w = session(draws.model, moved(draws.model.denoiser, 2)), np.array([0.4, -0.3])
    found = measure_responses(draws, source)
    assert abs(measure_bend(draws, source, found, w)).max() < 1e-5  # the model is linear
    half = Responses(found.ranges, (), 2, found.loss, found.slope / 2, found.products)
    np.testing.assert_allclose(
        measure_bend(draws, source, half, w), found.slope @ w / 2, rtol=1e-4, atol=1e-5
    )
    mended = solve_coefficients(half, ridge=0, bend=lambda w: measure_bend(draws, source, half, w))
    measured = loss_of(draws, at(draws, source, mended.w)) - found.loss
    change = (half.shares @ measured).sum() / (half.shares @ half.loss).sum()
    assert mended.fitted + mended.bend.value == pytest.approx(change, rel=1e-4)


def test_equal_for_any_memory_and_batch_and_the_model_stays(
    draws: Draws, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = copy.deepcopy(draws.model.denoiser.state_dict())
    source = session(draws.model, moved(draws.model.denoiser, 2))
    whole, seen = measure_responses(draws, source), []
    monkeypatch.setattr(module, "MEMORY", 1)
    small = measure_responses(
        draws, source, progress=lambda done, total, what: seen.append((done, total))
    )
    for name in ("loss", "slope", "products"):
        assert np.array_equal(getattr(whole, name), getattr(small, name))
    assert seen[-1] == (2 * 8 * 25 * 3, draws.count_passes(2))
    assert (
        draws.count_bytes(2) == 25 * 4 * 7 * 9 + 8 * 2 * 8 * 9
    )  # one batch's outputs, and the products
    monkeypatch.setattr(module, "BATCH", 3)
    np.testing.assert_allclose(measure_responses(draws, source).products, whole.products, rtol=1e-5)
    assert all(torch.equal(before[n], t) for n, t in draws.model.denoiser.state_dict().items())


def test_groups_have_images_of_their_own_and_other_seeds_other_samples(draws: Draws) -> None:
    source = session(draws.model, moved(draws.model.denoiser, 1))
    other = Draws(draws.model, draws.data, draws.ranges, draws.samples, draws.groups, seed=4)
    assert not np.array_equal(
        measure_responses(draws, source).slope, measure_responses(other, source).slope
    )
    cells = [list(draws.cells(draws.ranges[0], 0, m, 5)) for m in range(8)]
    assert [len(torch.cat([c.t for c in group])) for group in cells] == [25] * 8
    for group in cells:
        assert set(torch.cat([c.t for c in group]).tolist()) == set(range(10))


# -- the solution --------------------------------------------------------------------------------


def planted(w: Any, noise: float = 0.0, R: int = 2, M: int = 8) -> Responses:
    """Responses whose loss is least at w: |A^(1/2) (w' - w)|^2, the slope noisy over groups."""
    w, rng = np.asarray(w, dtype=np.float64), np.random.default_rng(0)
    rows = rng.normal(size=(R, M, 20, len(w)))
    products = np.einsum("rmip,rmiq->rmpq", rows, rows) / 20
    slope = -2 * products @ w + noise * rng.normal(size=(R, M, len(w)))
    loss = np.einsum("p,rmpq,q->rm", w, products, w) + 1
    return Responses(Partition.uniform(100, R), (), len(w), loss, slope, products)


def test_the_closed_form_finds_the_known_optimum() -> None:
    made = solve_coefficients(planted([0.3, -0.2, 0.7]), ridge=0)
    np.testing.assert_allclose(made.w, [0.3, -0.2, 0.7], atol=1e-10)
    assert made.predicted.total.is_resolved
    assert made.predicted.total.value == pytest.approx(made.fitted)
    assert result_of(made).verdict()[0].startswith("a gain is predicted: ")
    assert result_of(made).verdict()[1].startswith("better than 1/K each")


def test_the_optimum_of_a_linear_model_is_reached_by_gradient_descent_too(draws: Draws) -> None:
    source = session(draws.model, moved(draws.model.denoiser, 3, scale=0.1))
    found = measure_responses(draws, source)
    made = solve_coefficients(found, ridge=0)
    best = (found.shares @ loss_of(draws, at(draws, source, made.w))).mean()
    for k in range(3):
        for change in (-0.05, 0.05):
            near = made.w + change * np.eye(3)[k]
            assert (found.shares @ loss_of(draws, at(draws, source, near))).mean() > best


def test_ranges_count_by_their_share_or_relative_to_their_loss() -> None:
    far, near = planted([1.0], R=1), planted([0.0], R=1)
    pair = [
        np.concatenate([getattr(far, n), getattr(near, n)]) for n in ("loss", "slope", "products")
    ]
    pair[0] = np.ones_like(pair[0]) * np.array([[1.0], [3.0]])
    pair[2] = np.ones_like(pair[2])
    pair[1] = np.broadcast_to(np.array([-2.0, 0.0])[:, None, None], pair[1].shape)
    found = Responses(Partition.from_cuts(100, [20]), (), 1, *pair)
    assert solve_coefficients(found, ridge=0).w == pytest.approx(
        [0.2]
    )  # the minimum of .2 (w - 1)^2 + .8 w^2
    assert solve_coefficients(found, ridge=0, relative=True).w == pytest.approx(
        [0.2 / (0.2 + 0.8 / 3)]
    )


def test_equal_experts_share_and_idle_ones_get_nothing() -> None:
    one = planted([0.8])
    slope = np.concatenate([one.slope, one.slope, 0 * one.slope], -1)
    products = np.zeros((2, 8, 3, 3))
    products[..., :2, :2] = one.products
    twice = Responses(one.ranges, (), 3, one.loss, slope, products)
    np.testing.assert_allclose(solve_coefficients(twice, ridge=0).w, [0.4, 0.4, 0], atol=1e-8)


def test_scaling_a_task_vector_scales_its_weight_alone() -> None:
    found, scale = planted([0.3, -0.2], noise=0.2), np.array([1.0, 10.0])
    longer = Responses(
        found.ranges,
        (),
        2,
        found.loss,
        found.slope * scale,
        found.products * np.outer(scale, scale),
    )
    for ridge in (None, 0.1):
        one, other = solve_coefficients(found, ridge=ridge), solve_coefficients(longer, ridge=ridge)
        assert one.ridge == other.ridge
        np.testing.assert_allclose(other.w * scale, one.w, rtol=1e-6)


def test_noise_is_shrunk_and_promises_nothing() -> None:
    found = planted([0.0] * 6, noise=0.5)
    free, made = solve_coefficients(found, ridge=0), solve_coefficients(found)
    assert made.ridge > 0
    assert np.abs(made.w).sum() < np.abs(free.w).sum()
    assert made.fitted < 0
    assert not made.predicted.total.is_resolved
    assert result_of(made).verdict()[0].startswith("no gain is predicted: ")
    assert any("covers 0" in line for line in result_of(made).lines())


def test_weights_far_from_base_and_expert_are_pointed_out() -> None:
    made = solve_coefficients(planted([5.0, 0.3, -1.5]), ridge=0)
    assert [(block, k, round(w, 6)) for block, k, w in made.outside] == [
        ("", 0, 5.0),
        ("", 2, -1.5),
    ]
    told = [line for line in result_of(made).lines() if line.startswith("outside")]
    assert told == [
        "outside    2 of 3 weights lie outside [-1, 2], the farthest is 5 of expert 0; "
        f"--ridge {made.inner_ridge:g} brings all inside"
    ]
    assert not solve_coefficients(planted([5.0, 0.3, -1.5]), ridge=made.inner_ridge).outside
    said = result_of(made).weights_file()["record"]["outside"]
    assert (said["interval"], said["ridge"]) == ([-1, 2], made.inner_ridge)
    assert [(entry["block"], entry["expert"]) for entry in said["weights"]] == [
        (None, 0),
        (None, 2),
    ]
    inside = solve_coefficients(planted([1.9, -0.9]), ridge=0)
    assert not any(line.startswith("outside") for line in result_of(inside).lines())
    assert result_of(inside).weights_file()["record"]["outside"] == {
        "interval": [-1, 2],
        "weights": [],
        "ridge": None,
    }
    far = solve_coefficients(planted([1e6]), ridge=200.0)
    assert far.inner_ridge is None and "a --ridge above 200 shrinks them" in "\n".join(
        result_of(far).lines()
    )


def test_the_farthest_weight_is_named_by_its_layer() -> None:
    flat = planted([5.0, 0.3, 0.1, -4.5])
    made = solve_coefficients(
        Responses(flat.ranges, ("mid", "out"), 2, flat.loss, flat.slope, flat.products), ridge=0
    )
    assert [(block, k) for block, k, _ in made.outside] == [("out", 1), ("mid", 0)]
    assert any(
        "the farthest is -4.5 of expert 1 at out; " in line for line in result_of(made).lines()
    )


def test_weights_that_harm_are_said_to_harm() -> None:
    found = planted([0.5, 0.5])
    harm = predict(found, np.array([-2.0, -2.0])).total
    assert harm.is_resolved and harm.value > 0
    good = solve_coefficients(found, ridge=0)
    prediction = predict(found, np.array([-2.0, -2.0]))
    made = replace(good, predicted=prediction, against_average=harm)
    low, high = harm.value - harm.half, harm.value + harm.half
    assert result_of(made).verdict()[:2] == [
        f"these weights harm: the loss over all ranges changes by {low:+.2%} to {high:+.2%} "
        "(95 %). Keep the base.",
        f"worse than 1/K each by {harm}",
    ]


def test_change_by_hand() -> None:
    found = Change.of(np.array([-1.0, -2.0, -3.0]), np.array([10.0, 10.0, 10.0]))
    assert found.value == pytest.approx(-0.2)
    assert found.se == pytest.approx(0.1 / 3**0.5)  # of a mean: s / sqrt(M)
    assert found.half == pytest.approx(4.302653 * found.se)
    assert not found.is_resolved


@pytest.mark.parametrize("mean", [(-0.4, 0.1), (0.0, 0.0)])
def test_intervals_cover_the_truth(mean: tuple[float, float]) -> None:
    """Cross-fitted changes and their intervals against the change on all samples there could be."""
    rng, runs, hits, lies = np.random.default_rng(7), 60, 0, 0
    ranges, loss, products = (
        Partition.uniform(10, 1),
        np.ones((1, 10)),
        np.tile(np.eye(2), (1, 10, 1, 1)),
    )
    for _ in range(runs):
        made = solve_coefficients(
            Responses(ranges, (), 2, loss, rng.normal(mean, 0.5, size=(1, 10, 2)), products),
            ridge=0,
        )
        truth, found = made.w @ mean + made.w @ made.w, made.predicted.total
        hits += abs(found.value - truth) <= found.half
        lies += found.is_resolved and found.value < 0 <= truth
    assert hits / runs >= 0.9
    assert lies / runs <= 0.03


def test_document_is_what_merge_reads(tmp_path: Any) -> None:
    from demerge.merging.recipe.weight_files import read_weight_file
    from demerge.storage.atomic import commit_json

    found = planted([0.1, 0.2, 0.3, 0.4])
    blocked = Responses(found.ranges, ("mid", "out"), 2, found.loss, found.slope, found.products)
    whole, rules = read_weight_file(
        commit_json(
            tmp_path / "w.json", result_of(solve_coefficients(blocked, ridge=0)).weights_file()
        )
    )
    assert whole == pytest.approx([0.2, 0.3])
    assert [rule.pattern for rule in rules] == ["mid", "out"]
    np.testing.assert_allclose([rule.weights for rule in rules], [[0.1, 0.2], [0.3, 0.4]])


# -- layers --------------------------------------------------------------------------------------


class Nested(nn.Module):
    """A module with a parameter of its own and two below; one has the name of a kind."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        self.outer.scale = nn.Parameter(torch.zeros(1))
        self.norm = nn.BatchNorm1d(1)
        self.table = nn.Parameter(torch.zeros(1))


def test_layers_are_narrow_first_and_each_tensor_is_in_one() -> None:
    module_of = Nested()
    state = {n: t for n, t in module_of.state_dict().items() if t.is_floating_point()}
    assert layer_patterns(module_of) == ["table", "outer.0", "outer.1", "norm.*", "outer"]
    source = MergeSession(
        state, [{n: t + 1 for n, t in state.items()}], groups=layer_patterns(module_of)
    )
    theta = source.theta(torch.arange(5.0)[:, None])
    moved = {n: float(t - state[n].flatten()[0]) for n, t in theta.items() if t.numel() == 1}
    assert moved == pytest.approx(
        {
            "table": 0,
            **{"outer.0.weight": 1, "outer.0.bias": 1, "outer.1.weight": 2, "outer.1.bias": 2},
            **{"norm.weight": 3, "norm.bias": 3, "norm.running_mean": 3, "norm.running_var": 3},
            "outer.scale": 4,
        },
        abs=1e-4,
    )


def test_more_weights_than_samples_tell_apart_keep_the_prediction_honest() -> None:
    """60 weights and 16 groups of noise: what is fitted looks good, what is predicted does not."""
    rng = np.random.default_rng(2)
    products = np.tile(np.eye(60), (1, 16, 1, 1))
    noise = Responses(
        Partition.uniform(10, 1),
        (),
        60,
        np.ones((1, 16)),
        0.3 * rng.normal(size=(1, 16, 60)),
        products,
    )
    free, made = solve_coefficients(noise, ridge=0), solve_coefficients(noise)
    assert free.fitted < -0.05 and free.predicted.total.value > 0
    assert made.ridge >= 10
    assert not made.predicted.total.is_resolved or made.predicted.total.value > 0


def test_many_weights_are_told_by_their_spread() -> None:
    found = planted(np.linspace(-1, 1, 40), noise=0.01)
    layered = Responses(
        found.ranges,
        tuple(f"layer.{i}" for i in range(20)),
        2,
        found.loss,
        found.slope,
        found.products,
    )
    told = result_of(solve_coefficients(layered, ridge=0)).lines()
    assert "of 20 layers:" in told
    assert [line.split()[0] for line in told if line.startswith(("least", "median", "most"))] == [
        "least",
        "median",
        "most",
    ]
    assert not any(line.startswith("layer.") for line in told)


# -- bad input -----------------------------------------------------------------------------------


def test_bad_draws_are_refused(draws: Draws) -> None:
    model, data, ranges = draws.model, draws.data, draws.ranges
    with pytest.raises(UsageError, match="7 samples per range do not fill 8 groups"):
        Draws(model, data, ranges, samples=7, groups=8)
    with pytest.raises(UsageError, match="40 images do not fill 41 groups"):
        Draws(model, data, ranges, groups=41)


@pytest.mark.parametrize(
    "wrong",
    [{"step": 0.0}, {"step": np.nan}, {"ridge": -1.0}, {"ridge": np.inf}, {"groups": 4}],
)
def test_bad_numbers_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(wrong))} is"):
        CoefficientsOptions(base="base", experts=["expert"], data="data", out="w.json", **wrong)


def test_outputs_that_overflow_are_refused_and_name_the_range(draws: Draws) -> None:
    huge = [{n: p + 3e38 for n, p in draws.model.denoiser.state_dict().items()}]
    with pytest.raises(NumericalError, match="expert 0 in range 0000-0010 is not finite"):
        measure_responses(draws, session(draws.model, huge))


def test_a_base_without_loss_cannot_be_bettered() -> None:
    found = planted([0.5])
    with pytest.raises(NumericalError, match="it cannot fall"):
        Responses(found.ranges, (), 1, 0 * found.loss, found.slope, found.products)
