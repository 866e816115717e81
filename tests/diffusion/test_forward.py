"""Forward passes of sampling: autocast, and CUDA graphs that replay what the eager pass computes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from demerge.diffusion.ensemble import routed
from demerge.diffusion.forward import Forward
from demerge.diffusion.model import Diffusion
from demerge.diffusion.options import SamplingOptions
from demerge.diffusion.sampling import ImageSampler, sample
from demerge.errors import NumericalError, UsageError
from demerge.timesteps import Partition

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def model(tiny: Path) -> Diffusion:
    return Diffusion.load(tiny)


def _apart(a: Tensor, b: Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_pass_is_computed_in_the_chosen_dtype(model: Diffusion, precision: str) -> None:
    seen: list[torch.dtype] = []
    model.denoiser.conv_out.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor(500)
    prediction = Forward(model, precision)(x, t)
    assert prediction.dtype == torch.float32
    assert seen == [{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]]
    exact = Forward(model)(x, t)
    assert torch.equal(exact, model.predict(x, t))
    assert not torch.equal(prediction, exact)
    assert float((prediction - exact).abs().max()) < 0.05 * float(exact.abs().max())


def test_images_in_bf16_are_near_those_in_float32(model: Diffusion) -> None:
    exact, half = (
        sample(model, 4, SamplingOptions(steps=4, mixed_precision=precision), seed=1)
        for precision in ("no", "bf16")
    )
    assert 0 < _apart(exact, half) < 20


def test_a_precision_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError, match="mixed_precision is 'fp8'"):
        SamplingOptions(mixed_precision="fp8")


def test_an_overflow_in_fp16_names_the_way_out(model: Diffusion) -> None:
    with torch.no_grad():
        model.denoiser.conv_out.bias.fill_(1e6)
    with pytest.raises(NumericalError) as error:
        sample(model, 1, SamplingOptions(steps=2, mixed_precision="fp16"))
    assert "bf16" in error.value.fix


def test_each_expert_is_asked_alone(model: Diffusion) -> None:
    experts = [copy.deepcopy(model.denoiser) for _ in range(2)]
    with torch.no_grad():
        experts[1].conv_out.bias.add_(1.0)
    forward = Forward(routed(model, Partition.from_cuts(1000, [500]), experts))
    x = torch.randn(3, 1, 8, 8)
    low, high = (forward(x, torch.tensor(t)) - model.predict(x, t) for t in (499, 500))
    assert [round(float(d.mean()), 4) for d in (low, high)] == [0.0, 1.0]


# -- graphs: a stand-in for CUDA's on the CPU, then the real ones ----------------------------------


def test_a_model_that_cannot_be_captured_is_computed_as_before(
    model: Diffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr("demerge.diffusion.forward.CapturedForward", fail)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    sampler = ImageSampler(model, SamplingOptions(steps=3))
    sampler.forward.captures = True
    with pytest.warns(RuntimeWarning, match="cannot be captured as a CUDA graph: op") as warned:
        images = sampler.draw(range(3))
    assert len(warned) == 1
    assert "more" not in str(warned[0].message)
    assert torch.equal(images, sample(model, 3, SamplingOptions(steps=3)))


def test_one_graph_for_each_expert_and_batch_shape(
    model: Diffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, ...]] = []

    def capture(compute: Any, x: Tensor, *_: Any) -> Any:
        made.append(tuple(x.shape))
        return compute

    monkeypatch.setattr("demerge.diffusion.forward.CapturedForward", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    experts = [copy.deepcopy(model.denoiser) for _ in range(2)]
    ensemble = routed(model, Partition.from_cuts(1000, [500]), experts)
    sampler = ImageSampler(ensemble, SamplingOptions(steps=6))
    sampler.forward.captures = True
    images = torch.cat([sampler.draw(range(i, min(i + 4, 10))) for i in (0, 4, 8)])
    assert made == [(4, 1, 8, 8)] * 2 + [(2, 1, 8, 8)] * 2
    assert _apart(images, sample(ensemble, 10, SamplingOptions(steps=6))) <= 1


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["tiny", "tiny_text", "tiny_dit"])
def test_a_graph_draws_the_images_of_the_eager_pass(
    kind: str, precision: str, request: pytest.FixtureRequest
) -> None:
    """Two batch shapes, several batches of each, with guidance where there is a condition."""
    model = Diffusion.load(request.getfixturevalue(kind), device="cuda")
    scale = 1.0 if kind == "tiny" else 4.0
    options = SamplingOptions(steps=5, guidance_scale=scale, mixed_precision=precision)
    captions = ["a cat", "two dogs", "a house"] if kind == "tiny_text" else None
    captured, eager = (ImageSampler(model, options, 3, captions) for _ in range(2))
    eager.forward.captures = False
    for indices in (range(4), range(4, 8), range(8, 10), range(10, 14)):
        assert _apart(captured.draw(indices), eager.draw(indices)) <= 1
    assert captured.forward.captures
    assert len(captured.forward._graphs) == 2


@pytest.mark.gpu
@needs_cuda
def test_each_expert_has_a_graph_of_its_own(tiny: Path) -> None:
    model = Diffusion.load(tiny, device="cuda")
    experts = [copy.deepcopy(model.denoiser) for _ in range(4)]
    with torch.no_grad():
        for number, expert in enumerate(experts):
            expert.conv_out.bias.add_(number / 10)
    ensemble = routed(model, Partition.uniform(1000, 4), experts)
    captured, eager = (ImageSampler(ensemble, SamplingOptions(steps=8)) for _ in range(2))
    eager.forward.captures = False
    for indices in (range(4), range(4, 8)):
        assert _apart(captured.draw(indices), eager.draw(indices)) <= 1
    assert len(captured.forward._graphs) == 4
    x, t = torch.randn(6, 1, 8, 8, device="cuda"), torch.tensor([0, 999, 250, 249, 600, 1])
    mixed = ensemble.predict(x, t.cuda())
    for i in range(6):
        alone = ensemble.predict(x[i : i + 1], int(t[i]))
        assert float((mixed[i] - alone[0]).abs().max()) < 1e-3  # TF32


@pytest.mark.gpu
@needs_cuda
def test_a_module_that_waits_for_the_host_is_computed_without_a_graph(tiny: Path) -> None:
    model = Diffusion.load(tiny, device="cuda")
    expected = sample(model, 2, SamplingOptions(steps=3))
    model.denoiser.conv_in.register_forward_hook(
        lambda *call: call[2] * float(call[2][0, 0, 0, 0] > -1e9)
    )
    with pytest.warns(RuntimeWarning, match="cannot be captured"):
        images = sample(model, 2, SamplingOptions(steps=3))
    assert _apart(images, expected) <= 1
