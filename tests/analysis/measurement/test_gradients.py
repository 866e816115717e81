"""Measurement: the gradients are those of the loss, the draws are as promised, sketches and resumes change nothing."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from demerge.analysis.measurement.checkpoint import MeasurementCheckpoint
from demerge.analysis.measurement.collector import Identity, adam_scale, products
from demerge.analysis.measurement.gradients import Measurement, cut_bins, describe_bins
from demerge.analysis.measurement.options import MeasurementOptions
from demerge.analysis.measurement.run import begin, measure
from demerge.analysis.measurement.samples import draw
from demerge.analysis.measurement.sketch import CountSketch, Sketches
from demerge.analysis.similarity import all_cross_pairs, pair_weighted_gram, similarity
from demerge.conflict import Array, ConflictMap
from demerge.data import load_images
from demerge.diffusion.model import Diffusion
from demerge.diffusion.numerics import accumulator
from demerge.errors import InputError, NumericalError, ResourceError, UsageError
from demerge.progress import Progress, silent
from demerge.timesteps import Partition

SMALL = {"bins": 3, "groups": 5, "batch_size": 2}


def measured(
    model: Any, data: Any, *, mode: str = "auto", progress: Progress = silent, **options: Any
) -> ConflictMap:
    """Measure with options by name."""
    return measure(model, data, MeasurementOptions(**options), mode=mode, progress=progress)


def truth(model: Any, data: Any, edges: list[int]) -> Array:
    """mu [N D] of f = theta x: the mean over t and images of 2/P [theta (a^2 x0^2 + s^2) - s]."""
    x0 = data.floats(range(len(data))).double().flatten(1)
    theta = model.denoiser.theta.detach().double().flatten()
    abar = model.alphas_cumprod
    s = (1 - abar).sqrt()[:, None, None]
    by_t = 2 / theta.numel() * (theta * (abar[:, None, None] * x0**2 + s**2) - s).mean(1)
    means = [by_t[a:b].mean(0) for a, b in pairwise(edges)]
    return np.asarray(torch.stack(means).numpy())


@pytest.mark.parametrize(
    "options",
    [{}, {"draws": "independent"}, {"antithetic": "on"}, {"antithetic": "auto"}],
    ids=["shared", "independent", "antithetic", "pilot"],
)
def test_a_linear_problem_is_measured_without_bias(
    linear: Any, images: Any, options: dict[str, Any]
) -> None:
    maps = [measured(linear, images, **SMALL, **options, seed=seed) for seed in range(40)]
    mu = truth(linear, images, maps[0].edges)
    values = np.array([pair_weighted_gram(map, all_cross_pairs(5)) for map in maps])
    z = (values.mean(0) - mu @ mu.T) / (values.std(0, ddof=1) / len(maps) ** 0.5)
    assert abs(z).max() < 3.5


def test_the_pilot_takes_antithetic_noise_where_it_takes_away_noise(
    linear: Any, images: Any
) -> None:
    """Noise of the linear problem is odd in eps where x_t is nearly x0, at small t, and even in eps where x_t is nearly eps."""
    settings: dict[str, Any] = {"bins": 30, "groups": 40, "batch_size": 2}
    off, on, auto = (
        measured(linear, images, **settings, antithetic=kind) for kind in ("off", "on", "auto")
    )
    assert isinstance(auto.origin.antithetic, tuple) and (
        off.origin.antithetic,
        on.origin.antithetic,
    ) == (False, True)
    chosen = np.array(auto.origin.antithetic)
    plain, paired = (np.einsum("imim->i", map.gram) / map.M for map in (off, on))
    signals = [pair_weighted_gram(map, all_cross_pairs(map.M))[0, 0] for map in (off, on)]
    assert paired[0] - signals[1] < 0.8 * (plain[0] - signals[0])
    clear = abs(np.log(paired / plain)) > 0.25
    assert (paired < plain)[clear].any() and (paired > plain)[clear].any()
    assert (chosen == (paired < plain))[clear].mean() > 0.85
    assert np.array_equal(auto.gram[chosen][:, :, chosen], on.gram[chosen][:, :, chosen])
    assert np.array_equal(auto.gram[~chosen][:, :, ~chosen], off.gram[~chosen][:, :, ~chosen])


def test_the_noise_of_each_bin_is_stored(linear: Any, images: Any, tmp_path: Path) -> None:
    map = measured(linear, images, **SMALL, antithetic="auto")
    assert ConflictMap.load(map.save(tmp_path / "conflict.safetensors")).origin == map.origin
    with pytest.raises(InputError, match="antithetic noise is said of 2 bins, not of 3"):
        replace(map, origin=replace(map.origin, antithetic=(True, False)))
    numbers = replace(map, origin=replace(map.origin, antithetic=(1, 0, 0)))
    with pytest.raises(InputError, match="antithetic"):
        ConflictMap.load(numbers.save(tmp_path / "numbers.safetensors"))


@pytest.mark.parametrize("engine", ["exact", "sketch"])
def test_low_precision_passes_are_summed_in_full(
    tiny: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model computes in bf16, and no sum does: a row is that of its gradients' float64 sum."""
    model, data = Diffusion.load(tiny), load_images("digits", split="train", limit=20)
    full = measured(model, data, **SMALL, engine=engine)
    seen: list[torch.dtype] = []
    predict = Diffusion.predict

    def spy(self: Any, *arguments: Any) -> Any:
        seen.append(predict(self, *arguments).dtype)
        return predict(self, *arguments)

    monkeypatch.setattr(Diffusion, "predict", spy)
    half = measured(model, data, **SMALL, engine=engine, mixed_precision="bf16")
    assert set(seen) == {torch.bfloat16} and half.origin.precision == "bf16"
    norms = np.sqrt(np.diagonal(full.gram.reshape(15, 15)))
    assert 0 < (abs(half.gram - full.gram).reshape(15, 15) / np.outer(norms, norms)).max() < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pieces_of_low_precision_add_up_in_full(dtype: torch.dtype) -> None:
    """4096 gradients of 2^-9 add up to 8, and in bf16 to no more than 0.5."""
    sketch, piece = CountSketch.of(10, 0), torch.full((10,), 2.0**-9, dtype=dtype)
    for keep in (
        sketch,
        Identity(10),
        Sketches([(0, sketch), *sketch.layers({"a.weight": 10}).parts]),
    ):
        total = accumulator((keep.width,), torch.device("cpu"))
        for _ in range(4096):
            keep.add(total, 0, piece)
        assert total.abs().tolist() == [8.0] * keep.width


