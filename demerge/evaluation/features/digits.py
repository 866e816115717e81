"""The small classifier behind `FD[digits-cnn]`: scikit-learn's 8 x 8 digits, 64 features before the last linear map.

It ships in the package and is made again, on the train split alone, by

    python -m demerge.evaluation.features.digits demerge/assets/digits-cnn.safetensors

What it is good for: pure noise lies at a distance of 65 from the train split, a blur over 3 x 3 pixels at 90, a missing
class at 3.4, the test split at 0.74. What it cannot see: faint noise (standard deviation 16 of 255) lies at 0.40.
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

from demerge.errors import InputError, UsageError
from demerge.randomness import generator, permutation
from demerge.storage.atomic import commit_bytes

ASSET = Path(__file__).resolve().parents[2] / "assets" / "digits-cnn.safetensors"
DIM = 64
CLASSES = 10


class DigitsCNN(nn.Module):
    """Four 3 x 3 convolutions; images [B 1 8 8] in [-1, 1] -> features [B 64] -> logits [B 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            *(
                nn.Conv2d(1, 32, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(32, 32, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ),
            *(
                nn.Conv2d(32, DIM, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(DIM, DIM, 3, padding=1),
                nn.ReLU(),
            ),
        )
        self.head = nn.Linear(DIM, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        """Return the features [B 64] of images [B 1 8 8]."""
        maps: Tensor = self.convolutions(x)
        return maps.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [B 10] of images [B 1 8 8]."""
        logits: Tensor = self.head(self.features(x))
        return logits


def prepare(images: Tensor) -> Tensor:
    """Turn images uint8 [B C H W] into [B 1 8 8] in [-1, 1]; colours are averaged, other sizes resized.

    Raises:
        UsageError: where the images are no uint8 [B C H W].
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise UsageError(
            f"images are {images.dtype} {list(images.shape)}, expected uint8 [B C H W]",
            fix="convert them",
        )
    grey = images.float().mean(1, keepdim=True) / 127.5 - 1
    return (
        grey
        if grey.shape[2:] == (8, 8)
        else F.interpolate(grey, (8, 8), mode="bilinear", antialias=True)
    )


def train(
    images: Tensor, labels: Tensor, *, seed: int = 0, epochs: int = 80, batch: int = 64
) -> DigitsCNN:
    """Train on images uint8 [n 1 8 8] with labels [n]: AdamW, cosine learning rate from 2e-3, shifts by one pixel."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DigitsCNN()
    x, steps = prepare(images), epochs * -(-len(images) // batch)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        for rows in torch.tensor(permutation(len(x), seed, "digits-order", epoch)).split(batch):
            dy, dx = generator(seed, "digits-shift", epoch, int(rows[0])).integers(-1, 2, 2)
            shifted = F.pad(x[rows], (1, 1, 1, 1), value=-1.0)[
                :, :, 1 + dy : 9 + dy, 1 + dx : 9 + dx
            ]
            optimizer.zero_grad()
            F.cross_entropy(net(shifted), labels[rows], label_smoothing=0.05).backward()
            optimizer.step()
            schedule.step()
    return net.eval().requires_grad_(False)


@torch.inference_mode()
def accuracy(net: DigitsCNN, images: Tensor, labels: Tensor) -> float:
    """Return the share of images uint8 [n 1 8 8] that get their label [n]."""
    return float((net(prepare(images)).argmax(1) == labels).double().mean())


def load_digits_cnn(path: Path = ASSET) -> DigitsCNN:
    """Load the classifier, by default the one that ships in the package.

    Raises:
        InputError: where the file holds other tensors.
    """
    net = DigitsCNN()
    try:
        net.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        fix = f"make it: python -m demerge.evaluation.features.digits {path}"
        raise InputError(f"{path}: not the digits classifier: {error}", fix=fix) from error
    return net.eval().requires_grad_(False)


def make(path: Path, *, seed: int = 0) -> float:
    """Train on the train split, write the classifier and how it was made, return its accuracy on the test split."""
    from demerge.data import load_images

    splits = {split: load_images("digits", split=split) for split in ("train", "test")}
    pixels = {split: data.images(range(len(data))) for split, data in splits.items()}
    labels = {split: torch.as_tensor(data.labels) for split, data in splits.items()}
    net = train(pixels["train"], labels["train"], seed=seed)
    reached = accuracy(net, pixels["test"], labels["test"])
    facts = {
        "made_by": "python -m demerge.evaluation.features.digits",
        "seed": seed,
        "train_images": len(pixels["train"]),
        "train_fingerprint": splits["train"].fingerprint,
        "test_accuracy": round(reached, 4),
    }
    commit_bytes(path, save(net.state_dict(), metadata={"demerge": json.dumps(facts)}))
    return reached


if __name__ == "__main__":
    sys.stdout.write(f"test accuracy {make(Path(sys.argv[1])):.4f}\n")
