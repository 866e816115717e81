"""Input Gram matrices: E[x x^T] of each linear layer and 1 x 1 convolution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from demerge.data import ImageData, load_images
from demerge.diffusion.model import Diffusion
from demerge.errors import UsageError
from demerge.statistics import range_gram
from demerge.statistics.examples import Sampler
from demerge.statistics.gram import gram_layers, matrix_inputs
from demerge.storage.checkpoint import Checkpoint
from demerge.timesteps import TimestepRange

SPAN = TimestepRange(200, 300)


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_images("digits", split="train", limit=8)


def test_is_the_mean_of_outer_products_one_position_at_a_time(tiny: Path, data: ImageData) -> None:
    model = Diffusion.load(tiny)
    found = range_gram(model, data, SPAN, samples=10, seed=1)
    name = "mid_block.attentions.0.to_q.weight"
    seen: list[torch.Tensor] = []
    layer = model.denoiser.get_submodule(name.removesuffix(".weight"))
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    for _, example in Sampler(model, data, SPAN, 10, 1).batches(1):
        with torch.no_grad():
            model.predict(example.x_t, example.t)
    inputs = torch.cat([x.flatten(0, -2) for x in seen])
    total = torch.zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float64)
    for x in inputs:
        total += torch.outer(x, x)
    assert found.facts["inputs"][name] == len(inputs) == 10 * 16
    torch.testing.assert_close(
        found.tensors[name].double(), total / len(inputs), rtol=1e-5, atol=1e-6
    )


def test_every_matrix_is_symmetric_positive_and_named_like_its_weight(
    tiny_text: Path, image_folder: Path
) -> None:
    model, captioned = (
        Diffusion.load(tiny_text),
        load_images(image_folder, resolution=16, channels=3),
    )
    found, weights = range_gram(model, captioned, SPAN, samples=2), Checkpoint.open(tiny_text)
    names = set(found.tensors)
    assert any("attn2.to_k" in name for name in names), (
        "layers that the attention's processor calls"
    )
    assert any("proj_in" in name for name in names), "1 x 1 convolutions"
    assert not any("resnets.0.conv1" in name for name in names)
    for name, gram in found.tensors.items():
        assert gram.dtype == torch.float32 and torch.equal(gram, gram.T)
        assert gram.shape == (weights[name].shape[1],) * 2
        assert float(torch.linalg.eigvalsh(gram.double())[0]) >= -1e-5 * float(
            gram.diagonal().max()
        )


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(3, 2), (4, 5, 3)),
        (nn.Conv2d(3, 2, 1), (4, 3, 5, 6)),
        (nn.Conv2d(3, 2, 1, stride=2), (4, 3, 5, 6)),
        (nn.Conv1d(3, 2, 1), (4, 3, 5)),
    ],
)
def test_rows_are_the_inputs_of_the_matrix_product(layer: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    out = layer(x) if isinstance(layer, nn.Linear) else layer(x).movedim(1, -1)
    product = matrix_inputs(layer, x) @ layer.weight.view(2, 3).T + layer.bias
    torch.testing.assert_close(product, out.reshape(-1, 2))


def test_only_layers_that_are_one_matrix_have_a_gram() -> None:
    net = nn.ModuleDict(
        {
            "linear": nn.Linear(3, 3),
            "pixel": nn.Conv2d(4, 4, 1),
            "kernel": nn.Conv2d(4, 4, 3, padding=1),
            "grouped": nn.Conv2d(4, 4, 1, groups=2),
            "padded": nn.Conv2d(4, 4, 1, padding=1),
            "same": nn.Conv2d(4, 4, 1, padding="same"),
            "norm": nn.GroupNorm(2, 4),
        }
    )
    assert list(gram_layers(net)) == ["linear.weight", "pixel.weight", "same.weight"]
    assert list(gram_layers(nn.Linear(2, 2))) == ["weight"]


def test_a_layer_called_twice_sums_both_and_one_never_called_is_left_out(
    tiny: Path, data: ImageData
) -> None:
    class Twice(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.idle = inner, nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.inner(x) + self.inner(input=2 * x)
            return y

    model = Diffusion.load(tiny)
    once = range_gram(model, data, SPAN, samples=2)
    model.denoiser.time_embedding.linear_1 = Twice(model.denoiser.time_embedding.linear_1)
    twice = range_gram(model, data, SPAN, samples=2)
    name = "time_embedding.linear_1.weight"
    inner = "time_embedding.linear_1.inner.weight"
    assert (once.facts["inputs"][name], twice.facts["inputs"][inner]) == (2, 4)
    torch.testing.assert_close(twice.tensors[inner], once.tensors[name] * 5 / 2)
    assert twice.facts["never called"] == ["time_embedding.linear_1.idle.weight"]
    assert "time_embedding.linear_1.idle.weight" not in twice.tensors


def test_hooks_are_gone_and_the_model_is_as_it_was(tiny: Path, data: ImageData) -> None:
    model = Diffusion.load(tiny)
    before = model.sha256
    first, second = (range_gram(model, data, SPAN, samples=3).tensors for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert model.sha256 == before
    assert not any(part._forward_pre_hooks for part in model.denoiser.modules())


def test_a_model_without_such_layers_is_refused(
    tiny: Path, data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("demerge.statistics.gram.gram_layers", lambda _: {})
    with pytest.raises(UsageError, match="no linear layer"):
        range_gram(Diffusion.load(tiny), data, SPAN, samples=1)
