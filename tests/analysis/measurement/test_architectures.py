"""Every architecture that is analysed: stock classes with random weights, measured, read, and compared with plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from demerge.analysis import MeasurementOptions, Reading, measure, summarize
from demerge.analysis.measurement.samples import draw
from demerge.analysis.measurement.sketch import CountSketch
from demerge.conflict import ConflictMap, K, layers_of
from demerge.data import ImageData, load_images
from demerge.diffusion.model import Diffusion
from demerge.errors import UsageError

SMALL: dict[str, Any] = {"bins": 3, "groups": 5, "batch_size": 2}
WIDER = {
    "tiny": {"block_out_channels": (16, 32)},
    "tiny_text": {"block_out_channels": (16, 32)},
    "tiny_dit": {"num_layers": 3},
}
Case = tuple[Diffusion, ImageData]


def measured(model: Any, data: Any, *, mode: str = "auto", **options: Any) -> ConflictMap:
    """Measure with options by name."""
    return measure(model, data, MeasurementOptions(**options), mode=mode)


def data_for(model: Diffusion, captions: Path) -> ImageData:
    """Images in the model's shape: with captions for text, with labels for classes."""
    channels, height, _ = model.image_shape
    source = captions if model.requires_text else "digits"
    return load_images(
        source,
        split="all",
        resolution=height,
        channels=channels,
        limit=None if model.requires_text else 20,
    )


@pytest.fixture(params=WIDER)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def case(name: str, request: pytest.FixtureRequest, image_folder: Path) -> Case:
    """A tiny base and images for it. A DiT starts as the identity, with gradients of 0: its weights are drawn anew."""
    model = Diffusion.load(request.getfixturevalue(name))
    if name == "tiny_dit":
        disturb(model)
    return model, data_for(model, image_folder)


def disturb(model: Diffusion) -> None:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.denoiser.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g), alpha=0.05)


def test_a_map_is_measured_read_and_kept(case: Case, tmp_path: Path) -> None:
    model, data = case
    map = measured(model, data, **SMALL, layers=True)
    named = {name: p.numel() for name, p in model.denoiser.named_parameters()}
    assert map.layout == named and list(map.layout) == list(named)
    assert sum(layers_of(map.layout).values()) == map.origin.parameters == model.parameters
    assert (np.diagonal(map.gram.reshape(15, 15)) > 0).all()
    summary = summarize(Reading(map), 2)
    assert summary.document()["bins"] == 3 and summary.lines()
    again = ConflictMap.load(map.save(tmp_path / "conflict.safetensors"))
    assert np.array_equal(again.gram, map.gram) and dict(again.layout) == map.layout


def plain_gradient(model: Diffusion, images: ImageData, drawn: Any, t: Tensor) -> Tensor:
    """The gradient [D] of the mean squared error, by diffusers' own scheduler and a stock call of the denoiser."""
    x_t = model.scheduler.add_noise(drawn.x0, drawn.noise, t)
    given: dict[str, Any] = {}
    if model.text is not None and images.captions is not None:
        given |= model.text([images.captions[i] for i in drawn.images])
    if model.classes is not None and images.labels is not None:
        given["class_labels"] = torch.tensor([images.labels[i] for i in drawn.images])
    model.denoiser.requires_grad_(True)
    output = model.denoiser(x_t, t, **given).sample[:, : x_t.shape[1]]
    (output - drawn.noise).square().mean().backward()
    return torch.cat(
        [
            p.grad.flatten() if p.grad is not None else p.new_zeros(p.numel())
            for p in model.denoiser.parameters()
        ]
    )


def test_a_cell_is_the_gradient_of_a_plain_loop(case: Case) -> None:
    model, data = case
    map = measured(model, data, **SMALL, seed=3)
    i, m = 1, 4
    drawn = draw(model, data, m, SMALL["batch_size"], 3, False)
    t = torch.tensor([map.bins[i].start + int(p * len(map.bins[i])) for p in drawn.position])
    gradient = plain_gradient(model, data, drawn, t)
    assert map.gram[i, m, i, m] == pytest.approx(float(gradient.double().square().sum()), rel=1e-4)
    sketch = CountSketch.of(len(gradient), 3)
    total = torch.zeros(sketch.width, dtype=torch.float64)
    sketch.add(total, 0, gradient)
    assert map.sketches is not None
    assert np.allclose(
        map.sketches[i, m], total.numpy(), rtol=1e-3, atol=1e-5 * float(total.abs().max())
    )


def test_hooks_give_the_map_of_the_flat_pass(case: Case) -> None:
    flat, hooks = (measured(*case, **SMALL, mode=mode).gram for mode in ("flat", "hooks"))
    assert np.allclose(hooks, flat, rtol=1e-5, atol=1e-7 * abs(flat).max())


def test_a_sketch_gives_the_map_of_the_exact_gradients(case: Case, name: str) -> None:
    model, data = case
    torch.manual_seed(0)
    wide = model.with_denoiser(
        type(model.denoiser).from_config({**model.config, **WIDER[name]}).eval()
    )
    disturb(wide)
    assert wide.parameters > K
    exact, sketch = (measured(wide, data, **SMALL, engine=engine) for engine in ("exact", "sketch"))
    norms = np.sqrt(np.diagonal(exact.gram.reshape(15, 15)))
    error = (sketch.gram - exact.gram).reshape(15, 15) / np.outer(norms, norms)
    assert 0 < abs(error).max() < 4 / K**0.5


