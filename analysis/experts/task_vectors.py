"""Task vectors tau_k = theta_k - theta_0 of K experts: how long, how alike, how opposed in sign.

    norm_lk   = |tau_k| on tensor l
    cosine_kn = <tau_k, tau_n> / (|tau_k| |tau_n|)
    sign_kn   = share of the energy sum_p |tau_kp tau_np| at coordinates where the signs differ
    rank      = effective rank of [tau_1 .. tau_K], as demerge.merging.report.diagnosis defines it: 1 (all parallel) to K

Each is given for tensors, for layers (`by_layer`: a module with all its own tensors), for blocks of the denoiser (`by_block`)
and for the whole; an expert stands for its range, so a table of norms is one of layers by ranges. Tensors are
taken one by one, so lazy mappings (a `Checkpoint`) are never held whole. Sums run in float64.

Papers: task arithmetic (arXiv 2212.04089), sign conflict (TIES, arXiv 2306.01708).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from demerge.conflict import Array, layer_of
from demerge.errors import InputError, UsageError
from demerge.merging.engine.validation import holds_deltas
from demerge.merging.recipe.blocks import grouped
from demerge.merging.report.diagnosis import effective_rank


@dataclass(frozen=True, slots=True, eq=False)
class TaskVectors:
    """What K task vectors have to do with each other.

    Attributes:
        names: the L floating-point tensors.
        gram: inner products on each tensor [L K K].
        opposed: sum_p |tau_kp tau_np| where signs differ, on each tensor [L K K].
        energy: sum_p |tau_kp tau_np| [L K K].
    """

    names: tuple[str, ...]
    gram: Array
    opposed: Array
    energy: Array

    @property
    def norms(self) -> Array:
        """|tau_k| on each tensor, [L K]."""
        norms: Array = np.sqrt(np.einsum("lkk->lk", self.gram))
        return norms

    @property
    def effective_ranks(self) -> Array:
        """The effective rank of the K task vectors on each tensor, [L]; 0 where none of them moves."""
        return np.array([effective_rank(torch.from_numpy(gram)) for gram in self.gram])

    @property
    def effective_rank(self) -> float:
        """The effective rank of the whole task vectors."""
        return effective_rank(torch.from_numpy(self.gram.sum(0)))

    @property
    def cosine(self) -> Array:
        """Cosines of whole task vectors, [K K]; NaN for a zero vector."""
        gram = self.gram.sum(0)
        norms = np.sqrt(np.diagonal(gram))
        return _ratio(gram, np.outer(norms, norms))

    @property
    def sign_conflict(self) -> Array:
        """Share of energy where signs differ, [K K] in [0, 1]; NaN where two vectors share no coordinate."""
        return _ratio(self.opposed.sum(0), self.energy.sum(0))

    def by_layer(self) -> TaskVectors:
        """Return the same for the layers, in the order of their first tensors, each taken as one tensor."""
        groups: dict[str, list[str]] = {}
        for name in self.names:
            groups.setdefault(layer_of(name), []).append(name)
        return self._summed(groups)

    def by_block(self) -> TaskVectors:
        """Return the same for the blocks of the denoiser, from input to output, each taken as one tensor."""
        return self._summed(grouped(self.names))

    def _summed(self, groups: Mapping[str, Sequence[str]]) -> TaskVectors:
        index = {name: i for i, name in enumerate(self.names)}
        rows = [[index[name] for name in names] for names in groups.values()]
        sums = (
            [values[row].sum(0) for row in rows]
            for values in (self.gram, self.opposed, self.energy)
        )
        return TaskVectors(tuple(groups), *(np.array(each) for each in sums))

    def table(self, labels: Sequence[str]) -> pd.DataFrame:
        """Return one row for each tensor: the norm of each expert, then means over pairs of cosine and sign conflict, and rank.

        Raises:
            UsageError: where there is not one label for each expert.
        """
        K = self.gram.shape[1]
        if len(labels) != K:
            raise UsageError(f"{len(labels)} labels for {K} task vectors", fix="give one for each")
        pairs, norms = np.triu_indices(K, 1), self.norms
        cosine = _ratio(self.gram, norms[:, :, None] * norms[:, None, :])[:, *pairs]
        opposed = _ratio(self.opposed, self.energy)[:, *pairs]
        table = pd.DataFrame(
            norms, index=list(self.names), columns=[f"norm {label}" for label in labels]
        )
        shares = {
            "cosine": _mean(cosine),
            "sign_conflict": _mean(opposed),
            "effective_rank": self.effective_ranks,
        }
        return table.assign(**shares)


def task_vectors(
    base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]]
) -> TaskVectors:
    """Compare the task vectors of experts of one base, given as state dicts or as the deltas of a LoRA.

    Raises:
        UsageError: where there is no expert.
        InputError: where an expert's keys or shapes are not the base's.
    """
    if not experts:
        raise UsageError("no expert was given", fix="give at least one")
    for k, expert in enumerate(experts):
        _check_keys(base, expert, k)
    names = [name for name in base if base[name].is_floating_point()]
    parts = [_products(base[name], experts, name) for name in names]
    shape = (len(names), len(experts), len(experts))
    gram, opposed, energy = (np.array([part[i] for part in parts]).reshape(shape) for i in range(3))
    return TaskVectors(tuple(names), gram, opposed, energy)


def _check_keys(base: Mapping[str, Tensor], expert: Mapping[str, Tensor], k: int) -> None:
    missing = [] if holds_deltas(expert) else sorted(set(base) - set(expert))
    extra = sorted(set(expert) - set(base))
    if missing or extra:
        raise InputError(
            f"expert {k}: missing {missing[:5] or 'none'}, extra {extra[:5] or 'none'}",
            fix="use experts of this base",
        )


def _products(
    base: Tensor, experts: Sequence[Mapping[str, Tensor]], name: str
) -> tuple[Array, Array, Array]:
    """Return gram, opposed and energy [K K] of one tensor."""
    found = [delta(base, expert, name, f"expert {k}") for k, expert in enumerate(experts)]
    tau = torch.stack(
        [torch.zeros(base.numel(), dtype=torch.float64) if tau is None else tau for tau in found]
    )
    gram, energy = tau @ tau.T, tau.abs() @ tau.abs().T
    return gram.numpy(), ((energy - gram) / 2).clamp(min=0).numpy(), energy.numpy()


def delta(base: Tensor, expert: Mapping[str, Tensor], name: str, label: str) -> Tensor | None:
    """Return tau on one tensor, flat, in float64 on the CPU; None where a LoRA leaves it as it is.

    Args:
        label: of the expert, for errors.

    Raises:
        InputError: where the expert lacks the tensor or has another shape.
    """
    if name not in expert:
        if holds_deltas(expert):
            return None
        raise InputError(f"{label}: tensor '{name}' is missing", fix="use experts of this base")
    own = expert[name].detach().cpu()
    if own.shape != base.shape:
        what = f"{label}: '{name}' is {list(own.shape)}, the base's {list(base.shape)}"
        raise InputError(what, fix="use experts of this base")
    tau = own.double() if holds_deltas(expert) else own.double() - base.detach().cpu().double()
    return tau.flatten()


def _mean(values: Array) -> Array:
    """Return the mean of the finite values of each row [L P]; NaN where there are none."""
    known = np.isfinite(values)
    return _ratio(np.where(known, values, 0.0).sum(1), known.sum(1).astype(np.float64))


def _ratio(above: Array, below: Array) -> Array:
    ratio: Array = np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)
    return ratio
