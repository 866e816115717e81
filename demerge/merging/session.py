"""A merge that stays in memory: theta(w) again and again for other weights w, into a live module, differentiable in w.

    session = MergeSession("base", ["experts/0000-0500", "experts/0500-1000"], "cuda", method="ties", options={"density": 0.5})
    w = torch.full((2,), 0.5, device="cuda", requires_grad=True)      # [K], or [G K] where the session has G groups
    optimizer = torch.optim.Adam([w], lr=0.01)
    for x, t, y in batches:                                           # w by gradient descent
        loss = (session.call(unet, w, x, t).sample - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    session.apply(w, unet)                                            # writes theta(w) into the module, in place
    session.apply(0, unet)                                            # the base again

Deltas are computed once and kept on the device. theta(w) is what `merge_tensors` gives for the weights w, up to rounding, and
as differentiable as the method is: the choices of ties and its like (what is trimmed, which sign is elected) count as fixed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from demerge.device import free_bytes
from demerge.diffusion.schedule import snr_of
from demerge.errors import InputError, ResourceError, UsageError
from demerge.expert import find_expert_range
from demerge.lora import Adapter, open_expert
from demerge.merging.contract import Method
from demerge.merging.engine.reader import CHUNK, Reader
from demerge.merging.engine.resident import Dtype, Weights, bytes_needed, load
from demerge.merging.engine.validation import (
    Tensors,
    check_inputs,
    check_same_tensors,
    settle_weights,
)
from demerge.merging.inputs.components import notes_about
from demerge.merging.inputs.experts import check_same_base, scheduler_config
from demerge.merging.inputs.statistics import check_measured_on
from demerge.merging.recipe.blocks import block_of, by_depth
from demerge.merging.recipe.rules import select
from demerge.merging.registry import find
from demerge.storage.checkpoint import Checkpoint
from demerge.timesteps import TimestepRange

Model = str | Path | Tensors | nn.Module
W = Tensor | Sequence[Any] | float


class MergeSession:
    """Base and experts on a device, to be merged with any weights.

    Attributes:
        method: the name of the method.
        groups: the names of the groups of tensors, in the order of the rows of w; empty where w is [K].
        bytes: what base, deltas and inputs take on the device.
        notes: what had to be supposed about LoRA files, and parts next to the denoiser that differ from the base's.
    """

    def __init__(
        self,
        base: Model,
        experts: Sequence[Model],
        device: str | torch.device = "cpu",
        *,
        method: str = "task_arithmetic",
        options: Mapping[str, Any] | None = None,
        groups: Literal["blocks"] | Sequence[str] | None = None,
        inputs: Mapping[str, Sequence[Model]] | None = None,
        ranges: Sequence[TimestepRange | None] | None = None,
        dtype: Dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        """Read the models, and compute the deltas.

        Args:
            base: a path, a `Checkpoint`, a state dict or a module; experts likewise, or paths of LoRA files.
            groups: `blocks` for weights per block, or patterns as in rules: a tensor is of the first that matches it.
            inputs: for a method that needs tensors, one mapping or path per expert; found beside experts that are paths.
            ranges: the experts' timesteps; found in their expert.json where they are paths.
            dtype: of the deltas on the device; `stored` for that of each tensor of the base.

        Raises:
            UsageError: where method, options or groups are wrong, or an input is missing.
            InputError: where a model cannot be read or the experts do not fit the base.
            ResourceError: where the device's free memory does not suffice.
        """
        chosen, origin = find(method), opened(base)
        self.method = chosen.name
        settled = chosen.settle(options or {})
        chosen = chosen.under(settled)
        tuned = [opened_expert(expert, origin) for expert in experts]
        self.notes = notes_about(origin, tuned)
        settle_weights(None, len(tuned))
        check_same_tensors(origin, tuned, ["the base", *(f"expert {i}" for i in range(len(tuned)))])
        given = _inputs(chosen, tuned, inputs or {})
        check_inputs(chosen, origin, given, len(tuned))
        spans = list(ranges) if ranges is not None else [_range(expert) for expert in tuned]
        if len(spans) != len(tuned):
            raise UsageError(
                f"{len(spans)} ranges for {len(tuned)} experts", fix="give one for each, or None"
            )
        check_measured_on(origin, tuned, spans, given)
        self.device = torch.device(device)
        self.bytes = bytes_needed(origin, len(tuned), given, draws=chosen.draws, dtype=dtype)
        _check_memory(self.bytes, str(device))
        constants = {
            **settled,
            "ranges": spans,
            "snr": snr_of(scheduler_config(origin.place))
            if isinstance(origin, Checkpoint)
            else None,
        }
        self._resident = load(
            Reader(chosen, origin, tuned, given, seed), constants, self.device, dtype
        )
        self.groups, self._group = _grouped(groups, self.names)

    def __repr__(self) -> str:
        """Say what is held, and where."""
        held = f"{len(self.names)} tensors, {self.bytes:,} bytes on {self.device}"
        return f"MergeSession({self.method}, w {list(self.shape)}, {held})"

    @property
    def names(self) -> list[str]:
        """The names of the tensors that are merged."""
        return list(self._resident.held)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of w: [K], or [G K] with groups."""
        K, G = self._resident.K, len(self.groups)
        return (G, K) if G else (K,)

    def theta(self, w: W) -> dict[str, Tensor]:
        """Merge: theta by name, in the dtypes of the base, differentiable in w; integer buffers are left out.

        Args:
            w: [K], or [G K] in a session with groups; a number stands for all weights.

        Raises:
            UsageError: where w has another shape or is not finite, or the method refuses it.
        """
        held = self._resident.held
        rounded = {name: theta.to(held[name].base.dtype) for name, theta in self._thetas(w)}
        return {
            name: theta.clone() if held[name].deltas is None else theta
            for name, theta in rounded.items()
        }

    @torch.no_grad()
    def apply(self, w: W, module: nn.Module) -> None:
        """Write theta(w) into a module, in place: no tensor is made anew, integer buffers stay; all weights 0 is the base.

        Raises:
            UsageError: where w has another shape or is not finite, or the method refuses it.
            InputError: where the module's tensors are not those of the base.
        """
        weights, targets = self._weights(w), self._targets(module)
        if not bool(weights.any()):
            for name, held in self._resident.held.items():
                targets[name].copy_(held.base)
            return
        chunk = CHUNK if self.device.type == "cpu" else None
        dense = all(target.is_contiguous() for target in targets.values())
        for name, span, theta in self._resident.merged(self._of(weights), chunk if dense else None):
            target = targets[name]
            if dense:
                target.view(-1)[span].copy_(theta)
            else:
                target.copy_(theta.view(target.shape))

    def call(self, module: nn.Module, w: W, *arguments: Any, **keywords: Any) -> Any:
        """Return module(*arguments, **keywords) with theta(w) for its own weights, differentiable in w.

        Raises:
            UsageError, InputError: as `apply` does.
        """
        targets = self._targets(module)
        thetas = {name: theta.to(targets[name]) for name, theta in self._thetas(w)}
        return functional_call(module, thetas, arguments, keywords)

    # -- weights -----------------------------------------------------------------------------------------------------

    def _thetas(self, w: W) -> list[tuple[str, Tensor]]:
        held = self._resident.held
        merged = self._resident.merged(self._of(self._weights(w)))
        return [(name, theta.view(held[name].base.shape)) for name, _, theta in merged]

    def _weights(self, w: W) -> Tensor:
        K, G = self._resident.K, len(self.groups)
        weights = torch.as_tensor(w, dtype=self._resident.dtype, device=self.device)
        shapes = [(), (K,), (G, K)] if G else [(), (K,)]
        if tuple(weights.shape) not in shapes:
            wanted = f"[{K}]" + (f" or [{G} {K}]" if G else "")
            raise UsageError(
                f"weights of shape {list(weights.shape)} for {K} experts",
                fix=f"give {wanted}, or one number",
            )
        if not bool(torch.isfinite(weights).all()):
            raise UsageError(
                f"weights {weights.tolist()} are not finite", fix="give finite numbers"
            )
        return weights.expand(G, K) if G else weights.expand(K)

    def _of(self, weights: Tensor) -> Weights:
        """Return what gives the weights [K] of a tensor; the model's are the mean of its groups."""
        if not self.groups:
            return lambda name: weights
        return lambda name: weights.mean(0) if name is None else weights[self._group[name]]

    def _targets(self, module: nn.Module) -> dict[str, Tensor]:
        held = self._resident.held
        there = {
            n: t for n, t in module.state_dict(keep_vars=True).items() if t.is_floating_point()
        }
        shapes = [
            f"{n} {list(there[n].shape)}"
            for n in held
            if n in there and there[n].shape != held[n].base.shape
        ]
        found = {
            "missing": [n for n in held if n not in there],
            "unknown to the base": [n for n in there if n not in held],
            "of another shape": shapes,
        }
        lines = "; ".join(
            f"{len(ns)} {what}: {', '.join(ns[:5])}" for what, ns in found.items() if ns
        )
        if lines:
            raise InputError(
                f"the module does not fit the base: {lines}",
                fix="use a module of the base's architecture",
            )
        return there


