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
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from demerge.errors import NumericalError, UsageError
from demerge.lora import NoBase
from demerge.storage.checkpoint import canonical, commit_tensors, denoiser_of, has_original, modern
from demerge.storage.layout import CheckpointLocation
from demerge.storage.names import NO_FAMILY, Family, find_family, flat
from demerge.storage.names.tensors import rename_rows

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


@dataclass(frozen=True, slots=True)
class Naming:
    """How a LoRA file names modules.

    Attributes:
        stem: with {} for the module.
        to_original: whether its modules are those of the original code or those of diffusers; None
            for those of the base.
        is_kohya: whether names are flat, and each module has an alpha.
        family: the names that the base has.
    """

    stem: str
    to_original: bool | None = None
    is_kohya: bool = False
    family: Family = NO_FAMILY

    @classmethod
    def of(cls, lora_format: str, base: Mapping[str, Any], place: CheckpointLocation) -> Naming:
        """Return the names of a format of `MergeOptions` for the weights of a base.

        Raises:
            UsageError: if the names of the original code are not known.
        """
        family = find_family(map(canonical, base))
        auto = base.prefix if isinstance(base, NoBase) else ""
        if lora_format == "auto" and auto.endswith("_"):
            return cls(f"{auto}{{}}", is_kohya=True)
        if lora_format == "auto" and auto:
            return cls(f"{auto}.{{}}")
        is_original = has_original(family, base)
        if lora_format == "comfy" and family is NO_FAMILY:
            what = "the names of this model in ComfyUI are not known"
            raise UsageError(what, fix="give --lora-format diffusers")
        if lora_format == "kohya":
            is_original = family.has_kohya_original and family is not NO_FAMILY
            return cls("lora_unet_{}", is_original, is_kohya=True, family=family)
        if lora_format == "comfy" or (lora_format == "auto" and is_original):
            return cls("diffusion_model.{}", to_original=True, family=family)
        return cls(f"{name_prefix(place, base)}.{{}}", to_original=False, family=family)

    @property
    def factors(self) -> tuple[str, str]:
        """What the two factors are called."""
        is_plain = not (self.to_original or self.is_kohya)
        return ("lora_A", "lora_B") if is_plain else ("lora_down", "lora_up")

    def module(self, name: str) -> str:
        """Return the name of a weight's module in the file.

        Raises:
            UsageError: if it has none in the original code that is known.
        """
        module = modern(name.removesuffix(".weight"))
        if self.to_original and not self.family.to_diffusers(module):
            what = f"the name of {module} in the original code of {self.family.name} is not known"
            raise UsageError(what, fix="give --lora-format diffusers")
        return self.stem.format(flat(module) if self.is_kohya else module)


def rename_deltas(
    deltas: Iterable[tuple[str, Tensor]], shapes: Mapping[str, Sequence[int]], naming: Naming
) -> Iterator[tuple[str, Tensor]]:
    """Yield deltas under the names of a LoRA file, by rows if the layout is another.

    Args:
        deltas: (tensor of the base, delta), one at a time; one that is missing is 0.
        shapes: of all tensors of the base.

    Raises:
        UsageError: if the base lacks a part of a joined matrix.
    """
    outside = shapes.keys() - denoiser_of(shapes).keys()
    inner = {name: name if name in outside else canonical(name) for name in shapes}
    if naming.to_original is None:
        yield from ((inner[name], delta) for name, delta in deltas)
        return
    family = naming.family
    plain = {name: _dotted(inner[name], family) for name in shapes}
    sizes = {plain[name]: tuple(shape) for name, shape in shapes.items()}
    try:
        rows = rename_rows(sizes, family, to_original=naming.to_original)
    except ValueError as error:
        what = f"the LoRA has no names of this kind: {error}"
        raise UsageError(what, fix="use another --lora-format") from error
    targets: dict[str, list[str]] = {}  # of each source
    for target, sources in rows.items():
        for source in dict.fromkeys(source for source, _ in sources):
            targets.setdefault(source, []).append(target)
    held: dict[str, Tensor] = {}

    def make(target: str) -> Tensor:
        parts = []
        for source, span in rows[target]:
            delta = held[source] if source in held else torch.zeros(sizes[source])
            parts.append(delta[slice(*span)] if span else delta)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    for name, delta in deltas:
        held[plain[name]] = delta
        for target in targets[plain[name]]:
            needed = {source for source, _ in rows[target]}
            if needed <= held.keys():
                yield target, make(target)
                if len(needed) > 1 or target == targets[plain[name]][-1]:
                    held = {source: held[source] for source in held if source not in needed}
    for target in dict.fromkeys(target for source in held for target in targets[source]):
        yield target, make(target)


def _dotted(name: str, family: Family) -> str:
    """Return the name of a weight with dots, which one of kohya's modules does not have."""
    module = name.removesuffix(".weight")
    return name if "." in module else f"{family.dotted(module)}{name.removeprefix(module)}"


def write_adapter(
    path: Path,
    deltas: Iterable[tuple[str, Tensor]],
    rank: int,
    naming: Naming,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
    outside: Container[str] = (),
) -> AdapterSummary:
    """Write merged deltas as a LoRA file, whole or not at all.

    Args:
        deltas: (tensor's name, merged - base [*]), one tensor at a time; see `rename_deltas`.
        outside: tensors that are not the denoiser's, which have no place in the file.
        dtype: of the factors on disk.

    Raises:
        UsageError: if no linear layer or convolution changes.
        NumericalError: if a delta is not finite.
    """
    down, up = naming.factors
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
        if name in outside or not _is_matrix(name, delta):
            lost[name] = energy
            continue
        A, B, kept = factorize(delta.flatten(1), rank)
        stem = naming.module(name)
        factors[f"{stem}.{down}.weight"] = A.view(rank, *delta.shape[1:]).to(dtype)
        factors[f"{stem}.{up}.weight"] = B.view(-1, rank, *(1,) * (delta.ndim - 2)).to(dtype)
        if naming.is_kohya:
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
    is_unet = find_family(map(canonical, names)).name == "UNet"
    return "unet" if is_unet else "transformer"


def _is_matrix(name: str, delta: Tensor) -> bool:
    """Whether a tensor is the weight of a linear layer or a convolution."""
    return name.endswith(".weight") and delta.ndim > 1 and not EMBEDDING.search(name)
