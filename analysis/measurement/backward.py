"""One backward pass at a time, its gradient given out in pieces: (start, values [n]) with start on the axis of D coordinates.

    flat    one piece, all gradients side by side: a single pass over them, for models of up to 2^26 chosen parameters
    hooks   a piece per parameter as soon as it is finished, and then its memory is free: the peak is weights, activations
            and the largest gradient, whatever the model

Coordinates run through the chosen parameters in the model's order, each in its logical order, so that both modes and any
layout in memory number them alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from demerge.diffusion.numerics import contiguous_groupnorm_inputs
from demerge.errors import UsageError

Consume = Callable[[int, Tensor], None]

MODES = ("auto", "flat", "hooks")
FLAT = 1 << 26
LORA = r"(^|[._])lora[._]"


def select(denoiser: nn.Module, which: str = "all") -> dict[str, nn.Parameter]:
    """Return the parameters by name, in the model's order: `all`, those of adapters (`lora`), or where a REGEX occurs.

    Raises:
        UsageError: where the text is no regular expression or fits no name.
    """
    known = dict(denoiser.named_parameters())
    if which == "all":
        return known
    try:
        pattern = re.compile(LORA if which == "lora" else which)
    except re.error as error:
        raise UsageError(
            f"params '{which}' is not a regular expression: {error}",
            fix="give all, lora or a REGEX",
        ) from error
    chosen = {name: parameter for name, parameter in known.items() if pattern.search(name)}
    if not chosen:
        raise UsageError(
            f"params '{which}' fits none of the {len(known)} parameters",
            fix=f"give all or a REGEX that occurs in names like {', '.join(list(known)[:: max(1, len(known) // 3)][:3])}",
        )
    return chosen


class Backward:
    """Gives out the gradients of losses with respect to chosen parameters of a denoiser, whose requires_grad it sets.

    Attributes:
        D: the number of coordinates.

    Raises:
        UsageError: where `which` fits no parameter, or the mode is unknown.
    """

    def __init__(self, denoiser: nn.Module, which: str = "all", mode: str = "auto") -> None:
        if mode not in MODES:
            raise UsageError(f"mode '{mode}' is unknown", fix=f"use one of {', '.join(MODES)}")
        denoiser.requires_grad_(False)
        self._starts: dict[Tensor, int] = {}
        self.D = 0
        for parameter in select(denoiser, which).values():
            self._starts[parameter.requires_grad_(True)] = self.D
            self.D += parameter.numel()
        contiguous_groupnorm_inputs(denoiser)
        self._flat = mode == "flat" or (mode == "auto" and FLAT >= self.D)

    def __call__(self, loss: Tensor, consume: Consume) -> None:
        """Hand the gradient of `loss` [] to `consume`; coordinates that the loss does not reach may be left out."""
        if self._flat:
            consume(0, self._whole(loss))
        else:
            self._piece_by_piece(loss, consume)

    def _whole(self, loss: Tensor) -> Tensor:
        gradients = torch.autograd.grad(
            loss, list(self._starts), allow_unused=True, materialize_grads=True
        )
        return torch.cat([gradient.reshape(-1) for gradient in gradients])

    def _piece_by_piece(self, loss: Tensor, consume: Consume) -> None:
        def finished(parameter: Tensor) -> None:
            if parameter.grad is not None:
                consume(self._starts[parameter], parameter.grad.reshape(-1))
            parameter.grad = None

        handles = [
            parameter.register_post_accumulate_grad_hook(finished) for parameter in self._starts
        ]
        try:
            loss.backward()
        finally:
            for handle in handles:
                handle.remove()
