"""What a denoiser takes besides x_t and t: nothing, a caption's hidden states, or a class.

    denoiser                 condition                  without one
    UNet2DModel              none                       -
      num_class_embeds = C   a class 0 .. C - 1         it has no label for that
    DiTTransformer2DModel    a class 0 .. C - 1         C, no class, as a tenth of its training had
    all others               what their text encoders   the text encoders' states of ""
                             make of a caption

A condition is a dict of the denoiser's own arguments; the sample is on their first axis.

In training mode a DiT drops labels anew in each of its blocks, outside demerge's random streams. A
student would then see other classes than its teacher. Its family stops that, and `Classes.drop`
drops labels once for the whole model, from a stream of the caller's.

Papers: DiT (arXiv 2212.09748), classifier-free guidance (arXiv 2207.12598).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from demerge.errors import UsageError

DROPPED = 0.1
Condition = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes 0 .. count - 1 of a denoiser, and the label of no class if it has one."""

    count: int
    null: int | None = None

    def labels(self, labels: Sequence[int] | None, n: int) -> Tensor:
        """Return labels as a tensor [n]; None stands for n times no class.

        Raises:
            UsageError: if a label is not a class of the denoiser, or None has no label here.
        """
        if labels is None and self.null is None:
            what = f"the base takes one of {self.count} classes and the data has no labels"
            fix = "use data with labels: a folder per class, CIFAR-10, idx, or an npz with `labels`"
            raise UsageError(what, fix=fix)
        chosen = [self.null or 0] * n if labels is None else list(labels)
        wrong = [label for label in chosen if label != self.null and not 0 <= label < self.count]
        if wrong:
            what = f"label {wrong[0]} is not one of the base's {self.count} classes"
            raise UsageError(what, fix=f"give labels in 0..{self.count - 1}")
        return torch.tensor(chosen, dtype=torch.long)

    def drop(self, labels: Tensor, u: Tensor) -> Tensor:
        """Replace labels [B] by that of no class, if it exists, for u [B] in [0, 1) below 0.1."""
        if self.null is None:
            return labels
        return torch.where(u.to(labels.device) < DROPPED, self.null, labels)

    def describe_labels(self, labels: Sequence[int] | None) -> str:
        """Describe the labels of a data set."""
        if labels is None:
            return f"none in the data: every image is of no class (label {self.null})"
        return f"{len(set(labels))} of the base's {self.count} classes"


def rows(condition: Condition, chosen: Any) -> Condition:
    """Return some rows of a condition."""
    return {name: tensor[chosen] for name, tensor in condition.items()}


def stack(*conditions: Condition) -> Condition:
    """Return the rows of conditions of the same arguments below one another."""
    return {name: torch.cat([c[name] for c in conditions]) for name in conditions[0]}
