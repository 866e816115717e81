"""A merge that stays in memory: theta(w) again and again, into a live module, differentiable in w.

    session = MergeSession("base", ["experts/0000-0500", "experts/0500-1000"], "cuda")
    w = torch.full((2,), 0.5, device="cuda", requires_grad=True)  # [K], or [G K] with G groups
    optimizer = torch.optim.Adam([w], lr=0.01)
    for x, t, y in batches:                                       # w by gradient descent
        loss = (session.call(unet, w, x, t).sample - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    session.apply(w, unet)                                        # writes theta(w) in place
    session.apply(0, unet)                                        # the base again

Deltas are computed once and kept on the device. theta(w) is what `merge_tensors` gives for w, up to
rounding, and as differentiable as the method is: what ties and its like choose (trimmed entries,
elected signs) counts as fixed.
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
from demerge.errors import ResourceError, UsageError
from demerge.expert import find_expert_range
from demerge.lora import Adapter, open_expert
from demerge.merging.blocks import block_of, sort_blocks
from demerge.merging.engine.reader import CHUNK, Reader
from demerge.merging.engine.resident import Dtype, Weights, bytes_needed, load
from demerge.merging.engine.validation import (
    Tensors,
    check_inputs,
    check_same_tensors,
    resolve_weights,
)
from demerge.merging.inputs.components import note_ignored
from demerge.merging.inputs.experts import check_same_base, find_scheduler_config
from demerge.merging.inputs.statistic_files import check_measured_on
from demerge.merging.recipe.rules import select
from demerge.merging.registry import find_method
from demerge.storage.checkpoint import Checkpoint
from demerge.timesteps import TimestepRange

Model = str | Path | Tensors | nn.Module
W = Tensor | Sequence[Any] | float


class MergeSession:
    """Base and experts on a device, to be merged with any weights.

    Attributes:
        method: the name of the method.
        groups: the names of the groups of tensors, one per row of w; empty if w is [K].
        bytes: what base, deltas and inputs take on the device.
        notes: what was assumed about LoRA files, and parts that differ from the base's.
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
            base: a path, a `Checkpoint`, a state dict or a module; experts may also be LoRA files.
            groups: `blocks` for weights per block, or patterns as in rules: the first match counts.
            inputs: tensors that the method needs, one mapping or path per expert. By default,
                those next to experts that are paths.
            ranges: the experts' timesteps; by default, those of their expert.json.
            dtype: of the deltas on the device; `stored` for that of each tensor of the base.

        Raises:
            UsageError: if method, options or groups are wrong, or an input is missing.
            InputError: if a model cannot be read, or the experts do not fit the base.
            ResourceError: if the device lacks memory.
        """
        chosen = find_method(method)
        self.method = chosen.name
        resolved = chosen.resolve_options(options or {})
        chosen = chosen.specialize(resolved)
        start = open_model(base)
        tuned = [open_expert_tensors(expert, start) for expert in experts]
        K = len(tuned)
        self.notes = note_ignored(start, tuned)
        resolve_weights(None, K)
        check_same_tensors(start, tuned, ["the base", *(f"expert {i}" for i in range(K))])
        sources = {name: _open_inputs(name, tuned, inputs or {}) for name in chosen.inputs}
        check_inputs(chosen, start, sources, K)
        if ranges is None:
            files = [getattr(expert, "place", None) for expert in tuned]
            ranges = [find_expert_range(file) if file else None for file in files]
        spans = list(ranges)
        if len(spans) != K:
            what = f"{len(spans)} ranges for {K} experts"
            raise UsageError(what, fix="give one for each, or None")
        check_measured_on(start, tuned, spans, sources)
        self.device = torch.device(device)
        self.bytes = bytes_needed(start, K, sources, needs_random=chosen.needs_random, dtype=dtype)
        free = free_bytes(str(self.device))
        if free is not None and free < self.bytes:
            what = f"base and deltas take {self.bytes:,} bytes on {device}, {free:,} are free"
            fix = 'give dtype="stored" or torch.float16, fewer experts, or another device'
            raise ResourceError(what, fix=fix)
        snr = None
        if isinstance(start, Checkpoint):
            snr = snr_of(find_scheduler_config(start.place))
        constants = {**resolved, "ranges": spans, "snr": snr}
        reader = Reader(chosen, start, tuned, sources, seed)
        self._resident = load(reader, constants, self.device, dtype)
        self.groups, self._group = _assign_groups(groups, self.names)

    def __repr__(self) -> str:
        size = f"{len(self.names)} tensors, {self.bytes:,} bytes on {self.device}"
        return f"MergeSession({self.method}, w {list(self.shape)}, {size})"

    @property
    def names(self) -> list[str]:
        """The names of the tensors that are merged."""
        return list(self._resident.tensors)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of w: [K], or [G K] with groups."""
        K, G = self._resident.K, len(self.groups)
        return (G, K) if G else (K,)

    def theta(self, w: W) -> dict[str, Tensor]:
        """Return theta by name, in the base's dtypes, differentiable in w, without integer buffers.

        Args:
            w: [K], or [G K] in a session with groups; a number stands for all weights.

        Raises:
            UsageError: if w has another shape or is not finite, or the method refuses it.
        """
        merged = {}
        for name, theta in self._merge(w):
            tensor = self._resident.tensors[name]
            theta = theta.to(tensor.base.dtype)
            merged[name] = theta.clone() if tensor.deltas is None else theta
        return merged

    @torch.no_grad()
    def apply(self, w: W, module: nn.Module) -> None:
        """Write theta(w) into a module in place; all weights 0 give the base to the bit.

        Raises:
            UsageError: if w has another shape or is not finite, or the method refuses it.
            InputError: if the module's tensors are not those of the base.
        """
        weights, targets = self._resolve(w), self._targets(module)
        if not bool(weights.any()):
            for name, tensor in self._resident.tensors.items():
                targets[name].copy_(tensor.base)
            return
        chunk = CHUNK if self.device.type == "cpu" else None
        is_dense = all(target.is_contiguous() for target in targets.values())
        spans = self._resident.merge(self._by_tensor(weights), chunk if is_dense else None)
        for name, span, theta in spans:
            target = targets[name]
            if is_dense:
                target.view(-1)[span].copy_(theta)
            else:
                target.copy_(theta.view(target.shape))

    def call(self, module: nn.Module, w: W, *arguments: Any, **keywords: Any) -> Any:
        """Return module(*arguments, **keywords) with the weights theta(w), differentiable in w.

        Raises:
            UsageError, InputError: as `apply` does.
        """
        targets = self._targets(module)
        thetas = {name: theta.to(targets[name]) for name, theta in self._merge(w)}
        return functional_call(module, thetas, arguments, keywords)

    # -- weights -----------------------------------------------------------------------------------

    def _merge(self, w: W) -> list[tuple[str, Tensor]]:
        tensors = self._resident.tensors
        merged = self._resident.merge(self._by_tensor(self._resolve(w)))
        return [(name, theta.view(tensors[name].base.shape)) for name, _, theta in merged]

    def _resolve(self, w: W) -> Tensor:
        K = self._resident.K
        weights = torch.as_tensor(w, dtype=self._resident.dtype, device=self.device)
        if tuple(weights.shape) not in {(), (K,), self.shape}:
            what = f"weights of shape {list(weights.shape)} for {K} experts"
            shapes = f"[{K}] or {list(self.shape)}" if self.groups else f"[{K}]"
            raise UsageError(what, fix=f"give {shapes}, or one number")
        if not bool(torch.isfinite(weights).all()):
            raise UsageError(
                f"weights {weights.tolist()} are not finite", fix="give finite numbers"
            )
        return weights.expand(self.shape)

    def _by_tensor(self, weights: Tensor) -> Weights:
        """Return the weights [K] by tensor; the model's are the mean of its groups."""
        if not self.groups:
            return lambda name: weights
        return lambda name: weights.mean(0) if name is None else weights[self._group[name]]

    def _targets(self, module: nn.Module) -> dict[str, Tensor]:
        state = module.state_dict(keep_vars=True)
        targets = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
        base = {name: tensor.base for name, tensor in self._resident.tensors.items()}
        fix = "use a module of the base's architecture"
        check_same_tensors(base, [targets], ["the base", "the module"], fix)
        return targets


