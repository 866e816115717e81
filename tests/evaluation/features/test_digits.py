"""The shipped classifier of digits; `python test_digits.py FILE` trains it again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from demerge.data import ImageData, load_images
from demerge.errors import UsageError
from demerge.evaluation.features.digits import ASSET, DigitsCNN, load_digits_cnn, preprocess
from demerge.evaluation.features.nets import FeatureNet
from demerge.evaluation.metrics.fid import frechet_distance, moments
from demerge.randomness import generator, permutation
from demerge.storage.atomic import commit_bytes


def train(
    images: Tensor, labels: Tensor, *, seed: int = 0, epochs: int = 80, batch: int = 64
) -> DigitsCNN:
    """Train on images uint8 [n 1 8 8] with labels [n], shifted by one pixel at random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DigitsCNN()
    x, steps = preprocess(images), epochs * -(-len(images) // batch)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        for rows in torch.tensor(permutation(len(x), seed, "digits-order", epoch)).split(batch):
            dy, dx = generator(seed, "digits-shift", epoch, int(rows[0])).integers(-1, 2, 2)
            padded = F.pad(x[rows], (1, 1, 1, 1), value=-1.0)
            shifted = padded[:, :, 1 + dy : 9 + dy, 1 + dx : 9 + dx]
            optimizer.zero_grad()
            F.cross_entropy(net(shifted), labels[rows], label_smoothing=0.05).backward()
            optimizer.step()
            schedule.step()
    return net.eval().requires_grad_(False)


@torch.inference_mode()
def accuracy(net: DigitsCNN, images: Tensor, labels: Tensor) -> float:
    """Return the share of images uint8 [n 1 8 8] that get their label [n]."""
    return float((net(preprocess(images)).argmax(1) == labels).double().mean())


def train_asset(path: str | Path, *, seed: int = 0) -> float:
    """Train on the train split, write the classifier, and return its accuracy on the test split."""
    data = {split: load_images("digits", split=split) for split in ("train", "test")}
    pixels = {split: each.images(range(len(each))) for split, each in data.items()}
    labels = {split: torch.as_tensor(each.labels) for split, each in data.items()}
    net = train(pixels["train"], labels["train"], seed=seed)
    share = accuracy(net, pixels["test"], labels["test"])
    facts = {
        "made_by": "python tests/evaluation/features/test_digits.py",
        "seed": seed,
        "train_images": len(pixels["train"]),
        "train_fingerprint": data["train"].fingerprint,
        "test_accuracy": round(share, 4),
    }
    commit_bytes(Path(path), save(net.state_dict(), metadata={"demerge": json.dumps(facts)}))
    return share


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


if __name__ == "__main__":
    sys.stdout.write(f"test accuracy {train_asset(sys.argv[1]):.4f}\n")
