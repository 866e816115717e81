"""Single files in the layout of the original code, and pipeline folders.

    model.diffusion_model.*   first_stage_model.*   cond_stage_model.*, conditioner.* and so on
    unet/ or transformer/     vae/                  text_encoder/, text_encoder_2/, text_encoder_3/

A file becomes a folder by diffusers' own converters, of every denoiser that has one; configs,
scheduler and tokenizers come from a local pipeline of the same kind. diffusers has no way back:
names and shapes are inverted here, and what is written is held against its converters, which must
give the pipeline back to the bit. Pipelines of Stable Diffusion 1.x and XL become one file; of
others, the denoiser does.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
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
from demerge.storage.layout import SECOND, inside, locate, read_index
from demerge.storage.names import find_family
from demerge.storage.names.tensors import Renamed
from demerge.storage.safetensors_header import read_json, read_scheduler
from demerge.storage.schema import Foreign

if TYPE_CHECKING:
    from torch import Tensor

UNET, TRANSFORMER, VAE, TEXT = "unet", "transformer", "vae", "text_encoder"
DENOISER = PREFIXES[0]
VAES = ("first_stage_model.", "vae.")
CLIP, PROJECTED, T5 = "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"
SD_CLIP, XL_CLIP = "cond_stage_model.transformer.", "conditioner.embedders.0.transformer."
OPEN_CLIP = ("cond_stage_model.model.", "conditioner.embedders.1.model.")
TEXTS: Mapping[tuple[str, str], tuple[str, ...]] = {  # part, class -> prefixes
    (TEXT, CLIP): (SD_CLIP, OPEN_CLIP[0], XL_CLIP, "text_encoders.clip_l.transformer."),
    (TEXT, PROJECTED): ("text_encoders.clip_l.transformer.",),
    ("text_encoder_2", PROJECTED): (OPEN_CLIP[1], "text_encoders.clip_g.transformer."),
    ("text_encoder_2", T5): ("text_encoders.t5xxl.transformer.",),
    ("text_encoder_3", T5): ("text_encoders.t5xxl.transformer.",),
}
PARTS = (UNET, TRANSFORMER, VAE, TEXT, "text_encoder_2", "text_encoder_3")
OTHER_PREFIXES = (*VAES, "cond_stage_model.", "conditioner.", "text_encoders.")
WEIGHTS = (".safetensors", ".bin", ".msgpack", ".h5", ".ckpt", ".onnx")
QUICK = "quick_gelu"  # the activation of CLIP in 1.x; that of 2.x, OpenCLIP, has other names
Tensors = dict[str, "Tensor"]

# diffusers' name -> LDM's; numbers follow from groups and layers per block
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
    kinds = _find_kinds(home)
    file = Checkpoint(locate(source))
    _check_markers(source, file, home)
    check_disk_space(out, sum(spec.stop - spec.start for spec in file.specs.values()))
    held = dict(_prefixed_names(file))
    converted = {part: _to_diffusers(part, kinds[part], held, home) for part in kinds}
    if not converted.get(UNET) and not converted.get(TRANSFORMER):
        what = f"{source}: no tensor of a denoiser in the layout of the original code"
        raise InputError(what, fix="name a single file, of the kind of --config")
    with commit_dir(out) as folder:
        made = {part: tensors for part, tensors in converted.items() if tensors}
        _copy_configs(home, folder, set(made))
        for part, tensors in made.items():
            commit_tensors(folder / part / _file_name(part), tensors, {"format": "pt"})
        _check_fit(source, folder, {part: kinds[part] for part in made})
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
    kinds = _find_kinds(source)
    if TRANSFORMER in kinds:
        kinds = {TRANSFORMER: kinds[TRANSFORMER]}
    _check_writable(source, kinds)
    parts = {part: dict(Checkpoint(locate(source, None, part))) for part in kinds}
    made: Tensors = {}
    for part, tensors in parts.items():
        made |= _to_original(part, tensors, is_xl="text_encoder_2" in kinds)
    for part, tensors in parts.items():
        back = _to_diffusers(part, kinds[part], made, source)
        same = {n for n in tensors.keys() & back if tensors[n].dtype == back[n].dtype}
        same = {name for name in same if torch.equal(tensors[name], back[name])}
        lost = [name for name in {**tensors, **back} if name not in same]
        if lost:
            listing = f"{len(lost)} tensors as they are: {', '.join(lost[:5])}"
            what = f"{source}/{part}: the layout of single files does not hold {listing}"
            raise InputError(what, fix="keep the folder")
    check_disk_space(out, sum(tensor.nbytes for tensor in made.values()))
    commit_tensors(out, made, {"format": "pt"})
    return len(made)


def _file_name(part: str) -> str:
    return f"{'model' if part.startswith(TEXT) else 'diffusion_pytorch_model'}.safetensors"


def _find_kinds(folder: Path) -> dict[str, str]:
    """Return the classes of a pipeline's parts, once it is known to be one that is converted.

    Raises:
        InputError: if it is not.
    """
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    fix = "name a pipeline folder of one denoiser that diffusers has a converter for"
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{folder}: not a pipeline folder with a model_index.json", fix=fix)
    values = {name: entry for name, entry in read_index(folder).items() if isinstance(entry, list)}
    kinds = {name: entry[-1] for name, entry in values.items() if entry and entry[-1] is not None}
    denoisers = [name for name in (UNET, TRANSFORMER) if name in kinds]
    unlike = [f"{n} {kinds[n]}" for n in denoisers if kinds[n] not in SINGLE_FILE_LOADABLE_CLASSES]
    if len(denoisers) != 1 or SECOND in kinds:
        unlike.append(f"{SECOND}, a second denoiser" if SECOND in kinds else "no denoiser")
    if unlike:
        what = f"{folder}: this kind of pipeline is not converted: {', '.join(unlike)}"
        raise InputError(what, fix=fix)
    known = {*denoisers, *(part for part in (VAE,) if kinds.get(part) == "AutoencoderKL")}
    known |= {part for part, kind in TEXTS if kinds.get(part) == kind}
    return {part: kinds[part] for part in PARTS if part in known}


def _check_writable(folder: Path, kinds: Mapping[str, str]) -> None:
    """Check that all parts of a pipeline with a UNet have a place in a single file."""
    if UNET not in kinds:
        return
    index = read_index(folder)
    others = ("text_encoder_3", "image_encoder", VAE, TEXT, "text_encoder_2")
    unlike = [name for name in others
              if name not in kinds and index.get(name) not in (None, [None, None])]  # fmt: skip
    if TEXT in kinds and _config(folder, TEXT).get("hidden_act", QUICK) != QUICK:
        unlike.append("an OpenCLIP text encoder")
    if unlike:
        what = f"{folder}: this kind of pipeline is not converted: {', '.join(unlike)}"
        fix = "keep the folder; Stable Diffusion 1.x and XL can be written as a single file"
        raise InputError(what, fix=fix)


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


def _prefixed_names(file: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors without wrappers; a denoiser that stands alone gets its prefix."""
    names = {WRAPPER.sub("", name): name for name in file}
    is_bare = not any(name.startswith(DENOISER) for name in names)
    for plain, name in names.items():
        is_denoiser = is_bare and not plain.startswith(OTHER_PREFIXES)
        bare = plain.removeprefix(PREFIXES[1])
        yield DENOISER + bare if is_denoiser else plain, file[name]


