from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from demerge.data import ImageData, load_images
from demerge.errors import UsageError
from demerge.evaluation.features.digits import ASSET, accuracy, load_digits_cnn, preprocess, train
from demerge.evaluation.features.nets import FeatureNet
from demerge.evaluation.metrics.fid import frechet_distance, moments


def everything(data: ImageData) -> tuple[Tensor, Tensor]:
    return data.images(range(len(data))), torch.as_tensor(data.labels)


def test_the_shipped_classifier_knows_the_test_split_and_its_making() -> None:
    images, labels = everything(load_images("digits", split="test"))
    with safe_open(ASSET, "pt") as file:
        facts = json.loads(file.metadata()["demerge"])
    assert accuracy(load_digits_cnn(), images, labels) == pytest.approx(
        facts["test_accuracy"], abs=5e-3
    )
    assert facts["test_accuracy"] > 0.97
    assert facts["train_fingerprint"] == load_images("digits", split="train").fingerprint


def test_a_short_training_beats_chance() -> None:
    images, labels = everything(load_images("digits", split="train"))
    held, held_labels = everything(load_images("digits", split="test"))
    assert accuracy(train(images, labels, epochs=3), held, held_labels) > 0.3


@pytest.mark.slow
def test_training_again_gives_the_same_quality() -> None:
    images, labels = everything(load_images("digits", split="train"))
    held, held_labels = everything(load_images("digits", split="test"))
    again = train(images, labels, seed=0)
    assert accuracy(again, held, held_labels) > 0.97


def test_the_distance_sees_noise_and_a_missing_class(digits_net: FeatureNet) -> None:
    images, labels = everything(load_images("digits", split="train"))
    real = moments([digits_net(images[::2])])
    others, other_labels = images[1::2], labels[1::2]
    floor = frechet_distance(real, moments([digits_net(others)]))
    missing = frechet_distance(real, moments([digits_net(others[other_labels != 3])]))
    noisy = frechet_distance(real, moments([digits_net(torch.randint_like(others, 256))]))
    assert floor < missing < noisy
    assert missing > 1.5 * floor
    assert noisy > 20 * floor


def test_colours_and_sizes_are_brought_to_eight_by_eight() -> None:
    assert preprocess(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 1, 8, 8)
    with pytest.raises(UsageError, match="uint8"):
        preprocess(torch.zeros(2, 1, 8, 8))
