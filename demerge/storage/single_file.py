"""Single files in the layout of Stable Diffusion's first code (LDM), and pipeline folders.

    model.diffusion_model.*   first_stage_model.*   cond_stage_model.transformer.*
    unet/                     vae/                  text_encoder/

A file becomes a folder by diffusers' own converters; configs, scheduler and tokenizer come from a
local pipeline of the same kind. diffusers has no way back: names and shapes are inverted here, and
what is written is held against its converters, which must give the pipeline back to the bit. Stable
Diffusion 1.x, and those that have its parts.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demerge.errors import InputError
from demerge.storage.atomic import (
    check_disk_space,
    check_is_new,
    commit_dir,
    commit_json,
    new_safetensors,
)
from demerge.storage.checkpoint import PREFIXES, WRAPPER, Checkpoint, commit_tensors
from demerge.storage.hub import resolve_model_path
from demerge.storage.layout import inside, locate, read_index
from demerge.storage.safetensors_header import read_json, read_scheduler

if TYPE_CHECKING:
    from torch import Tensor

UNET, VAE, TEXT = "unet", "vae", "text_encoder"
PREFIX = {UNET: PREFIXES[0], VAE: "first_stage_model.", TEXT: "cond_stage_model.transformer."}
CLASSES = {UNET: "UNet2DConditionModel", VAE: "AutoencoderKL", TEXT: "CLIPTextModel"}
FILES = {UNET: "diffusion_pytorch_model", VAE: "diffusion_pytorch_model", TEXT: "model"}
WEIGHTS = (".safetensors", ".bin", ".msgpack", ".h5", ".ckpt", ".onnx")
CLIP = "quick_gelu"  # the text encoder's activation in 1.x; that of 2.x, OpenCLIP, has other names
Tensors = dict[str, "Tensor"]

OTHERS = ("transformer", "text_encoder_2", "text_encoder_3", "image_encoder")  # not of 1.x

# diffusers' name -> LDM's; numbers follow from groups and layers per block
UNET_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
VAE_ATTENTION = {
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
}  # fmt: skip


def to_folder(source: str | Path, out: str | Path, config: str | Path) -> dict[str, int]:
    """Write a single file as a pipeline folder; return how many tensors each part has.

    A part that is taken from the config counts 0.

    Args:
        config: a pipeline folder or Hub id of the same kind; a VAE or text encoder that the file
            lacks is taken from it.

    Raises:
        UsageError: if `out` exists.
        InputError: if the file is damaged or of another kind than the config, or lacks or has
            tensors that it should not.
        ResourceError: if the disk does not suffice.
    """
    source, out = Path(source), check_is_new(out)
    home = resolve_model_path(config)
    index = _index(home)
    file = Checkpoint(locate(source))
    _check_markers(source, file, home)
    check_disk_space(out, sum(spec.stop - spec.start for spec in file.specs.values()))
    held = dict(_ldm_names(file))
    converted = {part: _to_diffusers(part, held, home) for part in CLASSES if index.get(part)}
    if not converted.get(UNET):
        what = f"{source}: no tensor of a UNet in the LDM layout"
        raise InputError(what, fix="name a single file of Stable Diffusion")
    with commit_dir(out) as folder:
        _copy_configs(home, index, folder, {part for part in converted if not converted[part]})
        for part, tensors in converted.items():
            if tensors:
                file_name = f"{FILES[part]}.safetensors"
                commit_tensors(folder / part / file_name, tensors, {"format": "pt"})
        _check_fit(source, folder)
    return {part: len(tensors) for part, tensors in converted.items()}


def to_file(source: str | Path, out: str | Path) -> int:
    """Write a pipeline folder as one file in the LDM layout; return the number of its tensors.

    Raises:
        UsageError: if `out` exists or does not end in .safetensors.
        InputError: if the pipeline is of another kind, or diffusers' converters do not give it
            back from what was made.
        ResourceError: if the disk does not suffice.
    """
    import torch

    source, out = Path(source), new_safetensors(out)
    index = _index(source)
    names = [part for part in CLASSES if index.get(part)]
    parts = {part: dict(Checkpoint(locate(source, None, part))) for part in names}
    made: Tensors = {}
    for part, tensors in parts.items():
        made |= _to_ldm(part, tensors, _config(source, part))
    for part, tensors in parts.items():
        back = _to_diffusers(part, made, source)
        same = {n for n in tensors.keys() & back if tensors[n].dtype == back[n].dtype}
        same = {name for name in same if torch.equal(tensors[name], back[name])}
        lost = [name for name in {**tensors, **back} if name not in same]
        if lost:
            listing = f"{len(lost)} tensors as they are: {', '.join(lost[:5])}"
            what = f"{source}/{part}: the LDM layout does not hold {listing}"
            fix = "keep the folder; only Stable Diffusion 1.x can be written as a single file"
            raise InputError(what, fix=fix)
    check_disk_space(out, sum(tensor.nbytes for tensor in made.values()))
    commit_tensors(out, made, {"format": "pt"})
    return len(made)


def _index(folder: Path) -> dict[str, Any]:
    """Return which parts a pipeline has, once it is known to be one that is converted.

    Raises:
        InputError: if it is not.
    """
    fix = "name a pipeline folder of Stable Diffusion 1.x"
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{folder}: not a pipeline folder with a model_index.json", fix=fix)
    none = (None, [None, None])
    index = read_index(folder)
    parts = {n: v for n, v in index.items() if n.startswith("_") or v not in none}
    kinds = {name: value[-1] for name, value in parts.items() if isinstance(value, list) and value}
    unlike = [f"{n} {kinds[n]}" for n, kind in CLASSES.items() if kinds.get(n, kind) != kind]
    unlike += [name for name in kinds if name in OTHERS]
    if UNET not in kinds:
        unlike.append("no unet")
    if TEXT in kinds and _config(folder, TEXT).get("hidden_act", CLIP) != CLIP:
        unlike.append("an OpenCLIP text encoder")
    if unlike:
        what = f"{folder}: this kind of pipeline is not converted: {', '.join(unlike)}"
        raise InputError(what, fix=fix)
    return parts


def _config(folder: Path, part: str) -> dict[str, Any]:
    inside(folder, folder / part / "config.json")
    return read_json(folder / part / "config.json")


def _check_markers(source: Path, file: Checkpoint, config: Path) -> None:
    """Check that a file that is marked as predicting v has such a config."""
    file_name = config / "scheduler" / "scheduler_config.json"
    scheduler = read_scheduler(file_name) if file_name.is_file() else {}
    predicts = scheduler.get("prediction_type", "epsilon")
    if "v_pred" in file and predicts != "v_prediction":
        what = f"{source} is marked v_pred, the scheduler of {config} says {predicts}"
        fix = 'give a --config whose scheduler has "prediction_type": "v_prediction"'
        raise InputError(what, fix=fix)


def _ldm_names(file: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors without wrappers; a UNet that stands alone gets its prefix."""
    names = {WRAPPER.sub("", name): name for name in file}
    is_bare = not any(name.startswith(PREFIX[UNET]) for name in names)
    for plain, name in names.items():
        is_unet = is_bare and not plain.startswith((PREFIX[VAE], PREFIX[TEXT]))
        yield PREFIX[UNET] + plain if is_unet else plain, file[name]


