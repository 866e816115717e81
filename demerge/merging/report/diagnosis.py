"""What a merge did to its experts, by tensor and by block, seen in the pass that writes it.

    |tau_i|           length of each task vector
    cos(tau_i, tau_j) how alike two of them are; 0 with a task vector of 0
    sign conflict     share of the entries that some expert moves which experts move both ways
    kept              share of the entries that differ from the base in the result
    survived          share of those that still do in the dtype that is stored
    |merged - base|   length of the merged task vector
    effective rank    exp(-sum_k p_k log p_k), p = s / sum s, s the singular values of
                      [tau_1 .. tau_K], the [K D] matrix of the task vectors: how many independent
                      directions the experts take, 1 to K (0 for no change)

All follow from sums over entries, taken in float64 chunk by chunk and added in the order of the
file, so that they do not depend on the number of workers. A block's are those of its tensors taken
as one vector.

Papers: effective rank (Roy and Vetterli, EUSIPCO 2007), sign conflict (TIES, arXiv 2306.01708).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from demerge.merging.blocks import block_of, group_by_block
from demerge.merging.engine.job import MergedChunk
from demerge.merging.methods.shared.geometry import cosines, norms, row_grams

FORMAT = "demerge.diagnosis/1"
DIAGNOSIS = "diagnosis.json"  # the numbers, in the folder of a report


@dataclass(frozen=True, slots=True)
class Sums:
    """What the entries of a chunk, a tensor or a block add up to.

    Attributes:
        gram: inner products of the task vectors [K K], float64.
        moved: entries that some expert moves; `opposed`: those that experts move both ways.
        changed: entries in which the result differs from the base.
        survived: those that still do once rounded.
        squares: sum of squares of merged - base.
    """

    name: str
    entries: int
    gram: Tensor
    moved: int
    opposed: int
    changed: int
    survived: int
    squares: float

    def __add__(self, other: Sums) -> Sums:
        names = [field.name for field in fields(self)[1:]]
        return Sums(self.name, *(getattr(self, name) + getattr(other, name) for name in names))

    @property
    def norms(self) -> list[float]:
        """|tau_i| [K]."""
        return [float(norm) for norm in norms(self.gram)]

    @property
    def cosines(self) -> list[list[float]]:
        """cos(tau_i, tau_j) [K K]."""
        matrix: list[list[float]] = cosines(self.gram).tolist()
        return matrix

    @property
    def distance(self) -> float:
        """|merged - base|."""
        distance: float = self.squares**0.5
        return distance

    @property
    def effective_rank(self) -> float:
        """The effective rank of the task vectors."""
        return effective_rank(self.gram)

    @property
    def shares(self) -> dict[str, float]:
        """The shares that the module's table names."""
        return {
            "sign_conflict": self.opposed / self.moved if self.moved else 0.0,
            "kept": self.changed / self.entries if self.entries else 0.0,
            "survived": self.survived / self.changed if self.changed else 1.0,
        }

    def document(self) -> dict[str, Any]:
        """Return the numbers as JSON values."""
        return {
            "name": self.name,
            "entries": self.entries,
            "norms": self.norms,
            "cosines": self.cosines,
            **self.shares,
            "distance": self.distance,
            "effective_rank": self.effective_rank,
        }


def effective_rank(gram: Tensor) -> float:
    """Return the effective rank of vectors from their Gram matrix [K K]; 0 if all are 0."""
    s = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    p = s[s > 0] / s.sum()
    return float(torch.exp(-(p * p.log()).sum())) if len(p) else 0.0


def sum_chunk(name: str, done: MergedChunk, changed: int, survived: int) -> Sums:
    """Sum up a chunk that is written.

    Args:
        changed: entries in which the merge differs from the base.
        survived: those that still do once stored.
    """
    deltas = done.block.deltas.reshape(len(done.block.deltas), -1)
    up, down = (deltas > 0).any(0), (deltas < 0).any(0)
    step = done.merged.double() - done.block.base.reshape(-1).double()
    return Sums(
        name=name,
        entries=deltas.shape[1],
        gram=row_grams(deltas.unsqueeze(1))[0].cpu(),
        moved=int((up | down).count_nonzero()),
        opposed=int((up & down).count_nonzero()),
        changed=changed,
        survived=survived,
        squares=float(step.square().sum()),
    )


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What a merge did: over the model, in each block from input to output, and in each tensor."""

    experts: Sequence[str]
    model: Sums
    blocks: Sequence[Sums]
    tensors: Sequence[Sums]

    @classmethod
    def of(cls, chunks: Sequence[Sums], experts: Sequence[str]) -> Diagnosis:
        """Add up the chunks, in their order; at least one is given."""
        by_tensor: dict[str, list[Sums]] = {}
        for chunk in chunks:
            by_tensor.setdefault(chunk.name, []).append(chunk)
        tensors = {name: _total(parts, name) for name, parts in by_tensor.items()}
        blocks = []
        for block, names in group_by_block(list(tensors)).items():
            blocks.append(_total([tensors[n] for n in names], block))
        rows = list(tensors.values())
        return cls(experts, _total(rows, "model"), blocks, rows)

    def document(self) -> dict[str, Any]:
        """Return all numbers as JSON values."""
        return {
            "format": FORMAT,
            "experts": list(self.experts),
            "model": self.model.document(),
            "blocks": [sums.document() for sums in self.blocks],
            "tensors": [{"block": block_of(s.name), **s.document()} for s in self.tensors],
        }


def _total(parts: Sequence[Sums], name: str) -> Sums:
    return replace(reduce(Sums.__add__, parts), name=name)