def test_the_gram_is_that_of_plain_backward_passes(tiny: Path) -> None:
    model, data = Diffusion.load(tiny), load_images("digits", split="train", limit=20)
    seen: list[tuple[int, int, str]] = []
    map = measured(model, data, **SMALL, seed=3, progress=lambda *step: seen.append(step))
    assert [step[:2] for step in seen] == [(i, 15) for i in range(1, 16)]
    assert not any(p.requires_grad or p.grad is not None for p in model.denoiser.parameters())
    model.denoiser.requires_grad_(True)
    rows = []
    for i, span in enumerate(map.bins):
        for m in range(5):
            drawn = draw(model, data, m, 2, 3, False)
            t = torch.tensor([span.start + int(p * len(span)) for p in drawn.position])
            assert all(int(each) in span for each in t), i
            model.denoiser.zero_grad()
            model.loss(drawn.x0, drawn.noise, t, drawn.condition).mean().backward()
            rows.append(
                torch.cat([p.grad.flatten() for p in model.denoiser.parameters()]).double().numpy()
            )
    flat = np.array(rows)
    assert np.allclose(
        map.gram.reshape(15, 15), flat @ flat.T, rtol=1e-4, atol=1e-6 * (flat**2).sum(1).max()
    )
    assert map.origin.parameters == flat.shape[1]


@pytest.mark.parametrize("metric", ["euclid", "adam"])
def test_a_sketch_gives_the_map_of_the_exact_gradients(make_tiny: Any, metric: str) -> None:
    model, data = (
        Diffusion.load(make_tiny(block_out_channels=(16, 32))),
        load_images("digits", limit=20),
    )
    assert model.parameters > 65_521
    exact, sketch = (
        measured(model, data, **SMALL, metric=metric, engine=engine)
        for engine in ("exact", "sketch")
    )
    norms = np.sqrt(np.diagonal(exact.gram.reshape(15, 15)))
    error = (sketch.gram - exact.gram).reshape(15, 15) / np.outer(norms, norms)
    assert 0 < abs(error).max() < 4 / 65_521**0.5
    assert (exact.origin.engine, sketch.origin.engine) == ("exact", "sketch-65521")