def _copy_configs(home: Path, out: Path, converted: set[str]) -> None:
    """Copy all parts, those that are converted without their weights."""
    index = read_index(home)
    parts = [name for name, value in index.items() if isinstance(value, list)]
    copied = [name for name in parts if name != "safety_checker" and (home / name).is_dir()]
    for name in copied:
        for file in (file for file in sorted((home / name).iterdir()) if file.is_file()):
            inside(home, file)
            if name not in converted or not (file.suffix in WEIGHTS or ".index." in file.name):
                (out / name).mkdir(exist_ok=True)
                shutil.copyfile(file, out / name / file.name)
    kept = {n: value for n, value in index.items() if n not in parts or n in copied}
    empty = {name: [None, None] for name in parts if name not in kept}
    commit_json(out / "model_index.json", {**kept, **empty})


class PartConfig(Foreign):
    """A component's config.json; its class checks the values."""


def _check_fit(source: Path, folder: Path, kinds: Mapping[str, str]) -> None:
    """Build what was written without memory, and compare names and shapes."""
    import diffusers
    import transformers

    from demerge.diffusion.components import check_component

    def builder(kind: str) -> Callable[[dict[str, Any]], Any]:
        if kind in (CLIP, PROJECTED, T5):
            text: Any = getattr(transformers, kind)
            return lambda config: text(text.config_class.from_dict(config))
        built: Callable[[dict[str, Any]], Any] = getattr(diffusers, kind).from_config
        return built

    try:
        for part, kind in kinds.items():
            check_component(folder, part, PartConfig, builder(kind))
    except InputError as error:
        what = f"{source} does not fit --config: {error.what.replace(f'{folder}/', '')}"
        raise InputError(what, fix="give a --config of the same kind of model") from error