def open_model(model: Model) -> Tensors:
    """Return the tensors of a model by name."""
    if isinstance(model, nn.Module):
        return model.state_dict()
    return Checkpoint.open(model) if isinstance(model, str | Path) else model


def open_expert_tensors(model: Model, base: Tensors) -> Tensors:
    """Return the tensors of an expert by name, or the deltas of a LoRA."""
    if not isinstance(model, str | Path):
        return open_model(model)
    expert = open_expert(model, base)
    if isinstance(base, Checkpoint):
        check_same_base(base, [expert])
    return expert


def _open_inputs(
    name: str, experts: Sequence[Tensors], inputs: Mapping[str, Sequence[Model]]
) -> list[Tensors]:
    """Return an input of each expert: the one given, or the one next to the expert's file."""
    if name in inputs:
        return [open_model(model) for model in inputs[name]]
    files = [e.place for e in experts if isinstance(e, Checkpoint | Adapter)]
    paths = [place.find_file(f"{name}.safetensors") for place in files]
    return [open_model(path) for path in paths if path]


def _assign_groups(
    groups: Literal["blocks"] | Sequence[str] | None, names: Sequence[str]
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return the groups' names, and the group of each tensor."""
    if groups is None:
        return (), {}
    if groups == "blocks":
        blocks = tuple(sort_blocks(names))
        return blocks, {name: blocks.index(block_of(name)) for name in names}
    fix = "put narrow patterns first and ** last"
    assigned: dict[str, int] = {}
    for i, pattern in enumerate(groups):
        matched = select(pattern, names, f"group '{pattern}'")
        new = [name for name in matched if name not in assigned]
        if not new:
            raise UsageError(f"group '{pattern}' matches what earlier groups have", fix=fix)
        assigned |= dict.fromkeys(new, i)
    left = [name for name in names if name not in assigned]
    if left:
        raise UsageError(f"{left[0]} is in no group", fix=fix)
    return tuple(groups), assigned
