"""Training some layers only: `demerge layers` names them, the others stay the base's.

A layer is a module with parameters of its own. The layers that do not train have no gradient, no
moments, no average and no place in a checkpoint. The projection W is put behind a site only if all
maps that share it are trained.
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

NAMED = 3


class LayerChoice(Record):
    """A layers.json: the layers to train, for which ranges and base, and how they were chosen."""

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


def load_layers(
    path: str | Path, base: Diffusion
) -> tuple[tuple[str, ...], tuple[TimestepRange, ...]]:
    """Read a layers.json: the layers to train, and the ranges they were chosen for.

    Raises:
        InputError: if the file is damaged, belongs to another base, or names unknown layers.
    """
    fix = "make it with `demerge layers MAP -o layers.json`"
    choice = read_record(Path(path), LayerChoice, fix=fix)
    if choice.model != base.sha256:
        raise InputError(
            f"{path} belongs to a base of sha256 {choice.model[:16]}..., "
            f"this one has {base.sha256[:16]}...",
            fix="give that base, or measure this one with `demerge analyze --layers`",
        )
    check_layers_exist(base.denoiser, choice.train, str(path))
    return choice.train, tuple(TimestepRange(*span) for span in choice.ranges)


def check_layers_exist(denoiser: nn.Module, names: Iterable[str], where: str) -> None:
    """Check that a denoiser has layers of these names.

    Raises:
        InputError: if not, with the first unknown ones.
    """
    sizes = _sizes(denoiser)
    unknown = sorted(set(names) - set(sizes))
    if unknown:
        more = f" and {len(unknown) - NAMED} more" if len(unknown) > NAMED else ""
        raise InputError(
            f"{where}: the base has no layer {', '.join(unknown[:NAMED])}{more}",
            fix=f"its {len(sizes)} layers have names like {', '.join(list(sizes)[:NAMED])}",
        )


def hash_layers(names: Sequence[str] | None) -> str | None:
    """Return the SHA-256 of a choice of layers in any order; None for all layers."""
    if names is None:
        return None
    return hashlib.sha256("\n".join(sorted(set(names))).encode()).hexdigest()


def trained_parameters(denoiser: nn.Module, names: Sequence[str] | None) -> int:
    """Return the number of parameters of the layers; None is all layers."""
    sizes = _sizes(denoiser)
    return sum(sizes.values() if names is None else (sizes.get(layer, 0) for layer in set(names)))


def _sizes(denoiser: nn.Module) -> dict[str, int]:
    """Return the number of parameters of each layer."""
    return layers_of({name: parameter.numel() for name, parameter in denoiser.named_parameters()})


def freeze_others(denoiser: nn.Module, names: Sequence[str] | None) -> set[nn.Module]:
    """Let only the parameters of these layers require gradients, in place; None is all layers.

    Returns:
        the modules with a parameter that does not train.
    """
    trained, frozen = None if names is None else set(names), set()
    for prefix, module in denoiser.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            layer = layer_of(f"{prefix}.{key}" if prefix else key)
            parameter.requires_grad_(trained is None or layer in trained)
            if not parameter.requires_grad:
                frozen.add(module)
    contiguous_groupnorm_inputs(denoiser)
    return frozen
