"""`--params lora`: gradients of B at the start are the weights' gradients, projected by A."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from demerge.analysis import MeasurementOptions
from demerge.analysis.measurement.backward import Backward
from demerge.analysis.measurement.gradients import Measurement
from demerge.analysis.measurement.run import measure
from demerge.data import load_images
from demerge.diffusion.model import Diffusion
from demerge.errors import UsageError
from demerge.finetuning import FinetuneOptions
from demerge.finetuning.lora import first_A

pytest.importorskip("peft")
TARGETS = ("to_q", "to_out.0", "conv1")
SMALL = MeasurementOptions(
    bins=3, groups=5, batch_size=2, params="lora", lora_rank=2, target_modules=TARGETS
)


@pytest.fixture(scope="module")
def base(tiny: Path) -> Diffusion:
    return Diffusion.load(tiny)


def gradient(model: Diffusion, denoiser: torch.nn.Module, which: str) -> dict[str, torch.Tensor]:
    """The gradient of one loss by the name of each parameter."""
    student = model.with_denoiser(denoiser)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    Backward(denoiser, which, "flat")
    loss = student.loss(x, x.flip(0), torch.tensor([5, 100, 600, 900])).mean()
    chosen = {n: p for n, p in denoiser.named_parameters() if p.requires_grad}
    parts = torch.autograd.grad(loss, list(chosen.values()))
    return dict(zip(chosen, parts, strict=True))


def test_the_gradient_of_B_is_that_of_the_weight_times_A(base: Diffusion) -> None:
    import copy

    measurement = Measurement(base, load_images("digits", limit=20), SMALL)
    found = gradient(base, measurement.denoiser.eval(), measurement.which)
    weights = gradient(base, copy.deepcopy(base.denoiser), r"(to_q|to_out\.0|conv1)\.weight$")
    assert len(found) == len(weights) > 3
    for name, B in found.items():
        module = name.partition(".lora_B.")[0]
        W = weights[f"{module}.weight"]
        A = first_A(torch.empty(2, *W.shape[1:]), SMALL.seed, module)
        torch.testing.assert_close(
            B.flatten(1), W.flatten(1) @ A.flatten(1).T, rtol=1e-3, atol=1e-6
        )


def test_a_map_of_lora_parameters_is_reproducible_and_near_that_of_the_weights(
    base: Diffusion,
) -> None:
    data, before = load_images("digits", limit=30), base.sha256
    first, second = (measure(base, data, SMALL) for _ in range(2))
    assert np.array_equal(first.gram, second.gram)
    assert base.sha256 == before == first.origin.model
    assert (first.origin.lora_rank, first.origin.target_modules) == (2, TARGETS)
    assert all(".lora_B." in name for name in first.layout)
    one = {"bins": 3, "groups": 5, "batch_size": 2}
    whole = measure(base, data, MeasurementOptions(params=r"to_q\.weight$", **one))
    wide = measure(
        base, data, MeasurementOptions(params="lora", lora_rank=64, target_modules=("to_q",), **one)
    )
    a, b = (map.gram.reshape(15, 15) for map in (whole, wide))
    cosines = [g / np.sqrt(np.outer(np.diagonal(g), np.diagonal(g))) for g in (a, b)]
    assert abs(cosines[0] - cosines[1]).max() < 0.2
    assert np.diagonal(b) == pytest.approx(np.diagonal(a) * 64 / (3 * 16), rel=0.4)


def test_the_start_is_that_of_the_finetune(base: Diffusion) -> None:
    from demerge.finetuning.lora import add_lora

    options = FinetuneOptions(lora_rank=2, target_modules=TARGETS, seed=SMALL.seed)
    student = dict(add_lora(base.denoiser, options).named_parameters())
    measured = Measurement(base, load_images("digits", limit=20), SMALL).denoiser
    for name, parameter in measured.named_parameters():
        assert torch.equal(parameter, student[name])


def test_what_cannot_be_is_refused(base: Diffusion) -> None:
    data = load_images("digits", limit=20)
    with pytest.raises(UsageError, match="--layers sketches the layers of the base"):
        Measurement(base, data, MeasurementOptions(params="lora", layers=True))
    with pytest.raises(UsageError, match="no module of the base has this name"):
        Measurement(base, data, MeasurementOptions(params="lora", target_modules=("nowhere",)))
    for changes in ({"lora_rank": 4}, {"target_modules": ("to_q",)}):
        with pytest.raises(UsageError, match="left out without --params lora"):
            MeasurementOptions(**changes)
