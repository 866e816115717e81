"""What a denoiser takes beside x_t and t: nothing, a caption's hidden states, or the number of a class.

    denoiser                 condition                  without one
    UNet2DModel              none                       -
      num_class_embeds = C   a class 0 .. C - 1         it has no label for that
    UNet2DConditionModel     hidden states [B L D]      it has none for that
    DiTTransformer2DModel    a class 0 .. C - 1         C, no class: its training put that for a tenth of the labels

A DiT draws what it drops anew in each of its blocks, outside of demerge's random streams, and only in training mode, so that
a student would see other classes than its teacher: `keep_labels` stops that, and `Classes.dropped` does it with a stream of
the caller's, once for the model.

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
KNOWN = "use an unconditional base, one with class labels alone, or a text-to-image base of the SD 1.x or 2.x kind"


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes 0 .. count - 1 that a denoiser knows, and the label that stands for no class, where it has one."""

    count: int
    null: int | None = None

    def labels(self, given: Sequence[int] | None, n: int) -> Tensor:
        """Return n labels [n]: those given, or n times no class.

        Raises:
            UsageError: where one is no class of the denoiser's, or none are given and it has no label for that.
        """
        if given is None and self.null is None:
            raise UsageError(
                f"the base takes one of {self.count} classes and the data has no labels",
                fix="use data with labels: a folder for each class, CIFAR-10 or idx files, an npz with `labels`",
            )
        chosen = [self.null or 0] * n if given is None else list(given)
        wrong = [label for label in chosen if label != self.null and not 0 <= label < self.count]
        if wrong:
            raise UsageError(
                f"label {wrong[0]} is none of the base's {self.count} classes",
                fix=f"give labels in 0..{self.count - 1}",
            )
        return torch.tensor(chosen, dtype=torch.long)

    def drop(self, labels: Tensor, u: Tensor) -> Tensor:
        """Replace labels [B] by that of no class, where there is one, for `place` [B], uniform in [0, 1), below 0.1."""
        if self.null is None:
            return labels
        return torch.where(u.to(labels.device) < DROPPED, self.null, labels)

    def describe_labels(self, labels: Sequence[int] | None) -> str:
        """Say what the labels of a data set come to."""
        if labels is None:
            return f"none in the data: every image is of no class (label {self.null})"
        return f"{len(set(labels))} of the base's {self.count} classes"


def classes_of(config: Any) -> Classes | None:
    """Return the classes that a denoiser of this config takes, None where it takes none.

    Raises:
        UsageError: where it takes something besides text or classes, or both of them.
    """
    kind, count = (
        getattr(config, "class_embed_type", None),
        getattr(config, "num_class_embeds", None),
    )
    text = getattr(config, "cross_attention_dim", None) is not None
    if (
        getattr(config, "addition_embed_type", None)
        or kind is not None
        or (text and count is not None)
    ):
        raise UsageError(
            "the denoiser takes conditions besides text or a class (addition or class embeddings)",
            fix=KNOWN,
        )
    if count is not None:
        return Classes(int(count))
    count = getattr(config, "num_embeds_ada_norm", None)
    return None if count is None else Classes(int(count), int(count))


def keep_labels(denoiser: nn.Module) -> None:
    """Let no module of a denoiser drop labels by itself, in place; its tensors stay."""
    for module in denoiser.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