def test_hooks_give_the_map_of_the_flat_pass(tiny: Path) -> None:
    model, data = Diffusion.load(tiny), load_images("digits", limit=20)
    for options in (  # test_architectures.py has the exact ones
        {"engine": "sketch"},
        {"engine": "sketch", "metric": "adam", "params": "attentions"},
    ):
        flat, hooks = (
            measured(model, data, **SMALL, **options, mode=mode).gram for mode in ("flat", "hooks")
        )
        assert np.allclose(hooks, flat, rtol=1e-5, atol=1e-7 * abs(flat).max())
    with pytest.raises(UsageError, match="flat, hooks"):
        measured(model, data, **SMALL, mode="some")


def test_the_cost_is_said_first(tiny: Path) -> None:
    model, data = Diffusion.load(tiny), load_images("digits", limit=5)
    D = sum(p.numel() for p in model.denoiser.parameters())

    def cost(**settings: Any) -> Any:
        return Measurement(model, data, MeasurementOptions(**{**SMALL, **settings})).cost()

    whole, sketched = cost(), cost(engine="sketch", metric="adam")
    assert (whole.passes, whole.engine, whole.bytes) == (
        15,
        "exact",
        4 * 15 * 2 * D,
    )  # with the sketches
    assert (sketched.passes, sketched.engine, sketched.bytes) == (18, "sketch-65521", 4 * 15 * D)
    assert "15 backward passes" in str(whole) and "sketches of 65,521 numbers" in str(sketched)
    assert cost(memory=4 * 15 * 2 * D / 1e9).engine == "exact"
    with pytest.raises(ResourceError, match="15 gradients"):
        cost(memory=(4 * 15 * 2 * D - 1) / 1e9)
    with pytest.raises(ResourceError, match="15 sketches"):
        cost(memory=(4 * 15 * D - 1) / 1e9, engine="sketch")


def test_sketches_are_taken_where_gradients_do_not_fit(make_tiny: Any) -> None:
    model, data = (
        Diffusion.load(make_tiny(block_out_channels=(16, 32))),
        load_images("digits", limit=5),
    )
    assert model.parameters > 65_521
    memory = 4 * 15 * 65_521 / 1e9
    assert (
        Measurement(model, data, MeasurementOptions(**SMALL, memory=memory)).cost().engine
        == "sketch-65521"
    )
    with pytest.raises(ResourceError, match="gradients") as caught:
        Measurement(model, data, MeasurementOptions(**SMALL, memory=memory, engine="exact"))
    assert "--engine sketch" in caught.value.fix


def test_params_choose_what_counts(tiny: Path) -> None:
    model, data = Diffusion.load(tiny), load_images("digits", limit=20)
    chosen = [
        p
        for name, p in model.denoiser.named_parameters()
        if "norm" in name and name.endswith("weight")
    ]
    map = measured(model, data, **SMALL, params=r"norm.*weight$")
    assert (map.origin.params, map.origin.parameters) == (
        r"norm.*weight$",
        sum(p.numel() for p in chosen),
    )
    model.denoiser.requires_grad_(True)
    drawn = draw(model, data, 0, 2, 0, False)
    gradients = torch.autograd.grad(
        drawn.loss(model, map.bins.ranges[0]), list(model.denoiser.parameters())
    )
    of = dict(zip(model.denoiser.parameters(), gradients, strict=True))
    assert map.gram[0, 0, 0, 0] == pytest.approx(
        sum(float(of[p].double().square().sum()) for p in chosen), rel=1e-4
    )
    for wrong in ("nowhere", "("):
        with pytest.raises(UsageError, match="params"):
            measured(model, data, **SMALL, params=wrong)


def test_adapters_alone_can_count(linear: Any, images: Any) -> None:
    class Adapted(type(linear.denoiser)):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(3)
            self.lora_A = torch.nn.Parameter(torch.ones(2))

        def forward(self, x: Any, t: Any) -> Any:
            return super().forward(x * self.lora_A.prod(), t)

    assert (
        measured(linear.with_denoiser(Adapted()), images, **SMALL, params="lora").origin.parameters
        == 2
    )


