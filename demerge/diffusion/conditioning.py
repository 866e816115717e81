"""What a denoiser takes besides x_t and t: nothing, a caption's hidden states, or a class.

    denoiser                 condition                  without one
    UNet2DModel              none                       -
      num_class_embeds = C   a class 0 .. C - 1         it has no label for that
    UNet2DConditionModel     hidden states [B L D]      it has none for that
    DiTTransformer2DModel    a class 0 .. C - 1         C, no class, as a tenth of its training had

In training mode a DiT drops labels anew in each of its blocks, outside demerge's random streams. A
student would then see other classes than its teacher. `keep_labels` stops that, and `Classes.drop`
drops labels once for the whole model, from a stream of the caller's.

Papers: DiT (arXiv 2212.09748), classifier-free guidance (arXiv 2207.12598).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from demerge.errors import UsageError

DROPPED = 0.1


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


def classes_of(config: Any) -> Classes | None:
    """Return the classes that a denoiser of this config takes; None if it takes none.

    Raises:
        UsageError: if it takes something besides text or classes, or both of them.
    """
    kind = getattr(config, "class_embed_type", None)
    count = getattr(config, "num_class_embeds", None)
    takes_text = getattr(config, "cross_attention_dim", None) is not None
    added = getattr(config, "addition_embed_type", None)
    if added or kind is not None or (takes_text and count is not None):
        what = "the denoiser takes conditions besides text or a class (addition, class embeddings)"
        fix = "use an unconditional base, one with class labels, or one like SD 1.x or 2.x"
        raise UsageError(what, fix=fix)
    if count is not None:
        return Classes(int(count))
    count = getattr(config, "num_embeds_ada_norm", None)
    return None if count is None else Classes(int(count), int(count))


def keep_labels(denoiser: nn.Module) -> None:
    """Stop a denoiser from dropping labels by itself, in place; its tensors stay."""
    for module in denoiser.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
