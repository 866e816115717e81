"""Task vectors tau_k = theta_k - theta_0 of K experts: how long, how alike, how opposed in sign.

    norm_lk   = |tau_k| on tensor l
    cosine_kn = <tau_k, tau_n> / (|tau_k| |tau_n|)
    sign_kn   = share of the energy sum_p |tau_kp tau_np| at coordinates where the signs differ

Tensors are taken one by one, so lazy mappings (a `Checkpoint`) are never held whole. Sums run in float64.

Papers: task arithmetic (arXiv 2212.04089), sign conflict (TIES, arXiv 2306.01708).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from demerge.conflict import Array
from demerge.errors import InputError, UsageError


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
    def cosine(self) -> Array:
        """Cosines of whole task vectors, [K K]; NaN for a zero vector."""
        gram = self.gram.sum(0)
        norms = np.sqrt(np.diagonal(gram))
        return _ratio(gram, np.outer(norms, norms))

    @property
    def sign_conflict(self) -> Array:
        """Share of energy where signs differ, [K K] in [0, 1]; NaN where two vectors share no coordinate."""
        return _ratio(self.opposed.sum(0), self.energy.sum(0))


def task_vectors(base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]]) -> TaskVectors:
    """Compare the task vectors of experts of one base, given as state dicts.

    Raises:
        UsageError: where there is no expert.
        InputError: where an expert's keys or shapes are not the base's.
    """
    if not experts:
        raise UsageError("no expert was given", fix="give at least one")
    for k, expert in enumerate(experts):
        _check_keys(base, expert, k)
    names = [name for name in base if base[name].is_floating_point()]
    parts = [_products(base[name], [expert[name] for expert in experts], name) for name in names]
    shape = (len(names), len(experts), len(experts))
    gram, opposed, energy = (np.array([part[i] for part in parts]).reshape(shape) for i in range(3))
    return TaskVectors(tuple(names), gram, opposed, energy)


def _check_keys(base: Mapping[str, Tensor], expert: Mapping[str, Tensor], k: int) -> None:
    missing, extra = sorted(set(base) - set(expert)), sorted(set(expert) - set(base))
    if missing or extra:
        raise InputError(
            f"expert {k}: missing {missing[:5] or 'none'}, extra {extra[:5] or 'none'}", fix="use experts of this base"
        )


def _products(base: Tensor, experts: Sequence[Tensor], name: str) -> tuple[Array, Array, Array]:
    """Return gram, opposed and energy [K K] of one tensor."""
    for k, expert in enumerate(experts):
        if expert.shape != base.shape:
            raise InputError(
                f"expert {k}: '{name}' is {list(expert.shape)}, the base's {list(base.shape)}",
                fix="use experts of this base",
            )
    tau = torch.stack([expert.double().flatten() - base.double().flatten() for expert in experts])
    gram, energy = tau @ tau.T, tau.abs() @ tau.abs().T
    return gram.numpy(), ((energy - gram) / 2).clamp(min=0).numpy(), energy.numpy()


def _ratio(above: Array, below: Array) -> Array:
    ratio: Array = np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)
    return ratio
