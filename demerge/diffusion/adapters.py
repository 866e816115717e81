"""A base with a LoRA: the deltas are added to its weights, and all other tensors are shared.

W' = W + s B A        exact, by `demerge.lora`; a stock denoiser, without peft
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from demerge.diffusion.model import Diffusion
from demerge.errors import InputError
from demerge.expert import find_expert, find_plain_experts
from demerge.lora import Adapter, open_expert
from demerge.storage.hub import resolve_model_path

LORA_FILES = ("pytorch_lora_weights*.safetensors", "adapter_model*.safetensors")


def share_weights(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Copy the modules and share the tensors, except parameters that require a gradient.

    Args:
        dtype: of the floating point tensors that would be shared; they are copied if it is another.
    """
    memo: dict[int, torch.Tensor] = {}
    for parameter in module.parameters():
        if not parameter.requires_grad:
            values = parameter.data if dtype is None else parameter.data.to(dtype)
            memo[id(parameter)] = nn.Parameter(values, requires_grad=False)
    for buffer in module.buffers():
        cast = dtype is not None and buffer.is_floating_point()
        memo[id(buffer)] = buffer.to(dtype) if cast else buffer
    return copy.deepcopy(module, memo)


def is_lora_path(path: str | Path) -> bool:
    """Whether a path is a file of weights or a folder of one LoRA, and not a pipeline."""
    path = Path(path)
    if path.is_file():
        return path.suffix == ".safetensors"
    if (path / "model_index.json").is_file() or find_plain_experts(path):
        return False
    return any(file for pattern in LORA_FILES for file in path.glob(pattern))


def load_model(
    path: str | Path, base: Diffusion | None = None, *, device: str | torch.device = "cpu"
) -> Diffusion:
    """Load a pipeline, or a LoRA onto its base.

    Raises:
        InputError: if it cannot be read, or is a LoRA and the base is missing or another one.
    """
    path = resolve_model_path(path)
    if not is_lora_path(path):
        return Diffusion.load(path, device=device)
    if base is None:
        what = f"{path} is a LoRA, and its base is not known"
        raise InputError(what, fix="name the base as well, for example with --base MODEL")
    return base.with_denoiser(add_lora_file(base, path)).to(device)


@torch.no_grad()
def add_lora_file(base: Diffusion, path: str | Path) -> nn.Module:
    """Return the denoiser of a base with the deltas of a LoRA; the base stays as it is.

    Raises:
        InputError: if the file is not a LoRA of this base.
    """
    weights = {name: tensor.cpu() for name, tensor in base.denoiser.state_dict().items()}
    adapter = open_expert(path, weights)
    if not isinstance(adapter, Adapter):
        raise InputError(f"{path}: not a LoRA", fix="name the folder of a whole pipeline")
    record = find_expert(adapter.place)
    if record is not None and record.base_sha256 not in (None, base.sha256):
        what = f"{path} was finetuned from a base of sha256 {str(record.base_sha256)[:16]}..."
        fix = "name the base that this expert was finetuned from"
        raise InputError(f"{what}, this one has {base.sha256[:16]}...", fix=fix)
    denoiser = share_weights(base.denoiser.requires_grad_(False))
    for name, delta in adapter.items():
        module, _, key = name.rpartition(".")
        old = denoiser.get_parameter(name)
        new = (weights[name].float() + delta).to(old)
        owner = denoiser.get_submodule(module)
        setattr(owner, key, nn.Parameter(new, requires_grad=False))
    return denoiser
