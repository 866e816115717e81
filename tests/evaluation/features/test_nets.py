from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from demerge.data import load_images
from demerge.errors import ComparisonError, InputError, NumericalError, UsageError
from demerge.evaluation.evaluator import REAL, Evaluator
from demerge.evaluation.features.nets import FeatureNet, make_feature_net
from demerge.evaluation.features.random_net import RandomNet
from demerge.evaluation.metrics.distances import Reference, evaluate_images, hash_images
from demerge.evaluation.metrics.fid import moments, save_moments
from demerge.evaluation.metrics.lpips import load_lpips
from demerge.evaluation.metrics.range_losses import RangeLosses
from demerge.evaluation.options import EvaluationOptions


def broken(rows: Tensor) -> Tensor:
    return torch.full((len(rows), 64), float("nan"))


def test_a_net_says_what_it_is(digits_net: FeatureNet, noise: Callable[..., Tensor]) -> None:
    assert digits_net.distance_name == "FD[digits-cnn]"
    assert digits_net.protocol["features"] == "digits-cnn"
    assert len(digits_net.sha256) == 64
    assert digits_net(noise(5)).shape == (5, digits_net.dim)


def test_features_do_not_depend_on_the_batch(
    digits_net: FeatureNet, noise: Callable[..., Tensor]
) -> None:
    images, seen = noise(300), []
    rows = digits_net(images, progress=lambda done, total, text: seen.append((done, total, text)))
    torch.testing.assert_close(rows[290:], digits_net(images[290:]))
    assert seen == [(256, 300, "digits-cnn"), (300, 300, "digits-cnn")]


def test_the_random_net_is_the_same_everywhere(noise: Callable[..., Tensor]) -> None:
    net = make_feature_net("random")
    assert net.distance_name == "FD[random]"
    assert net.sha256 == RandomNet().sha256
    assert net.sha256.startswith("f452b2b81a20951f")
    assert net(noise(3, 3, 20)).shape == (3, net.dim)


def test_unknown_nets_and_bad_images_are_refused(digits_net: FeatureNet) -> None:
    with pytest.raises(UsageError, match="release fid_weights"):
        make_feature_net("inception")
    for spec in ("clip", "digits-cnn:/x"):
        with pytest.raises(UsageError, match="unknown"):
            make_feature_net(spec)
    with pytest.raises(UsageError, match="preprocess"):
        EvaluationOptions(preprocess="bogus")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="mixed_precision"):
        EvaluationOptions(mixed_precision="fp8")
    with pytest.raises(UsageError, match="no image"):
        digits_net(torch.empty(0, 1, 8, 8, dtype=torch.uint8))
    hurt = FeatureNet("hurt", "", 64, "", broken, digits_net.to_input, torch.device("cpu"), 8)
    with pytest.raises(NumericalError, match="hurt"):
        hurt(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))


def test_distances_to_a_reference(
    digits_net: FeatureNet, noise: Callable[..., Tensor], tmp_path: Path
) -> None:
    data = load_images("digits", split="test")
    real, other = data.images(range(250)), data.images(range(250, 500))
    reference = Reference.from_images(digits_net, real, name="digits test")
    near, far = (
        evaluate_images(other, reference, digits_net),
        evaluate_images(noise(250), reference, digits_net),
    )
    assert near["fd"] < far["fd"]
    assert near["kid"] < far["kid"]
    assert near["precision"] > 0.8 > far["precision"]
    save_moments(tmp_path / "real.npz", reference.moments)
    alone = evaluate_images(
        other, Reference.from_npz(tmp_path / "real.npz", digits_net), digits_net
    )
    assert alone == {"fd": pytest.approx(near["fd"])}
    with pytest.raises(ComparisonError, match="features"):
        evaluate_images(other, reference, make_feature_net("random"))