def opened(model: Model) -> Tensors:
    """Return the tensors of a model by name."""
    if isinstance(model, nn.Module):
        return model.state_dict()
    return Checkpoint.open(model) if isinstance(model, str | Path) else model


def opened_expert(model: Model, base: Tensors) -> Tensors:
    """Return the tensors of an expert by name, or the deltas of a LoRA."""
    if not isinstance(model, str | Path):
        return opened(model)
    expert = open_expert(model, base)
    if isinstance(base, Checkpoint):
        check_same_base(base, [expert])
    return expert


def _inputs(
    method: Method, experts: Sequence[Tensors], given: Mapping[str, Sequence[Model]]
) -> dict[str, list[Tensors]]:
    """Return the tensors a method needs beside the weights: those given, or those found beside experts that are files."""
    found: dict[str, list[Tensors]] = {}
    for name in method.inputs:
        places = [
            expert.place.beside(f"{name}.safetensors")
            for expert in experts
            if isinstance(expert, Checkpoint | Adapter)
        ]
        found[name] = [
            opened(model) for model in given.get(name, [path for path in places if path])
        ]
    return found


def _range(expert: Tensors) -> TimestepRange | None:
    return find_expert_range(expert.place) if isinstance(expert, Checkpoint | Adapter) else None


def _check_memory(needed: int, device: str) -> None:
    free = free_bytes(device)
    if free is not None and free < needed:
        raise ResourceError(
            f"base and deltas take {needed:,} bytes on {device}, {free:,} are free",
            fix='give dtype="stored" or torch.float16, fewer experts, or another device',
        )


def _grouped(
    groups: Literal["blocks"] | Sequence[str] | None, names: Sequence[str]
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return the groups' names, and the group of each tensor.

    Raises:
        UsageError: where a pattern is the first of no tensor, or a tensor is in no group.
    """
    if groups is None:
        return (), {}
    if groups == "blocks":
        blocks = tuple(by_depth(names))
        return blocks, {name: blocks.index(block_of(name)) for name in names}
    chosen: dict[str, int] = {}
    for i, pattern in enumerate(groups):
        chosen |= {
            name: i for name in select(pattern, names, f"group '{pattern}'") if name not in chosen
        }
    idle = [pattern for i, pattern in enumerate(groups) if i not in chosen.values()]
    left = [name for name in names if name not in chosen]
    if idle or left:
        what = (
            f"group '{idle[0]}' matches what earlier groups have"
            if idle
            else f"{left[0]} is in no group"
        )
        raise UsageError(what, fix="put narrow patterns first and ** last")
    return tuple(groups), chosen
