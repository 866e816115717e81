"""Task vectors tau_k = theta_k - theta_0 of K experts: how long, how alike, how opposed in sign.

    norm_lk   = |tau_k| on tensor l
    cosine_kn = <tau_k, tau_n> / (|tau_k| |tau_n|)
    sign_kn   = share of the energy sum_p |tau_kp tau_np| at coordinates of unequal signs
    rank      = effective rank of [tau_1 .. tau_K], see demerge.merging.report.diagnosis:
                1 (all parallel) to K

Each is given for tensors, for layers (`by_layer`), for blocks of the denoiser (`by_block`) and for
the whole. An expert stands for its range, so a table of norms is one of layers by ranges. Tensors
are taken one by one: a lazy `Checkpoint` is never held whole. Sums are float64.

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
from demerge.merging.blocks import group_by_block
from demerge.merging.engine.validation import holds_deltas
from demerge.merging.report.diagnosis import effective_rank


@dataclass(frozen=True, slots=True, eq=False)
class TaskVectors:
    """How K task vectors relate to each other."""

    names: tuple[str, ...]  # the L floating-point tensors
    gram: Array  # inner products on each tensor [L K K]
    opposed: Array  # sum_p |tau_kp tau_np| over p of unequal signs, on each tensor [L K K]
    energy: Array  # sum_p |tau_kp tau_np| [L K K]

    @property
    def norms(self) -> Array:
        """|tau_k| on each tensor, [L K]."""
        return np.asarray(np.sqrt(np.einsum("lkk->lk", self.gram)))

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
        """Share of energy at unequal signs, [K K]; NaN for vectors without a common coordinate."""
        return _ratio(self.opposed.sum(0), self.energy.sum(0))

    def by_layer(self) -> TaskVectors:
        """Return the same for layers, modules with all their own tensors, as one tensor each."""
        groups: dict[str, list[str]] = {}
        for name in self.names:
            groups.setdefault(layer_of(name), []).append(name)
        return self._summed(groups)

    def by_block(self) -> TaskVectors:
        """Return the same for the blocks of the denoiser, from input to output."""
        return self._summed(group_by_block(self.names))

    def _summed(self, groups: Mapping[str, Sequence[str]]) -> TaskVectors:
        index = {name: i for i, name in enumerate(self.names)}
        rows = [[index[name] for name in names] for names in groups.values()]
        gram, opposed, energy = (
            np.array([values[row].sum(0) for row in rows])
            for values in (self.gram, self.opposed, self.energy)
        )
        return TaskVectors(tuple(groups), gram, opposed, energy)

    def whole(self) -> TaskVectors:
        """Return the same for the whole model as one tensor."""
        return self._summed({"whole": self.names})

    def table(self, labels: Sequence[str]) -> pd.DataFrame:
        """Return a row per tensor: norms, means over pairs of cosine and sign conflict, rank."""
        K, norms = self.gram.shape[1], self.norms
        if len(labels) != K:
            raise UsageError(f"{len(labels)} labels for {K} task vectors", fix="give one for each")
        pairs = np.triu_indices(K, 1)
        cosine = _ratio(self.gram, norms[:, :, None] * norms[:, None, :])[:, *pairs]
        opposed = _ratio(self.opposed, self.energy)[:, *pairs]
        columns = [f"norm {label}" for label in labels]
        return pd.DataFrame(norms, index=list(self.names), columns=columns).assign(
            cosine=_mean(cosine),
            sign_conflict=_mean(opposed),
            effective_rank=[effective_rank(torch.from_numpy(gram)) for gram in self.gram],
        )


def compare_task_vectors(
    base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]]
) -> TaskVectors:
    """Compare the task vectors of experts, given as state dicts or as the deltas of a LoRA."""
    if not experts:
        raise UsageError("no expert was given", fix="give at least one")
    for k, expert in enumerate(experts):
        missing = [] if holds_deltas(expert) else sorted(set(base) - set(expert))
        extra = sorted(set(expert) - set(base))
        if missing or extra:
            what = f"expert {k}: missing {missing[:5] or 'none'}, extra {extra[:5] or 'none'}"
            raise InputError(what, fix="use experts of this base")
    names, K = [name for name in base if base[name].is_floating_point()], len(experts)
    gram, energy = np.zeros((2, len(names), K, K))
    for i, name in enumerate(names):
        tau = torch.zeros(K, base[name].numel(), dtype=torch.float64)
        for k, expert in enumerate(experts):
            row = task_vector(base[name], expert, name, f"expert {k}")
            if row is not None:
                tau[k] = row
        gram[i], energy[i] = tau @ tau.T, tau.abs() @ tau.abs().T
    return TaskVectors(tuple(names), gram, ((energy - gram) / 2).clip(min=0), energy)


def task_vector(base: Tensor, expert: Mapping[str, Tensor], name: str, label: str) -> Tensor | None:
    """Return tau on one tensor, flat, float64 on the CPU; None if a LoRA does not change it."""
    fix = "use experts of this base"
    if name not in expert:
        if holds_deltas(expert):
            return None
        raise InputError(f"{label}: tensor '{name}' is missing", fix=fix)
    own = expert[name].detach().cpu()
    if own.shape != base.shape:
        what = f"{label}: '{name}' is {list(own.shape)}, the base's {list(base.shape)}"
        raise InputError(what, fix=fix)
    tau = own.double() if holds_deltas(expert) else own.double() - base.detach().cpu().double()
    return tau.flatten()


def _mean(values: Array) -> Array:
    """Return the mean of the finite values of each row [L P]; NaN if there are none."""
    known = np.isfinite(values)
    return _ratio(np.where(known, values, 0.0).sum(1), known.sum(1).astype(np.float64))


def _ratio(above: Array, below: Array) -> Array:
    return np.asarray(np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0))
