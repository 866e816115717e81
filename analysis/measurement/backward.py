"""One backward pass at a time; its gradient comes in pieces (start, values [n]) of D coordinates.

    flat    one piece, all gradients side by side, for models of up to 2^26 chosen parameters
    hooks   a piece per parameter as soon as it is finished, and then its memory is free: the peak
            is weights, activations and the largest gradient, whatever the model

Coordinates run through the chosen parameters in the model's order, each in its logical order, so
that both modes and any layout in memory number them alike.
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
MAX_FLAT = 1 << 26
LORA = r"(^|[._])lora[._]"


def select_parameters(denoiser: nn.Module, which: str = "all") -> dict[str, nn.Parameter]:
    """Return parameters by name, in the model's order.

    Args:
        which: `all`, `lora` for those of adapters, or a REGEX that occurs in their names.
    """
    parameters = dict(denoiser.named_parameters())
    if which == "all":
        return parameters
    try:
        pattern = re.compile(LORA if which == "lora" else which)
    except re.error as error:
        what = f"params '{which}' is not a regular expression: {error}"
        raise UsageError(what, fix="give all, lora or a REGEX") from error
    chosen = {name: p for name, p in parameters.items() if pattern.search(name)}
    if not chosen:
        examples = list(parameters)[:: max(1, len(parameters) // 3)][:3]
        what = f"params '{which}' fits none of the {len(parameters)} parameters"
        fix = f"give all or a REGEX that occurs in names like {', '.join(examples)}"
        raise UsageError(what, fix=fix)
    return chosen


class Backward:
    """Gradients of losses by chosen parameters of a denoiser; it sets their requires_grad."""

    def __init__(self, denoiser: nn.Module, which: str = "all", mode: str = "auto") -> None:
        if mode not in MODES:
            raise UsageError(f"mode is '{mode}'", fix=f"use one of {', '.join(MODES)}")
        denoiser.requires_grad_(False)
        self._starts: dict[Tensor, int] = {}
        self.D = 0
        for parameter in select_parameters(denoiser, which).values():
            self._starts[parameter.requires_grad_(True)] = self.D
            self.D += parameter.numel()
        contiguous_groupnorm_inputs(denoiser)
        self._is_flat = mode == "flat" or (mode == "auto" and self.D <= MAX_FLAT)

    def __call__(self, loss: Tensor, consume: Consume) -> None:
        """Pass the gradient of `loss` [] to `consume`; unreached coordinates may be left out."""
        if self._is_flat:
            gradients = torch.autograd.grad(
                loss, list(self._starts), allow_unused=True, materialize_grads=True
            )
            consume(0, torch.cat([gradient.reshape(-1) for gradient in gradients]))
        else:
            self._piece_by_piece(loss, consume)

    def _piece_by_piece(self, loss: Tensor, consume: Consume) -> None:
        def consume_gradient(parameter: Tensor) -> None:
            if parameter.grad is not None:
                consume(self._starts[parameter], parameter.grad.reshape(-1))
            parameter.grad = None

        handles = [p.register_post_accumulate_grad_hook(consume_gradient) for p in self._starts]
        try:
            loss.backward()
        finally:
            for handle in handles:
                handle.remove()