def test_adapters_alone_are_measured(case: Case) -> None:
    """Weights of a LoRA that peft has put in; its B starts at 0, so that A has no gradient."""
    peft = pytest.importorskip("peft")
    model, data = case
    before = model.parameters
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["to_q", "to_v"]), model.denoiser
    )
    map = measured(model, data, **SMALL, params="lora")
    assert map.origin.parameters == model.parameters - before > 0
    assert all(".lora_A." in name or ".lora_B." in name for name in map.layout)
    assert (np.diagonal(map.gram.reshape(15, 15)) > 0).all()


# -- classes ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def dit(tiny_dit: Path) -> Diffusion:
    model = Diffusion.load(tiny_dit)
    disturb(model)
    return model


def test_labels_of_the_data_are_the_condition_and_no_class_where_there_are_none(
    dit: Diffusion, tmp_path: Path
) -> None:
    data = load_images("digits", resolution=16, channels=3, limit=20)
    labels = dit.encode_from(data, [3, 0])[1]["class_labels"]
    assert data.labels is not None and labels.tolist() == [data.labels[3], data.labels[0]]
    assert dit.describe_condition(data) == "classes, 8 of the base's 10 classes"
    np.savez(tmp_path / "bare.npz", images=data.images(range(5)).numpy())
    bare = load_images(tmp_path / "bare.npz", split="all")
    assert dit.encode_from(bare, [1, 2])[1]["class_labels"].tolist() == [10, 10]
    assert (
        dit.describe_condition(bare)
        == "classes, none in the data: every image is of no class (label 10)"
    )
    known, unknown = (
        measured(dit, images, **SMALL, engine="exact").origin.data for images in (data, bare)
    )
    assert known != unknown


def test_labels_beyond_the_classes_are_refused(dit: Diffusion, tmp_path: Path) -> None:
    images = np.zeros((5, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "many.npz", images=images, labels=np.array([0, 1, 2, 3, 11]))
    data = load_images(tmp_path / "many.npz", split="all")
    with pytest.raises(UsageError, match=r"label 11 is not one of the base's 10 classes"):
        dit.describe_condition(data)
    with pytest.raises(UsageError, match=r"label 11 is not one"):
        dit.encode_from(data, [4])


def test_a_unet_of_classes_needs_labels(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = Diffusion.load(make_tiny(num_class_embeds=10))
    map = measured(model, load_images("digits", limit=20), **SMALL)
    assert (
        np.diagonal(map.gram.reshape(15, 15)) > 0
    ).all() and "class_embedding.weight" in map.layout
    np.savez(tmp_path / "bare.npz", images=np.zeros((5, 8, 8), dtype=np.uint8))
    with pytest.raises(UsageError, match="takes one of 10 classes and the data has no labels"):
        measured(model, load_images(tmp_path / "bare.npz", split="all"), **SMALL)


@pytest.mark.parametrize(
    "changes", [{"class_embed_type": "timestep"}, {"class_embed_type": "identity"}]
)
def test_other_embeddings_of_classes_are_refused(
    make_tiny: Callable[..., Path], changes: dict[str, str]
) -> None:
    with pytest.raises(UsageError, match="conditions besides text or a class"):
        Diffusion.load(make_tiny(**changes))


# -- what shares the model with the analysis ---------------------------------------------------------------------------------


def test_experts_of_a_dit_are_trained_weighed_and_judged(dit: Diffusion, tmp_path: Path) -> None:
    from demerge.analysis.experts.responses import Draws, measure_responses
    from demerge.evaluation.metrics.range_losses import range_losses
    from demerge.finetuning import FinetuneOptions
    from demerge.finetuning.trainer import ExpertTraining, Job
    from demerge.merging import MergeSession
    from demerge.statistics.fisher import range_fisher
    from demerge.timesteps import Partition, TimestepRange

    data, two = (
        load_images("digits", resolution=16, channels=3, limit=20),
        Partition.uniform(1000, 2),
    )
    options = FinetuneOptions(
        max_train_steps=2, train_batch_size=2, learning_rate=1e-3, checkpointing_steps=2
    )
    job = Job(dit, data, options, {"base_sha256": dit.sha256})
    run = ExpertTraining(job, TimestepRange(0, 500), tmp_path / "state")
    assert [step.step for step in run.train(lambda: False)] == [1, 2]
    run.finish(tmp_path / "0000-0500")
    expert = Diffusion.load(tmp_path / "0000-0500")
    found = measure_responses(
        Draws(dit, data, two, 5, 5), MergeSession(dit.denoiser, [expert.denoiser])
    )
    assert found.slope.shape == (2, 5, 1) and (found.products > 0).all()
    assert all(value > 0 for value in range_losses(expert, data, two, samples=16).means.values())
    fisher = range_fisher(expert, data, two[0], samples=2).tensors
    assert {name: f.shape for name, f in fisher.items()} == {
        name: p.shape for name, p in expert.denoiser.named_parameters()
    }


def test_a_student_sees_the_classes_its_teacher_sees(dit: Diffusion) -> None:
    """In training mode too: what is dropped is drawn by demerge, once for the whole model, a tenth of the labels."""
    x, t, labels = (
        torch.randn(40, 4, 8, 8),
        torch.full((40,), 500),
        torch.zeros(40, dtype=torch.long),
    )
    with torch.no_grad():
        still = dit.predict(x, t, {"class_labels": labels})
        dit.denoiser.train()
        assert torch.equal(dit.predict(x, t, {"class_labels": labels}), still)
    classes = dit.classes
    assert classes is not None
    assert classes.drop(labels[:4], torch.tensor([0.05, 0.2, 0.099, 0.9])).tolist() == [
        10,
        0,
        10,
        0,
    ]