def _copy_configs(home: Path, index: Mapping[str, Any], out: Path, whole: set[str]) -> None:
    """Copy the parts that are kept without their weights; those in `whole` with them."""
    parts = [name for name, value in index.items() if isinstance(value, list)]
    copied = [name for name in parts if name != "safety_checker" and (home / name).is_dir()]
    for name in copied:
        for file in (file for file in sorted((home / name).iterdir()) if file.is_file()):
            inside(home, file)
            if name in whole or not (file.suffix in WEIGHTS or ".index." in file.name):
                (out / name).mkdir(exist_ok=True)
                shutil.copyfile(file, out / name / file.name)
    kept = {n: value for n, value in index.items() if n not in parts or n in copied}
    lists = [name for name, value in read_index(home).items() if isinstance(value, list)]
    empty = {name: [None, None] for name in lists if name not in kept}
    commit_json(out / "model_index.json", {**kept, **empty})


def _check_fit(source: Path, folder: Path) -> None:
    """Load what was written, strictly."""
    from demerge.diffusion.loading import load_denoiser, load_text, load_vae

    try:
        for load in (load_denoiser, load_vae, load_text):
            load(folder)
    except InputError as error:
        what = f"{source} does not fit --config: {error.what.replace(f'{folder}/', '')}"
        raise InputError(what, fix="give a --config of the same kind of model") from error


def _to_diffusers(part: str, held: Tensors, home: Path) -> Tensors:
    """Return a part of an LDM file in diffusers' names, by its converters; empty if absent."""
    from diffusers.loaders import single_file_utils as stock

    mine = {name: tensor for name, tensor in held.items() if name.startswith(PREFIX[part])}
    if not mine:
        return {}
    if part == TEXT:
        converted = stock.convert_ldm_clip_checkpoint(mine)
        wrapped = _is_wrapped(home)
        named = {n if wrapped else n.removeprefix("text_model."): t for n, t in converted.items()}
        return {n: t for n, t in named.items() if not n.endswith("position_ids")}
    config = _config(home, part)
    converters: dict[str, Callable[..., Tensors]] = {
        UNET: stock.convert_ldm_unet_checkpoint,
        VAE: stock.convert_ldm_vae_checkpoint,
    }
    try:
        converted = converters[part](mine, config={"layers_per_block": 2, **config})
    except Exception as error:  # of any kind: the converters take names and config as they come
        reason = f"{type(error).__name__}: {error}"
        what = f"diffusers cannot convert the {part} by {home}/{part}/config.json: {reason}"
        raise InputError(what, fix="give file and config of the same model") from error
    return {name: tensor.contiguous() for name, tensor in converted.items()}


