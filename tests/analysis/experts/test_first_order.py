"""Predicted changes of losses: exact or with honest errors, right for short task vectors."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from demerge.analysis import MeasurementOptions, measure
from demerge.analysis.experts.first_order import predict_transfer
from demerge.analysis.experts.plots import draw_transfer
from demerge.analysis.measurement.sketch import CountSketch
from demerge.analysis.planning.transfer import short_names
from demerge.analysis.similarity import t_quantile
from demerge.conflict import LAYER_K, Array, ConflictMap, K, Origin, layers_of
from demerge.data import load_images
from demerge.diffusion.model import Diffusion
from demerge.errors import InputError
from demerge.evaluation.metrics.range_losses import range_losses
from demerge.finetuning import FinetuneOptions, finetune
from demerge.merging import MergeSession
from demerge.reporting.theme import render
from demerge.storage.checkpoint import Checkpoint
from demerge.timesteps import Partition

SIZE: dict[str, Any] = {"bins": 6, "groups": 7, "batch_size": 4, "seed": 3}


class Deltas(dict[str, Tensor]):
    """What a LoRA stands for."""

    holds_deltas = True


def theta_moved(model: Any, step: Tensor) -> dict[str, Tensor]:
    return {"theta": model.denoiser.theta.detach() + step}


def test_products_are_those_of_the_gradients_where_all_is_kept(linear: Any, images: Any) -> None:
    """Ranges that cut a bin take their part; the jackknife of a mean is its standard error."""
    map = measure(linear, images, MeasurementOptions(**SIZE))
    assert map.sketches is not None
    s = map.sketches.astype(np.float64) * CountSketch.of(9, SIZE["seed"]).signs.numpy()
    step = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    base, ranges = theta_moved(linear, torch.zeros(1)), Partition.from_cuts(30, [7, 15])
    found = predict_transfer(map, base, [theta_moved(linear, row) for row in step], ranges)
    weights = np.array(
        [[5, 2, 0, 0, 0, 0], [0, 3, 5, 0, 0, 0], [0, 0, 0, 5, 5, 5], [5] * 6]
    ) / np.array([[7], [8], [15], [30]])
    each = np.einsum("ri,imd,kd->mkr", weights, s, step.flatten(1).double().numpy())
    np.testing.assert_allclose(found.changes.value, each.mean(0)[:, :3], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found.total.value, each.mean(0)[:, 3], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found.changes.se, each.std(0, ddof=1)[:, :3] / 7**0.5, rtol=1e-4)
    assert not found.changes.sketch.any() and found.by_layer is None and found.names == ("0", "1")
    np.testing.assert_allclose(found.changes.half, t_quantile(7) * found.changes.se)
    np.testing.assert_allclose(found.norms, step.flatten(1).norm(dim=1), rtol=1e-6)
    assert (found.changes.resolved == (abs(found.changes.value) > found.changes.half)).all()


def test_models_and_deltas_of_any_order_are_read_alike(linear: Any, images: Any) -> None:
    map, ranges = measure(linear, images, MeasurementOptions(**SIZE)), Partition.uniform(30, 2)
    base, step = theta_moved(linear, torch.zeros(1)), torch.full((1, 3, 3), 0.1)
    full, lora = theta_moved(linear, step), Deltas(theta=step)
    seen: list[int] = []
    found = predict_transfer(
        map,
        base,
        [full, lora, Deltas()],
        ranges,
        names="abc",
        progress=lambda done, *_: seen.append(done),
    )
    np.testing.assert_allclose(found.changes.value[0], found.changes.value[1], rtol=1e-5)
    assert (
        not found.changes.value[2].any()
        and not found.changes.resolved[2].any()
        and found.names == ("a", "b", "c")
    )
    assert seen == [1]


# -- sketches of long gradients ------------------------------------------------------------------

LAYOUT = {"a.weight": 70_000, "a.bias": 100, "b.weight": 300}
NOISE = 0.02


def drawn(
    seed: int, count: int
) -> tuple[ConflictMap, dict[str, Tensor], list[dict[str, Tensor]], Array]:
    """A map of known mean gradients, base, experts, and <gbar_R, tau_n> of two ranges, [K 2]."""
    D, N, M = sum(LAYOUT.values()), 4, 8
    g = torch.Generator().manual_seed(seed)
    mu, noise = torch.randn(N, D, generator=g) / D**0.5, torch.randn(N, M, D, generator=g) * NOISE
    sketch = CountSketch.of(D, seed)
    s = mu[:, None] + noise
    short = sketch.layers(LAYOUT)
    whole, parts = (np.zeros((N, M, width), dtype=np.float32) for width in (K, short.width))
    for i, m in np.ndindex(N, M):
        for keep, row in ((sketch, whole[i, m]), (short, parts[i, m])):
            keep.add(total := torch.zeros(len(row), dtype=torch.float64), 0, s[i, m])
            row[:] = total.float().numpy()
    gram = np.einsum("imk,jnk->imjn", whole, whole, dtype=np.float64, optimize=True)
    origin = Origin("model", "data", D, f"sketch-{K}", "shared", False, "euclid", 4, seed)
    map = ConflictMap(
        Partition.uniform(40, N), gram, np.linspace(9, -9, 40), origin, LAYOUT, whole, parts
    )
    base = {name: torch.randn(numel, generator=g) for name, numel in reversed(LAYOUT.items())}
    taus = torch.randn(count, D, generator=g) / D**0.5
    split = [dict(zip(LAYOUT, tau.split(list(LAYOUT.values())), strict=True)) for tau in taus]
    experts = [{name: base[name] + tau[name] for name in base} for tau in split]
    truth = (taus.double() @ mu.view(2, 2, D).mean(1).double().T).numpy()
    return map, base, experts, truth


def test_intervals_of_sketched_products_cover_the_truth() -> None:
    covered, share = [], []
    for seed in range(3):
        map, base, experts, truth = drawn(seed, 40)
        found = predict_transfer(map, base, experts, Partition.uniform(40, 2))
        covered += (abs(found.changes.value - truth) <= found.changes.half).ravel().tolist()
        share += (found.changes.sketch / found.changes.half).ravel().tolist()
        assert found.by_layer is not None and found.by_layer.value.shape == (40, 2, 2)
    assert np.mean(covered) > 0.9 and np.median(share) > 0.05


def test_layers_add_up_and_short_ones_are_exact() -> None:
    map, base, experts, _ = drawn(0, 3)
    found = predict_transfer(map, base, experts, Partition.uniform(40, 2))
    assert found.layers == ("a", "b") and found.by_layer is not None
    assert (
        layers_of(LAYOUT)["b"] <= LAYER_K
        and not found.by_layer.sketch[:, 1].any()
        and found.by_layer.sketch[:, 0].all()
    )
    gap = abs(found.by_layer.value.sum(1) - found.changes.value)
    assert (gap <= 4 * np.hypot(found.by_layer.sketch[:, 0], found.by_layer.se[:, 0])).all()


def test_what_the_map_does_not_have_is_counted_and_left_out() -> None:
    map, base, experts, _ = drawn(0, 1)
    buffer = {"c.running": torch.zeros(4), "c.steps": torch.tensor(3)}
    moved = {**experts[0], "c.running": torch.full((4,), 10.0), "c.steps": torch.tensor(3)}
    plain, more = (
        predict_transfer(map, base, experts, TWO),
        predict_transfer(map, {**buffer, **base}, [moved], TWO),
    )
    assert np.array_equal(plain.changes.value, more.changes.value) and np.array_equal(
        plain.norms, more.norms
    )
    assert (
        more.outside[0] == pytest.approx(400 / (400 + plain.norms[0] ** 2))
        and not plain.outside.any()
    )


TWO = Partition.uniform(40, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda map, base, expert: (
                replace(map, sketches=None, layers=None, layout={}),
                base,
                expert,
            ),
            "holds no sketches",
        ),
        (
            lambda map, base, expert: (
                replace(map, origin=replace(map.origin, metric="adam")),
                base,
                expert,
            ),
            "adam metric",
        ),
        (
            lambda map, base, expert: (map, {"a.weight": base["a.weight"]}, expert),
            "2 parameters of the map are not in the",
        ),
        (
            lambda map, base, expert: (map, {**base, "a.bias": torch.zeros(7)}, expert),
            "100 coordinates in the map",
        ),
        (lambda map, base, expert: (map, base, {"a.weight": expert["a.weight"]}), "is missing"),
        (
            lambda map, base, expert: (map, base, {**expert, "a.bias": torch.zeros(2, 50)}),
            "the base's [100]",
        ),
        (
            lambda map, base, expert: (
                map,
                base,
                {**expert, "a.bias": torch.full((100,), torch.nan)},
            ),
            "NaN or Inf",
        ),
    ],
    ids=["no sketches", "metric", "parameters", "sizes", "tensors", "shapes", "NaN"],
)
def test_what_does_not_fit_is_refused(change: Callable[..., Any], message: str) -> None:
    map, base, experts, _ = drawn(0, 1)
    map, base, expert = change(map, base, experts[0])
    with pytest.raises(InputError) as refused:
        predict_transfer(map, base, [expert], TWO)
    assert message in refused.value.what and refused.value.fix


def test_names_are_short_where_that_tells_them_apart() -> None:
    assert short_names(["a/0000-0250", "b/lora.safetensors"]) == ["0000-0250", "lora.safetensors"]
    assert short_names(["a/unet", "b/unet", "c/d"]) == ["a/unet", "b/unet", "d"]


@pytest.mark.parametrize("level", [1.0, 0.0], ids=["as measured", "nothing resolved"])
def test_the_matrix_is_drawn_with_unresolved_cells_hatched(level: float) -> None:
    map, base, experts, _ = drawn(0, 4)
    made = predict_transfer(map, base, experts, TWO, names=["0000-0250", "$x", "c" * 90, "d"])
    made = replace(made, changes=replace(made.changes, value=level * made.changes.value))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw_transfer(made)
        assert len(render(figure, "png")) > 5000
        assert not level or render(figure) == render(draw_transfer(made))
    assert len(figure.axes[0].patches) == int((~made.changes.resolved).sum())


# -- against what it predicts --------------------------------------------------------------------


def test_short_task_vectors_change_the_losses_of_digits_as_predicted(tmp_path: Path) -> None:
    """A tenth of experts of six steps, on images that neither map nor experts have seen."""
    model, ranges = Diffusion.load("digits-base"), Partition.uniform(1000, 2)
    generator = torch.Generator().manual_seed(0)
    for theta in model.denoiser.parameters():
        theta += 0.1 * theta.abs().mean() * torch.randn(theta.shape, generator=generator)
    train, test = (load_images("digits", split=split) for split in ("train", "test"))
    options = FinetuneOptions(
        max_train_steps=6, train_batch_size=16, learning_rate=5e-4, use_ema=False
    )
    for _ in finetune(model, train, ranges, options, tmp_path):
        pass
    experts = [Checkpoint.open(tmp_path / str(span)) for span in ranges]
    map = measure(model, train, MeasurementOptions(bins=4, groups=6, batch_size=16))
    found = predict_transfer(map, model.denoiser.state_dict(), experts, ranges)
    live, session, losses = (
        model.with_denoiser(copy.deepcopy(model.denoiser)),
        MergeSession(model.denoiser, experts),
        [],
    )
    for w in (torch.zeros(2), *(0.1 * torch.eye(2))):
        session.apply(w, live.denoiser)
        losses.append(list(range_losses(live, test, ranges, samples=96, seed=1).means.values()))
    change = 10 * (np.array(losses[1:]) - losses[0])
    assert found.changes.resolved.all() and (found.changes.value < 0).all()
    assert (abs(change / found.changes.value - 1) < 0.35).all()
    assert np.corrcoef(change.ravel(), found.changes.value.ravel())[0, 1] > 0.95
