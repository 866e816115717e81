"""LoRA experts: the base is frozen, and a product of small factors beside its weights trains.

    f(x) = W x + b + s B A x        W [m n], A [r n], B [m r], s = alpha / r

LoRA (arXiv 2106.09685), computed by peft. Convolutions have A [r n k k] and B [m r 1 1]. B = 0 at
the start, so that the expert is the base; A is uniform in +-1/sqrt(fan-in), peft's own default, but
from a stream of (seed, name of the module): all experts of a run start with the same A, on every
machine.

The base exists once: the student's modules are new, its frozen tensors are the teacher's. With
`--mixed-precision bf16` or `fp16` these are stored in that dtype, as diffusers' LoRA scripts do;
the factors, their moments and their averages stay float32. With `no` all is float32.

A running average is of A and of B each. The projection W K of `--projection` has full rank, so a
LoRA cannot hold it.

What is written is `pytorch_lora_weights.safetensors` in the names of diffusers and peft, with r,
alpha and targets in its metadata. `load_lora_weights` of diffusers reads it, and so do `merge`,
`sample` and `evaluate`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from demerge.diffusion.adapters import share_weights
from demerge.diffusion.loading import denoiser_part
from demerge.diffusion.model import Diffusion
from demerge.diffusion.numerics import DTYPES
from demerge.diffusion.projection import has_projection
from demerge.errors import UsageError, listed
from demerge.finetuning.layers import trained_parameters
from demerge.finetuning.options import FinetuneOptions
from demerge.lora.settings import METADATA
from demerge.randomness import generator
from demerge.storage.checkpoint import commit_tensors

FILE = "pytorch_lora_weights.safetensors"
LORA = ".lora_"  # in the name of every factor
ADAPTER = "default"  # peft's name of the adapter, which no file has


def lora_targets(denoiser: nn.Module, options: FinetuneOptions) -> dict[str, nn.Module]:
    """Return the linear layers and convolutions whose name is a target or ends in `.TARGET`.

    Raises:
        UsageError: if a target matches no module, or one that is neither.
    """
    modules = dict(denoiser.named_modules())
    chosen: dict[str, nn.Module] = {}
    for target in options.target_modules:
        named = [name for name in modules if name == target or name.endswith(f".{target}")]
        if not named:
            kinds = {name.rpartition(".")[2] for name, m in modules.items() if _fits(m)}
            what = f"--target-modules {target}: no module of the base has this name"
            raise UsageError(what, fix=f"its layers are named {listed(sorted(kinds))}")
        for name in named:
            if not _fits(modules[name]):
                what = f"--target-modules {target}: {name} is a {type(modules[name]).__name__}"
                raise UsageError(what, fix="name linear layers and convolutions")
            chosen[name] = modules[name]
    return chosen


def count_trained(
    denoiser: nn.Module, options: FinetuneOptions, layers: Sequence[str] | None
) -> int:
    """Return the number of parameters that train: of the layers, or the elements of all A and B."""
    if options.lora_rank is None:
        return trained_parameters(denoiser, layers)
    weights: list[Any] = [module.weight for module in lora_targets(denoiser, options).values()]
    return int(options.lora_rank * sum(len(W) + W[0].numel() for W in weights))


def check_lora(
    base: Diffusion, options: FinetuneOptions, layers: Sequence[str] | None = None
) -> None:
    """Check that peft is installed and that the base has the targets.

    Raises:
        UsageError: if not, if layers are chosen otherwise too, or if the base is a random start or
            keeps the paper's projection.
    """
    if options.lora_rank is None:
        return
    _peft()
    if layers is not None:
        fix = "leave out --train-layers, and name the layers by --target-modules"
        raise UsageError("--train-layers and --lora-rank both choose what trains", fix=fix)
    if base.folder is None:
        what = "--lora-rank with a random start, which has no base to be added to"
        raise UsageError(what, fix="leave out --lora-rank, or --init random")
    if has_projection(base.denoiser):
        what = f"{base.folder} keeps the W of `--projection paper`, which a LoRA has no place for"
        raise UsageError(what, fix="give another base")
    lora_targets(base.denoiser, options)


def freeze_base(base: Diffusion, options: FinetuneOptions) -> Diffusion:
    """Return the base that LoRA experts are trained on, in the dtype of the options.

    It shares its tensors with `base` if that has the dtype already. Without LoRA it is `base`.
    """
    if options.lora_rank is None:
        return base
    denoiser = share_weights(base.denoiser.requires_grad_(False), DTYPES[options.mixed_precision])
    return base.with_denoiser(denoiser)


def add_lora(denoiser: nn.Module, options: FinetuneOptions) -> nn.Module:
    """Return a denoiser with trainable factors in float32, which shares all other tensors."""
    peft = _peft()
    student = share_weights(denoiser)
    rank = options.lora_rank or 0
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=options.lora_alpha or rank,
        target_modules=list(options.target_modules),
        init_lora_weights=True,
    )
    with torch.random.fork_rng(devices=[]):  # peft draws values that are replaced below
        peft.inject_adapter_in_model(config, student, adapter_name=ADAPTER)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(LORA in name)
        if ".lora_A." in name:
            parameter.data = first_A(parameter, options.seed, name.partition(".lora_A.")[0])
        elif LORA in name:
            parameter.data = torch.zeros_like(parameter, dtype=torch.float32)
    return student


def first_A(like: Tensor, seed: int, module: str) -> Tensor:
    """Return A of a module at the start, uniform in +-1/sqrt(fan-in), float32."""
    values = generator(seed, "lora", module).random(tuple(like.shape))
    bound = like[0].numel() ** -0.5
    return torch.from_numpy((2 * values - 1) * bound).to(like.device, torch.float32)


def write_lora(
    path: Path, factors: Mapping[str, Tensor], record: Mapping[str, Any], part: str
) -> None:
    """Write factors by the student's names as a file that diffusers and peft read.

    Args:
        record: the options of the finetune.
        part: unet or transformer.
    """
    metadata = {
        f"{part}.r": record["lora_rank"],
        f"{part}.lora_alpha": record["lora_alpha"] or record["lora_rank"],
        f"{part}.target_modules": sorted(record["target_modules"]),
    }
    tensors = {f"{part}.{_file_name(name)}": value for name, value in factors.items()}
    texts = {"format": "pt", METADATA: json.dumps(metadata, sort_keys=True)}
    commit_tensors(path, tensors, texts)


def part_name(base: Diffusion) -> str:
    """Return the name before the keys of a LoRA file: unet or transformer."""
    return "unet" if base.folder is None else denoiser_part(base.folder)


def _file_name(name: str) -> str:
    return name.replace(f".{ADAPTER}.", ".")


def _fits(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        what = "--lora-rank needs the package peft, which is not installed"
        raise UsageError(what, fix="pip install 'demerge[lora]'") from error
    return peft
