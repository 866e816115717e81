"""How the tensors of an output are stored: in a dtype, or in the base's scaled fp8 with own scales.

    codes = round(W / s),   s = 2^k s_base,   k >= 0 the least for which no code is too large

A scale changes by a power of two alone. float8 then keeps the relative precision of its codes: what
a merge leaves unchanged keeps its value to the bit, and k = 0 keeps the base's scale. Finding k
takes a pass over the merge before it is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from demerge.merging.engine.job import MergedChunk, MergeJob
from demerge.merging.engine.validation import round_chunk
from demerge.storage.checkpoint import Checkpoint
from demerge.storage.quantised import METADATA
from demerge.storage.scaled import Scaled, decoded

FITS = 1 + 2.0**-10  # times the largest code, which rounding in float32 may exceed
Squares = tuple[float, float, float]


@dataclass(frozen=True)
class Storage:
    """What is needed to round a chunk, and the tensors of the output that are not the model's.

    Attributes:
        dtypes: of each tensor of the model.
        scaled: the weights that are stored in scaled fp8, with the scales that they get.
        beside: scales and markers by their keys.
        metadata: what the base's file says of its scaled fp8.
    """

    dtypes: Mapping[str, torch.dtype]
    scaled: Mapping[str, Scaled] = field(default_factory=dict)
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, job: MergeJob, dtypes: Mapping[str, torch.dtype]) -> Storage:
        """Return how a merge is stored; scaled fp8 takes a pass to find the largest values."""
        base = job.base
        weights: dict[str, Scaled] = {}
        for name, tensor in base.items():
            if isinstance(tensor, Scaled) and dtypes.get(name) == tensor.codes.dtype:
                weights[name] = tensor
        if not weights or not isinstance(base, Checkpoint):
            return cls(dtypes)
        exponents = _find_exponents(job, weights)
        scaled = {name: tensor.grown(exponents[name]) for name, tensor in weights.items()}
        beside = base.storage({name: tensor.scale for name, tensor in scaled.items()})
        metadata = {key: text for key, text in base.metadata.items() if key == METADATA}
        return cls(dtypes, scaled, beside, metadata)

    def round(self, name: str, start: int, chunk: Tensor) -> Tensor:
        """Round a chunk [n] of a tensor to what is stored, on the CPU.

        Raises:
            NumericalError: if a value is too large.
        """
        if name in self.scaled:
            chunk = self.scaled[name].over(chunk.cpu(), start)
        return round_chunk(chunk, self.dtypes[name], name)

    def squares(self, name: str, stored: Tensor, done: MergedChunk) -> Squares:
        """Return sums of squares of merged, merged - base and stored - merged, of fp8."""
        if stored.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
            return 0.0, 0.0, 0.0
        merged, base = done.merged.cpu().double(), done.block.base.reshape(-1).cpu().double()
        values = decoded(stored).double()
        if name in self.scaled:
            values = self.scaled[name].times(values, done.start)
        of_merged, of_delta, of_error = (
            float(t.square().sum()) for t in (merged, merged - base, values - merged)
        )
        return of_merged, of_delta, of_error


def _find_exponents(job: MergeJob, weights: Mapping[str, Scaled]) -> dict[str, Tensor]:
    """Return k for each scale of each weight; 0 for those that are not merged."""
    largest = {name: torch.zeros(len(tensor.scale)) for name, tensor in weights.items()}

    def measure(name: str, done: MergedChunk) -> tuple[str, Tensor]:
        tensor = weights[name]
        return name, tensor.largest(tensor.over(done.merged.cpu(), done.start).float(), done.start)

    merged = [name for name in weights if name in set(job.floating)]
    for name, code in job.stream(merged, measure):
        largest[name] = largest[name].maximum(code)
    exponents = {}
    for name, tensor in weights.items():
        limit = torch.finfo(tensor.codes.dtype).max * FITS
        exponents[name] = (largest[name] / limit).log2().ceil().clamp(min=0)
    return exponents
