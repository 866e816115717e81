"""Models compared in one call, in memory and on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import demerge.evaluation
from demerge import Diffusion, load_images
from demerge.diffusion.options import SamplingOptions
from demerge.diffusion.sampling import sample
from demerge.errors import UsageError
from demerge.evaluation import evaluate
from demerge.evaluation.features.nets import make_feature_net
from demerge.evaluation.metrics.distances import Reference, evaluate_images
from demerge.evaluation.metrics.range_losses import range_losses
from demerge.evaluation.options import EvaluationOptions
from demerge.merging import merge
from demerge.reporting.html import render_page
from demerge.timesteps import Partition

QUICK = EvaluationOptions(num_images=70, steps=2, lpips=False, ranges="none", device="cpu")


def test_models_in_memory_are_compared(make_tiny: Callable[..., Path]) -> None:
    paths = [make_tiny(seed=0), make_tiny(seed=1)]
    models = {"base": paths[0], "mine": Diffusion.load(paths[1])}
    kinds = {"mine": "merge"}
    report = evaluate(models, load_images("digits", split="test"), QUICK, kinds=kinds)  # type: ignore[arg-type]
    assert sorted(report.table["model"]) == ["base", "mine"]
    assert sorted(report.table["kind"]) == ["base", "merge"]
    assert set(report.table["seeds"]) == {"0 1 2"}
    assert "The best merge, mine" in report.verdict
    assert len(report.contact_sheet().axes) == 2 * 16
    assert report.plot().axes
    assert "<table>" in report.html


def test_the_same_call_goes_on_where_it_stopped(
    make_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    models = {"base": make_tiny(seed=0), "mine": make_tiny(seed=1)}
    one_seed = replace(QUICK, seeds=[0])
    first = evaluate(models, "digits", one_seed, out=tmp_path)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "scores").iterdir()}
    second = evaluate(models, "digits", one_seed, out=str(tmp_path))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "scores").iterdir()} == written
    assert second.table.equals(first.table)
    assert [floor.model for floor in first.ranked.floors] == ["digits train"]


def test_models_of_unlike_shape_and_plots_are_refused_at_once(
    make_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "index.html").write_text(render_page("What the merge did", "", [], ""))
    with pytest.raises(UsageError, match="plots that demerge wrote"):
        evaluate({"base": make_tiny(seed=0), "ties": tmp_path / "plots"}, "digits", QUICK)


def test_the_package_names_what_it_offers() -> None:
    assert set(demerge.evaluation.__all__) <= set(dir(demerge.evaluation))
    assert demerge.evaluation.EvaluationOptions is EvaluationOptions
    with pytest.raises(AttributeError):
        demerge.evaluation.nothing  # noqa: B018


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_scores_as_the_cpu_does_and_keeps_the_reference(tiny: Path) -> None:
    """On equal images all distances agree; images go from the sampler to the features."""
    model = Diffusion.load(tiny, device="cuda")
    images = sample(model, 40, SamplingOptions(steps=2), on_device=True)
    assert images.is_cuda
    assert torch.equal(images.cpu(), sample(model, 40, SamplingOptions(steps=2)))
    real = load_images("digits", split="train", limit=100)
    pixels = real.images(range(len(real)))
    metrics = {}
    for device in ("cpu", "cuda"):
        net = make_feature_net("digits-cnn", device=device)
        reference = Reference.from_images(net, pixels)
        places = (reference.features, reference.root, reference.reach, reference.moments.mean)
        assert {place.device.type for place in places} == {device}
        metrics[device] = evaluate_images(images, reference, net)
    assert metrics["cuda"] == pytest.approx(metrics["cpu"], rel=1e-3, abs=1e-3)


@pytest.mark.slow
def test_two_experts_against_one_model(
    tiny_family: Callable[[str], Path], image_folder: Path, tmp_path: Path
) -> None:
    """A pipeline of two denoisers and its merge: the high-noise expert fits a part of [0, T) alone."""
    two, one = tiny_family("wan"), tmp_path / "one"
    merge(two, [], one, method="average", no_base=True)
    options = EvaluationOptions(
        num_images=4, steps=2, seeds=(0,), split="all", loss_samples=16, lpips=False,
        resolution=16, ranges=str(two), features="random", device="cpu",
    )  # fmt: skip
    report = evaluate([two, one], str(image_folder), options)
    kinds = {row.model: row.kind for row in report.ranked.rows}
    assert kinds == {"routed ensemble": "ensemble", "one": "merge"}
    losses = report.document()["losses"]
    assert [line["range"] for line in losses] == ["0000-0875"] * 2 + ["0875-1000"] * 2
    single = next(line for line in losses if line["model"] == "one")
    pair, merged = Diffusion.load(two, resolution=16), Diffusion.load(one, resolution=16)
    data = pair.load_images(str(image_folder), split="all", skip_broken=False)
    ranges = Partition.from_cuts(1000, [875])
    a, b = (range_losses(model, data, ranges, samples=16) for model in (merged, pair))
    change = a.change(b)["0000-0875"]
    assert single["against"]["ensemble"] == pytest.approx(asdict(change))
    assert change.low <= change.value <= change.high and change.value != 0
