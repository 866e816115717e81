"""A merge as a LoRA: for each linear layer and convolution the best product of rank r of its delta.

    M = U S V^T [m n], the delta as (out, in k k)
    B = U_r sqrt(S_r) [m r]        A = B^+ M = sqrt(S_r) V_r^T [r n]

U and S come from the eigenvectors of the Gram matrix on the short side, M M^T = U S^2 U^T or
M^T M = V S^2 V^T, in float64. Of all products of rank r this one leaves the least energy
|M - B A|^2 out (Eckart, Young 1936). Every tensor has the rank asked for, padded with zeros if it
has less, so that alpha = r holds for all; `lora_alpha` in the metadata says so. What is not a
matrix of a linear layer or convolution (biases, norms, embeddings, tables) has no place in a LoRA;
its energy is lost and counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from demerge.errors import NumericalError, UsageError
from demerge.storage.checkpoint import commit_tensors, modern
from demerge.storage.layout import CheckpointLocation
from demerge.storage.names import flat

BLOCK = 1 << 12  # columns taken to float64 at once
EMBEDDING = re.compile(
    r"(?:^|\.)(?:class_embedding|embedding_table|token_embedding|embed_tokens|pos_embed)\.weight\Z"
)


@dataclass(frozen=True, slots=True)
class Truncated:
    """The energy |delta|^2 of one tensor, and the share of it that its factors hold."""

    energy: float
    share: float


@dataclass(frozen=True, slots=True)
class AdapterSummary:
    """What a LoRA file holds of a merge.

    Attributes:
        tensors: by name, those that were factored.
        lost: by name, the energy of those that have no place in a LoRA.
    """

    path: Path
    rank: int
    tensors: Mapping[str, Truncated]
    lost: Mapping[str, float]

    @property
    def share(self) -> float:
        """The share of the merged delta's energy that the file holds, in [0, 1]."""
        whole = sum(t.energy for t in self.tensors.values()) + sum(self.lost.values())
        return sum(t.energy * t.share for t in self.tensors.values()) / whole

    def document(self) -> dict[str, Any]:
        """Return the summary as JSON values."""
        return {**asdict(self), "path": str(self.path), "share": self.share}


def write_adapter(
    path: Path,
    deltas: Iterable[tuple[str, Tensor]],
    rank: int,
    prefix: str,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> AdapterSummary:
    """Write merged deltas as a LoRA file in the names of diffusers and peft, whole or not at all.

    Args:
        deltas: (the base's tensor name, merged - base [*]), one tensor at a time.
        prefix: unet or transformer; or lora_unet_, whose end says that the names are kohya's.
        dtype: of the factors on disk.

    Raises:
        UsageError: if no linear layer or convolution changes.
        NumericalError: if a delta is not finite.
    """
    is_kohya = prefix.endswith("_")
    down, up = ("lora_down", "lora_up") if is_kohya else ("lora_A", "lora_B")
    factors: dict[str, Tensor] = {}
    tensors: dict[str, Truncated] = {}
    lost: dict[str, float] = {}
    for name, delta in deltas:
        energy = float(delta.double().square().sum())
        if not math.isfinite(energy):
            what = f"the merged delta of {name} is not finite"
            raise NumericalError(what, fix="use smaller weights or another method")
        if energy == 0:
            continue
        if not _is_matrix(name, delta):
            lost[name] = energy
            continue
        A, B, kept = factorize(delta.flatten(1), rank)
        module = modern(name.removesuffix(".weight"))
        stem = f"{prefix}{flat(module)}" if is_kohya else f"{prefix}.{module}"
        factors[f"{stem}.{down}.weight"] = A.view(rank, *delta.shape[1:]).to(dtype)
        factors[f"{stem}.{up}.weight"] = B.view(-1, rank, *(1,) * (delta.ndim - 2)).to(dtype)
        if is_kohya:
            factors[f"{stem}.alpha"] = torch.tensor(float(rank), dtype=dtype)
        tensors[name] = Truncated(energy, min(1.0, kept / energy))
    if not factors:
        what = "no linear layer or convolution changes, so there is no LoRA to write"
        raise UsageError(what, fix="leave --lora-rank out")
    commit_tensors(path, factors, {"format": "pt", "lora_alpha": str(rank), **(metadata or {})})
    return AdapterSummary(path, rank, tensors, lost)


def factorize(M: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return A [rank n], B [m rank], the product nearest to M [m n], in float64, and |B A|^2."""
    if M.shape[0] > M.shape[1]:
        B, A, kept = factorize(M.T, rank)
        return A.T.contiguous(), B.T.contiguous(), kept
    m, n = M.shape
    gram = torch.zeros(m, m, dtype=torch.float64)
    for block in M.split(BLOCK, dim=1):
        gram += block.double() @ block.double().T
    U = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :rank]
    rows = torch.cat([U.T @ block.double() for block in M.split(BLOCK, dim=1)], dim=1)
    S = rows.norm(dim=1)
    root = S.sqrt()
    A, B = torch.zeros(rank, n, dtype=torch.float64), torch.zeros(m, rank, dtype=torch.float64)
    A[: len(S)] = torch.where(root > 0, 1 / root, 0).unsqueeze(1) * rows
    B[:, : len(S)] = U * root
    return A, B, float(S.square().sum())


def name_prefix(place: CheckpointLocation, names: Iterable[str]) -> str:
    """Return unet or transformer, by the denoiser's folder or its tensors."""
    folder = place.component.name if place.component else ""
    if folder.startswith(("unet", "transformer")):
        return "unet" if folder.startswith("unet") else "transformer"
    is_unet = any(name.startswith(("down_blocks.", "up_blocks.")) for name in names)
    return "unet" if is_unet else "transformer"


def _is_matrix(name: str, delta: Tensor) -> bool:
    """Whether a tensor is the weight of a linear layer or a convolution."""
    return name.endswith(".weight") and delta.ndim > 1 and not EMBEDDING.search(name)