def test_a_finished_group_is_not_measured_again(linear: Any, images: Any, tmp_path: Path) -> None:
    """Groups of two runs in one folder are one run; what is damaged is made again, what is foreign is refused."""
    measurement = Measurement(
        linear, images, MeasurementOptions(**SMALL, metric="adam", engine="sketch")
    )
    whole = begin(measurement).map()
    one, other = (
        MeasurementCheckpoint(tmp_path / name, measurement.key()) for name in ("one", "other")
    )
    for partial in (one, other):
        assert np.array_equal(begin(measurement, partial).map().gram, whole.gram)
    for name in ("pilot", "group-0001", "group-0003"):
        (one.folder / f"{name}.safetensors").unlink()
    for name in ("group-0001", "group-0003"):
        (other.folder / f"{name}.safetensors").rename(one.folder / f"{name}.safetensors")
    (one.folder / "group-0004.safetensors").write_bytes(b"x")
    seen: list[tuple[int, int, str]] = []
    assert np.array_equal(
        begin(measurement, one).map(lambda *step: seen.append(step)).gram, whole.gram
    )
    assert [step[2] for step in seen] == [
        f"{what} {bin}" for what in ("pilot", "bin") for bin in whole.bins
    ]
    other_seed = Measurement(
        linear, images, MeasurementOptions(**SMALL, metric="adam", engine="sketch", seed=1)
    )
    foreign = MeasurementCheckpoint(one.folder, other_seed.key())
    for refused in (foreign.check, lambda: begin(other_seed, foreign).map()):
        with pytest.raises(UsageError, match="seed was 0, now 1"):
            refused()
    one.check()
    one.remove()
    assert not one.folder.exists()


def test_maps_repeat_and_differ_by_seed(linear: Any, images: Any) -> None:
    first = measured(linear, images, **SMALL)
    assert np.array_equal(first.gram, measured(linear, images, **SMALL).gram)
    assert not np.array_equal(first.gram, measured(linear, images, **SMALL, seed=1).gram)