def _is_wrapped(home: Path) -> bool:
    """Return whether a text encoder's names begin with text_model, as before transformers 5.6."""
    has_weights = any((home / TEXT).glob("*.safetensors"))
    names = Checkpoint(locate(home, None, TEXT)) if has_weights else ["text_model."]
    return any(name.startswith("text_model.") for name in names)


def _to_ldm(part: str, tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    if part == TEXT:
        known = ("text_model.", "text_projection")
        named = {n if n.startswith(known) else f"text_model.{n}": t for n, t in tensors.items()}
    elif part == UNET:
        layers = config.get("layers_per_block", 2)
        ups = {n.split(".")[1] for n in tensors if re.match(r"up_blocks\.\d+\.att", n)}
        if not isinstance(layers, int):
            fix = "single files have one number of layers in all blocks"
            raise InputError(f"layers_per_block is {layers}", fix=fix)
        named = {_unet_name(name, layers, ups): tensor for name, tensor in tensors.items()}
    else:
        blocks = len({n.split(".")[2] for n in tensors if n.startswith("decoder.up_blocks.")})
        named = {_vae_name(n, blocks): _as_convolution(n, t) for n, t in tensors.items()}
    return {PREFIX[part] + name: tensor for name, tensor in named.items()}


def _unet_name(name: str, layers: int, with_attention: set[str]) -> str:
    from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING

    whole: Mapping[str, str] = DIFFUSERS_TO_LDM_MAPPING["unet"]["layers"]
    if name in whole:
        return whole[name]
    match = re.fullmatch(
        r"(down|up|mid)_blocks?(?:\.(\d+))?"
        r"\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)",
        name,
    )
    if match is None:
        return name
    side, block, kind, number, rest = match[1], match[2] or "0", match[3], int(match[4]), match[5]
    place = int(block) * (layers + 1)
    if side == "mid":
        stem = f"middle_block.{2 * number if kind == 'resnets' else 2 * number + 1}"
    elif kind == "downsamplers":
        return f"input_blocks.{1 + place + layers}.0.op.{rest.removeprefix('conv.')}"
    elif kind == "upsamplers":
        return f"output_blocks.{place + layers}.{2 if block in with_attention else 1}.{rest}"
    else:
        first, blocks = (1, "input_blocks") if side == "down" else (0, "output_blocks")
        stem = f"{blocks}.{first + place + number}.{0 if kind == 'resnets' else 1}"
    return f"{stem}.{_renamed(rest, UNET_RESNET) if kind == 'resnets' else rest}"


def _vae_name(name: str, blocks: int) -> str:
    from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING

    whole: Mapping[str, str] = DIFFUSERS_TO_LDM_MAPPING["vae"]
    if name in whole:
        return whole[name]
    match = re.fullmatch(
        r"(encoder|decoder)\.(down|up|mid)_blocks?(?:\.(\d+))?\.(\w+)\.(\d+)\.(.*)", name
    )
    if match is None:
        return name
    coder, side, kind, number, rest = match[1], match[2], match[4], int(match[5]), match[6]
    if kind == "attentions":
        return f"{coder}.mid.attn_1.{_renamed(rest, VAE_ATTENTION)}"
    rest = rest.replace("conv_shortcut", "nin_shortcut")
    if side == "mid":
        return f"{coder}.mid.block_{number + 1}.{rest}"
    block = int(match[3]) if side == "down" else blocks - 1 - int(match[3])
    if kind == "resnets":
        return f"{coder}.{side}.{block}.block.{number}.{rest}"
    return f"{coder}.{side}.{block}.{kind.removesuffix('rs')}.{rest}"


def _as_convolution(name: str, tensor: Tensor) -> Tensor:
    """Return linear layers of the VAE's attention as the 1 x 1 convolutions that LDM has."""
    linear = re.search(r"\.attentions\.\d+\.to_(?:q|k|v|out\.0)\.weight\Z", name)
    return tensor[:, :, None, None] if linear and tensor.ndim == 2 else tensor


def _renamed(name: str, table: Mapping[str, str]) -> str:
    stem, _, last = name.rpartition(".")
    return f"{table.get(stem, stem)}.{last}"
