"""Optimizers by name. The state of each can be written as tensors and JSON values, and read again.

adamw          torch's AdamW, one fused kernel (arXiv 1711.05101)
adamw-8bit     moments in 8 bits, of bitsandbytes (arXiv 2110.02861)
prodigy        AdamW that finds its own step size, of prodigyopt (arXiv 2306.06101);
               --learning-rate is a factor on it, usually 1
schedule-free  AdamW whose average replaces a decaying rate, of schedulefree (arXiv 2405.15682)
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from demerge.errors import UsageError
from demerge.finetuning.checkpoint import Number, OptimizerValues
from demerge.finetuning.options import FinetuneOptions

PACKAGES = {
    "adamw-8bit": "bitsandbytes",
    "prodigy": "prodigyopt",
    "schedule-free": "schedulefree",
}
State = tuple[dict[str, Tensor], OptimizerValues]


def check_installed(options: FinetuneOptions) -> None:
    """Check that the package of the optimizer is installed.

    Raises:
        UsageError: if not, with what to install.
    """
    if options.optimizer in PACKAGES:
        _package(options.optimizer)


def make_optimizer(parameters: Mapping[str, Tensor], options: FinetuneOptions) -> Optimizer:
    """Return the optimizer of these parameters; the weight of the projection does not decay.

    Raises:
        UsageError: if its package is not installed.
    """
    mixes = [parameter for name, parameter in parameters.items() if name.endswith(".W")]
    others = [parameter for name, parameter in parameters.items() if not name.endswith(".W")]
    groups: list[dict[str, Any]] = [{"params": others}]
    if mixes:  # decay would pull W to 0 and not to I
        groups.append({"params": mixes, "weight_decay": 0.0})
    common: dict[str, Any] = {
        "lr": options.learning_rate,
        "betas": (options.adam_beta1, options.adam_beta2),
        "weight_decay": options.adam_weight_decay,
        "eps": options.adam_epsilon,
    }
    match options.optimizer:
        case "adamw":
            device = others[0].device if others else mixes[0].device
            if device.type == "cuda":  # a rate on the device lets a CUDA graph replay the step
                common["lr"] = torch.tensor(options.learning_rate, device=device)
            is_cuda = device.type == "cuda"
            return torch.optim.AdamW(groups, fused=True, capturable=is_cuda, **common)
        case "adamw-8bit":
            eight: Optimizer = _package("adamw-8bit").optim.AdamW8bit(groups, **common)
            return eight
        case "prodigy":
            found: Optimizer = _package("prodigy").Prodigy(
                groups, safeguard_warmup=True, use_bias_correction=True, **common
            )
            return found
        case "schedule-free":
            free: Optimizer = _package("schedule-free").AdamWScheduleFree(groups, **common)
            free.train()  # type: ignore[attr-defined]
            return free


def averages_itself(optimizer: Optimizer) -> bool:
    """Whether the parameters have to be switched to their average before they are read."""
    return hasattr(optimizer, "eval")


def state_of(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> State:
    """Return the state: tensors `optimizer.NAME.PARAMETER`, and all other values.

    The other values are those of the groups and those of single parameters.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Number]] = {}
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{key}.{name}"] = value
            elif _is_finite(value):
                numbers.setdefault(name, {})[key] = value
    groups = tuple(
        {key: value for key, value in group.items() if _is_finite(value)}
        for group in optimizer.param_groups
    )
    return tensors, OptimizerValues(groups=groups, numbers=numbers)


def restore(
    optimizer: Optimizer,
    parameters: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    values: OptimizerValues,
) -> None:
    """Load what `state_of` returned."""
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, moment, name = key.split(".", 2)
            parameter = parameters[name]
            on_host = moment == "step" and parameter.device.type != "cuda"
            optimizer.state[parameter][moment] = tensor if on_host else tensor.to(parameter.device)
    for name, numbers in values.numbers.items():
        optimizer.state[parameters[name]].update(numbers)
    for group, numbers in zip(optimizer.param_groups, values.groups, strict=False):
        group.update(numbers)


def _is_finite(value: Any) -> bool:
    """Whether a value is a number that JSON can hold; an infinite one is an option, not a state."""
    return isinstance(value, bool | int | float) and math.isfinite(value)


def _package(optimizer: str) -> ModuleType:
    package = PACKAGES[optimizer]
    try:
        return importlib.import_module(package)
    except ImportError as error:
        what = f"optimizer {optimizer} needs the package {package}, which is not installed"
        raise UsageError(what, fix=f"pip install {package}, or --optimizer adamw") from error