def _to_diffusers(part: str, kind: str, held: Tensors, home: Path) -> Tensors:
    """Return a part of a single file in diffusers' names, by its converters; empty if absent."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    prefixes = TEXTS.get((part, kind), VAES if part == VAE else (DENOISER,))
    prefix = next((p for p in prefixes if any(name.startswith(p) for name in held)), None)
    if prefix is None:
        return {}
    mine = {name: tensor for name, tensor in held.items() if name.startswith(prefix)}
    config, count = _config(home, part), len(mine)
    try:
        if part.startswith(TEXT):
            converted = _convert_text(mine, prefix, config)
        else:
            convert = SINGLE_FILE_LOADABLE_CLASSES[kind]["checkpoint_mapping_fn"]
            converted = convert(mine, config={"layers_per_block": 2, **config})
    except Exception as error:  # of any kind: the converters take names and config as they come
        reason = f"{type(error).__name__}: {error}"
        what = f"diffusers cannot convert the {part} by {home}/{part}/config.json: {reason}"
        raise InputError(what, fix="give file and config of the same model") from error
    if mine and len(mine) < count and not part.startswith(TEXT):  # it takes what it knows out
        what = f"diffusers' converter does not know {len(mine)} tensors of the {part}"
        fix = "give file and config of the same model"
        raise InputError(f"{what}: {', '.join(list(mine)[:5])}", fix=fix)
    if kind == CLIP:
        converted.pop("text_projection.weight", None)
        if not _is_wrapped(home, part):
            converted = {n.removeprefix("text_model."): t for n, t in converted.items()}
    named = {n: t for n, t in converted.items() if not n.endswith("position_ids")}
    return {name: tensor.contiguous() for name, tensor in named.items()}


def _convert_text(held: Tensors, prefix: str, config: Mapping[str, Any]) -> Tensors:
    from diffusers.loaders import single_file_utils as stock

    converted: Tensors
    if prefix in OPEN_CLIP:
        model = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
        converted = stock.convert_open_clip_checkpoint(model, held, prefix)
    else:
        converted = {name.removeprefix(prefix): tensor for name, tensor in held.items()}
    return converted


def _is_wrapped(home: Path, part: str) -> bool:
    """Return whether a text encoder's names begin with text_model, as before transformers 5.6."""
    has_weights = any((home / part).glob("*.safetensors"))
    names = Checkpoint(locate(home, None, part)) if has_weights else ["text_model."]
    return any(name.startswith("text_model.") for name in names)


def _to_original(part: str, tensors: Tensors, *, is_xl: bool) -> Tensors:
    """Return a part of a pipeline in the names of a single file."""
    if part == VAE:
        blocks = len({n.split(".")[2] for n in tensors if n.startswith("decoder.up_blocks.")})
        named = {_vae_name(n, blocks): _as_convolution(n, t) for n, t in tensors.items()}
        return {VAES[0] + name: tensor for name, tensor in named.items()}
    if part.startswith(TEXT):
        known = ("text_model.", "text_projection")
        named = {n if n.startswith(known) else f"text_model.{n}": t for n, t in tensors.items()}
        if part != TEXT:
            return {OPEN_CLIP[1] + name: tensor for name, tensor in _to_open_clip(named).items()}
        return {(XL_CLIP if is_xl else SD_CLIP) + name: tensor for name, tensor in named.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        renamed = Renamed(tensors, shapes, find_family(tensors), to_original=True)
    except ValueError as error:
        what = f"the names of single files do not hold the {part}: {error}"
        raise InputError(what, fix="keep the folder") from error
    return {DENOISER + name: tensor for name, tensor in renamed.items()}


def _to_open_clip(tensors: Tensors) -> Tensors:
    """Return a CLIP text encoder in the names of OpenCLIP, which joins q, k and v."""
    import torch
    from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING

    outside: Mapping[str, str] = DIFFUSERS_TO_LDM_MAPPING["openclip"]["layers"]
    made: Tensors = {}
    for name, tensor in tensors.items():
        joined = re.fullmatch(r"(.*\.self_attn)\.q_proj\.(weight|bias)", name)
        if name in outside:
            made[outside[name]] = tensor.T if name == "text_projection.weight" else tensor
        elif joined:
            parts = [tensors[f"{joined[1]}.{x}_proj.{joined[2]}"] for x in "qkv"]
            made[f"{_open_clip_name(joined[1])}.in_proj_{joined[2]}"] = torch.cat(parts)
        elif not re.search(r"\.self_attn\.[kv]_proj\.", name):
            made[_open_clip_name(name)] = tensor
    return made


def _open_clip_name(name: str) -> str:
    for new, old in (
        ("text_model.encoder.layers.", "transformer.resblocks."),
        ("layer_norm1", "ln_1"),
        ("layer_norm2", "ln_2"),
        (".fc1.", ".c_fc."),
        (".fc2.", ".c_proj."),
        (".self_attn", ".attn"),
    ):
        name = name.replace(new, old)
    return name


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