def test_features_of_a_reference_are_remembered(
    digits_net: FeatureNet, noise: Callable[..., Tensor], tmp_path: Path
) -> None:
    path, calls = tmp_path / "reference.safetensors", []

    def ask(images: Tensor) -> Reference:
        return Reference.from_images(
            digits_net, images, cache=path, progress=lambda *_: calls.append(1)
        )

    first, second = ask(noise(40)), ask(noise(40))
    assert len(calls) == 1
    assert torch.equal(first.moments.mean, second.moments.mean)
    assert ask(noise(40, seed=1)).fingerprint != first.fingerprint
    assert len(calls) == 2


def test_the_hash_of_images_sees_shape_and_bytes() -> None:
    image = torch.arange(8, dtype=torch.uint8).view(1, 1, 2, 4)
    assert hash_images(image) != hash_images(image.view(1, 1, 4, 2))
    assert hash_images(image) == hashlib.sha256(b"(1, 1, 2, 4)" + bytes(range(8))).hexdigest()


def test_the_evaluator(digits_net: FeatureNet, noise: Callable[..., Tensor]) -> None:
    evaluator = Evaluator(
        digits_net,
        Reference.from_images(digits_net, noise(80)),
        perceptual=load_lpips(),
        perceptual_images=5,
    )
    images = noise(20, seed=1)
    scores = evaluator.score("ties", images, seed=3, kind="merge", base=images[:5])
    assert scores.metrics["drift"] == 0
    assert scores.metrics["diversity"] > 0
    assert scores.protocol.is_rank_deficient
    assert "first 5 images" in scores.protocol.perceptual
    floor = evaluator.of_images(REAL).score("real", noise(25, seed=2), seed=0, kind="real")
    assert (floor.kind, floor.protocol.num_images) == ("real", 25)
    assert floor.protocol != scores.protocol
    with pytest.raises(UsageError, match="the base's images are"):
        evaluator.score("ties", images, seed=3, base=noise(20, 1, 16))


@pytest.mark.parity
def test_numpy_agrees_with_streamed_moments(
    digits_net: FeatureNet, noise: Callable[..., Tensor]
) -> None:
    rows = digits_net(noise(100))
    value = moments(rows.split(30))
    np.testing.assert_allclose(
        value.covariance.numpy(), np.cov(rows.double().numpy(), rowvar=False), atol=1e-12
    )


def test_images_in_an_npz_are_a_reference(digits_net: FeatureNet, tmp_path: Path) -> None:
    """ADM's sample files hold `arr_0`, uint8 [n H W C]."""
    images = load_images("digits", split="test").images(range(200))
    np.savez(tmp_path / "samples.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    own, direct = (
        Reference.from_npz(tmp_path / "samples.npz", digits_net),
        Reference.from_images(digits_net, images),
    )
    assert torch.equal(own.moments.covariance, direct.moments.covariance)
    assert own.features is not None
    assert own.n == 200
    assert repr(own) == "Reference(200 images of samples.npz)"


def test_statistics_of_another_net_are_refused_before_any_image_is_made(
    digits_net: FeatureNet, tmp_path: Path
) -> None:
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048), n=50_000)
    with pytest.raises(InputError, match="moments of 2048 features, and digits-cnn has 64"):
        Reference.from_npz(tmp_path / "stats.npz", digits_net)
    np.savez(
        tmp_path / "stated.npz",
        mu=np.zeros(64),
        sigma=np.eye(64),
        n=9,
        protocol_features="inception",
    )
    with pytest.raises(ComparisonError, match="inception"):
        Reference.from_npz(tmp_path / "stated.npz", digits_net)
    np.savez(tmp_path / "mute.npz", mu=np.zeros(64), sigma=np.eye(64))
    assert "does not say" in Reference.from_npz(tmp_path / "mute.npz", digits_net, n=9).name


def test_reprs_are_short(digits_net: FeatureNet, noise: Callable[..., Tensor]) -> None:
    reference = Reference.from_images(digits_net, noise(40), name="noise")
    assert repr(digits_net) == "FeatureNet(digits-cnn, 64 features, preprocess grey 8x8)"
    assert repr(reference.moments) == "Moments(64 features of 40 images)"
    assert repr(RangeLosses(("0000-0500",), ((0.25, 0.75),))) == "RangeLosses(0000-0500: 0.5)"
