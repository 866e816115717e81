"""Training some layers only: `demerge layers` names them in a layers.json, all others stay the base's to the bit.

A layer is a module with the parameters of its own. Those of the others get no gradient, no moments of the optimizer, no
average and no place in a checkpoint. The projection W is put behind a site where all maps that share it are trained.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, JsonValue
from torch import nn

from demerge.conflict import layer_of, layers_of
from demerge.diffusion.model import Diffusion
from demerge.diffusion.numerics import contiguous_groupnorm_inputs
from demerge.errors import InputError
from demerge.storage.schema import Count, Record, Span, read_record
from demerge.timesteps import TimestepRange

FORMAT = "demerge.layers/1"
NAMED = 3


class Choice(Record):
    """A layers.json: what is trained, the ranges and the base it was chosen for, and for people how it was chosen."""

    format: Literal["demerge.layers/1"]
    train: Annotated[tuple[str, ...], Field(min_length=1)]
    ranges: tuple[Span, ...]
    model: str
    metric: str = ""
    groups: Count = 0
    share: float = 1.0
    total: JsonValue = None
    layers: JsonValue = None
    curve: JsonValue = None
    supported: bool = True
    reason: str = ""
    trained: float = 1.0


def load_layers(path: Path, base: Diffusion) -> tuple[tuple[str, ...], tuple[TimestepRange, ...]]:
    """Read a layers.json: the layers to train, and the ranges they were chosen for.

    Raises:
        InputError: where the file is none, is of another base, or names layers that the base does not have.
    """
    chosen = read_record(path, Choice, fix="make it with `demerge layers MAP -o layers.json`")
    if chosen.model != base.sha256:
        raise InputError(
            f"{path} is of a base of sha256 {chosen.model[:16]}..., this one has {base.sha256[:16]}...",
            fix="give the base that its map was measured on, or measure this one with `demerge analyze --layers`",
        )
    check_layers_exist(base.denoiser, chosen.train, str(path))
    return chosen.train, tuple(TimestepRange(*span) for span in chosen.ranges)


def check_layers_exist(denoiser: nn.Module, names: Iterable[str], where: str) -> None:
    """Refuse names that are no layers of a denoiser.

    Raises:
        InputError: naming the first ones.
    """
    known = _sizes(denoiser)
    unknown = sorted(set(names) - set(known))
    if unknown:
        more = f" and {len(unknown) - NAMED} more" if len(unknown) > NAMED else ""
        raise InputError(
            f"{where}: the base has no layer {', '.join(unknown[:NAMED])}{more}",
            fix=f"its {len(known)} layers have names like {', '.join(list(known)[:NAMED])}",
        )


def digest(names: Sequence[str] | None) -> str | None:
    """Return the SHA-256 of a choice of layers, whatever their order; None is all of them."""
    return (
        None
        if names is None
        else hashlib.sha256("\n".join(sorted(set(names))).encode()).hexdigest()
    )


def trained_parameters(denoiser: nn.Module, names: Sequence[str] | None) -> int:
    """Return how many parameters the layers have; None is all of them."""
    sizes = _sizes(denoiser)
    return sum(sizes.values() if names is None else (sizes.get(layer, 0) for layer in set(names)))


def _sizes(denoiser: nn.Module) -> dict[str, int]:
    """Return how many parameters each layer has."""
    return layers_of({name: parameter.numel() for name, parameter in denoiser.named_parameters()})


def freeze_others(denoiser: nn.Module, names: Sequence[str] | None) -> set[nn.Module]:
    """Let the parameters of the layers alone require gradients, in place; None is all of them.

    Returns:
        the modules that own a parameter which does not train.
    """
    chosen, frozen = None if names is None else set(names), set()
    for prefix, module in denoiser.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            layer = layer_of(f"{prefix}.{key}" if prefix else key)
            parameter.requires_grad_(chosen is None or layer in chosen)
            if not parameter.requires_grad:
                frozen.add(module)
    contiguous_groupnorm_inputs(denoiser)
    return frozen
