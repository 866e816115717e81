"""The small classifier behind `FD[digits-cnn]`: 64 features before the last linear map.

It knows scikit-learn's 8 x 8 digits, ships in the package, and is trained again, on the train split
alone, by

    python -m demerge.evaluation.features.digits demerge/assets/digits-cnn.safetensors

What it is good for: pure noise lies at a distance of 65 from the train split, a blur over 3 x 3
pixels at 90, a missing class at 3.4, the test split at 0.74. What it cannot see: faint noise
(standard deviation 16 of 255) lies at 0.40.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from demerge.errors import InputError
from demerge.randomness import generator, permutation
from demerge.reporting.images import check_uint8
from demerge.storage.atomic import commit_bytes

ASSET = Path(__file__).resolve().parents[2] / "assets" / "digits-cnn.safetensors"
DIM = 64
CLASSES = 10


class DigitsCNN(nn.Module):
    """Four 3 x 3 convolutions; images [B 1 8 8] in [-1, 1] -> features [B 64] -> logits [B 10]."""

    def __init__(self) -> None:
        super().__init__()
        first = (nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))
        second = (nn.Conv2d(32, DIM, 3, padding=1), nn.ReLU(), nn.Conv2d(DIM, DIM, 3, padding=1))
        layers = (*first, nn.ReLU(), nn.MaxPool2d(2), *second, nn.ReLU())
        self.convolutions = nn.Sequential(*layers)
        self.head = nn.Linear(DIM, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        """Return the features [B 64] of images [B 1 8 8]."""
        maps: Tensor = self.convolutions(x)
        return maps.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [B 10] of images [B 1 8 8]."""
        logits: Tensor = self.head(self.features(x))
        return logits


def preprocess(images: Tensor) -> Tensor:
    """Turn images uint8 [B C H W] into [B 1 8 8] in [-1, 1]; colours are averaged."""
    check_uint8(images, channels=())
    grey = images.float().mean(1, keepdim=True) / 127.5 - 1
    if grey.shape[2:] == (8, 8):
        return grey
    return F.interpolate(grey, (8, 8), mode="bilinear", antialias=True)


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


def load_digits_cnn(path: str | Path = ASSET) -> DigitsCNN:
    """Load the classifier, by default the one that ships in the package."""
    net = DigitsCNN().eval().requires_grad_(False)
    try:
        net.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        fix = f"train it: python -m demerge.evaluation.features.digits {path}"
        raise InputError(f"{path}: not the digits classifier: {error}", fix=fix) from error
    return net


def train_asset(path: str | Path, *, seed: int = 0) -> float:
    """Train on the train split, write the classifier, and return its accuracy on the test split."""
    from demerge.data import load_images

    data = {split: load_images("digits", split=split) for split in ("train", "test")}
    pixels = {split: each.images(range(len(each))) for split, each in data.items()}
    labels = {split: torch.as_tensor(each.labels) for split, each in data.items()}
    net = train(pixels["train"], labels["train"], seed=seed)
    share = accuracy(net, pixels["test"], labels["test"])
    facts = {
        "made_by": "python -m demerge.evaluation.features.digits",
        "seed": seed,
        "train_images": len(pixels["train"]),
        "train_fingerprint": data["train"].fingerprint,
        "test_accuracy": round(share, 4),
    }
    commit_bytes(Path(path), save(net.state_dict(), metadata={"demerge": json.dumps(facts)}))
    return share


if __name__ == "__main__":
    sys.stdout.write(f"test accuracy {train_asset(sys.argv[1]):.4f}\n")