def test_draws_are_shared_between_bins_only_when_asked(
    linear: Any, images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[int] = []

    def spy(*arguments: Any) -> Any:
        keys.append(arguments[2])
        return draw(*arguments)

    monkeypatch.setattr("demerge.analysis.measurement.samples.draw", spy)
    measured(linear, images, **SMALL)
    assert keys == [0, 1, 2, 3, 4]
    keys.clear()
    measured(linear, images, **SMALL, draws="independent")
    assert len(set(keys)) == len(keys) == 15 and not set(keys) & set(range(5))
    keys.clear()
    measured(linear, images, **SMALL, draws="independent", metric="adam")
    assert len(set(keys)) == len(keys) == 18


def test_dropout_is_off(tiny: Path, linear: Any, images: Any) -> None:
    class Dropping(type(linear.denoiser)):  # type: ignore[misc]
        def forward(self, x: Any, t: Any) -> Any:
            return super().forward(torch.nn.functional.dropout(x, 0.5, self.training), t)

    dropping = linear.with_denoiser(Dropping(3).train())
    assert np.array_equal(
        measured(dropping, images, **SMALL).gram, measured(linear, images, **SMALL).gram
    )
    assert dropping.denoiser.training


def test_products_of_long_rows() -> None:
    rows = torch.randn(5, 70_001, generator=torch.Generator().manual_seed(0))
    assert np.allclose(
        products(rows), (rows.double() @ rows.double().T).numpy(), atol=1e-2, rtol=1e-6
    )


def test_the_adam_scale_by_hand() -> None:
    assert adam_scale(torch.tensor([4.0, 0.0, 25.0])).tolist() == pytest.approx(
        [2**-0.5, 1, 5**-0.5]
    )


def test_adam_products_are_divided_by_the_root_of_v() -> None:
    rows = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 9)
    v = rows.square().mean(0)
    expected = torch.einsum("ap,bp,p->ab", rows.double(), rows.double(), 1 / v.double().sqrt())
    assert np.allclose(products(rows * adam_scale(v)), expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"groups": 4},
        {"batch_size": 0},
        {"memory": 0},
        {"draws": "some"},
        {"metric": "l1"},
        {"engine": "some"},
        {"bins": 31},
        {"bins": 0},
        {"antithetic": "on", "batch_size": 3},
    ],
)
def test_wrong_arguments_are_usage_errors(linear: Any, images: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        measured(linear, images, **{**SMALL, **wrong})


@pytest.mark.parametrize("options", [{}, {"engine": "sketch", "mode": "hooks"}, {"metric": "adam"}])
def test_a_gradient_that_is_not_finite_names_its_bin(
    linear: Any, images: Any, options: dict[str, Any]
) -> None:
    with torch.no_grad():
        linear.denoiser.theta[0, 0, 0] = torch.nan
    where = "pilot" if "metric" in options else "group 0"
    with pytest.raises(
        NumericalError,
        match=rf"bin 0000-0010, {where}, is not finite, at sample 0 \(image \d of toy, t = \d\)",
    ):
        measured(linear, images, **SMALL, **options)


@pytest.mark.parametrize("engine", ["exact", "sketch"])
def test_a_gradient_that_is_not_finite_names_its_sample(
    linear: Any, images: Any, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last image of group 0 is broken."""
    images_of_group = draw(linear, images, 0, 2, 0, False).images
    broken = images_of_group[-1]
    floats = type(images).floats

    def damaged(self: Any, indices: Any, flip: Any = None) -> Any:
        values = floats(self, indices, flip)
        values[[i for i, index in enumerate(indices) if index == broken]] = torch.inf
        return values

    monkeypatch.setattr(type(images), "floats", damaged)
    expected = rf"group 0, is not finite, at sample {images_of_group.index(broken)} \(image {broken} of toy"
    with pytest.raises(NumericalError, match=expected):
        measured(linear, images, **SMALL, engine=engine)


def test_a_text_model_is_measured_with_its_captions(tiny_text: Path, image_folder: Path) -> None:
    model = Diffusion.load(tiny_text)
    data = load_images(image_folder, resolution=16, channels=3)
    map = measured(model, data, bins=2, groups=5, batch_size=1)
    assert map.gram.shape == (2, 5, 2, 5) and similarity(map).reliability.shape == (2,)
    attention = measured(
        model,
        data,
        bins=2,
        groups=5,
        batch_size=1,
        engine="sketch",
        params=r"attn2\.to_[kv]",
        mode="hooks",
    )
    assert (
        0 < attention.origin.parameters < map.origin.parameters
        and (np.diagonal(attention.gram.reshape(10, 10)) > 0).all()
    )
    with pytest.raises(UsageError, match="captions"):
        measured(
            model,
            load_images("digits", resolution=16, channels=3, limit=5),
            bins=2,
            groups=5,
            batch_size=1,
        )


@given(st.integers(2, 400), st.data())
def test_bins_are_cut_at_the_boundaries_of_ranges(T: int, data: st.DataObject) -> None:
    cuts = data.draw(st.sets(st.integers(1, T - 1), max_size=5))
    ranges = Partition.from_cuts(T, sorted(cuts))
    N = data.draw(st.integers(len(ranges), T))
    bins = cut_bins(T, N, ranges)
    assert (len(bins), bins.total) == (N, T) and set(ranges.cuts) <= set(bins.cuts)
    assert cut_bins(T, N, bins) == bins, "more groups for a map have its bins"
    widest = max(map(len, bins))
    narrow = [len(span) for span in bins if len(span) < widest // 2]
    assert len(narrow) <= 2 * len(ranges), "only where a range leaves no room"


def test_bins_of_equal_widths_are_a_number() -> None:
    uniform = cut_bins(1000, 8, Partition.from_cuts(1000, [875]))
    assert uniform == Partition.uniform(1000, 8) and describe_bins(uniform) == 8
    others = cut_bins(1000, 4, Partition.from_cuts(1000, [900]))
    assert describe_bins(others) == [0, 300, 600, 900, 1000]
    with pytest.raises(UsageError, match="2 bins do not hold 3 ranges"):
        cut_bins(1000, 2, Partition.from_cuts(1000, [5, 900]))
