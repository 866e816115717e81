"""Stock diffusers pipelines on disk: their folder, and their parts, by allowed stock classes.

No remote code runs, no weight is filled in at random, and no scheduler is replaced by a default. A
part that is missing or foreign is an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from demerge.device import free_bytes
from demerge.diffusion.conditioning import keep_labels
from demerge.diffusion.configs import (
    DenoiserConfig,
    SchedulerConfig,
    TextConfig,
    VaeConfig,
    check_config,
)
from demerge.diffusion.projection import attach_to_blocks
from demerge.errors import InputError, ResourceError, UsageError
from demerge.storage.checkpoint import Checkpoint, modern
from demerge.storage.hub import resolve_model_path
from demerge.storage.layout import COMPONENTS, PROJECTED, component_place, inside, read_index
from demerge.storage.safetensors_header import read_json, read_scheduler
from demerge.storage.schema import Foreign

DENOISERS: Mapping[str, type[diffusers.ModelMixin]] = {
    "UNet2DModel": diffusers.UNet2DModel,
    "UNet2DConditionModel": diffusers.UNet2DConditionModel,
    "DiTTransformer2DModel": diffusers.DiTTransformer2DModel,
    "Transformer2DModel": diffusers.DiTTransformer2DModel,  # its name in facebook/DiT-XL-2-256
}
THIS_CONFIG = "use the config of this very model"
MISFITS = (  # what a model's own parts raise on a config or an input that does not fit
    TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError,
    AssertionError,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """A tokenizer and a CLIP text model, frozen."""

    tokenizer: Any
    model: nn.Module

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Encode B captions into their last hidden states [B L D]."""
        most, device = self.tokenizer.model_max_length, next(self.model.parameters()).device
        how = {"padding": "max_length", "max_length": most, "truncation": True}
        tokens = self.tokenizer(list(captions), return_tensors="pt", **how)
        states: Tensor = self.model(tokens.input_ids.to(device))[0]
        return states


def find_pipeline(model: str | Path) -> Path:
    """Return the pipeline folder of a path, an embedded model or a Hub id.

    A component folder stands for its pipeline.

    Raises:
        InputError: if there is no such folder, or no pipeline in it.
    """
    path = resolve_model_path(model)
    if (path / "model_index.json").is_file():
        return path
    if (path / "config.json").is_file() and (path.parent / "model_index.json").is_file():
        return path.parent
    what = "no model_index.json, so its scheduler is unknown" if path.exists() else "no such folder"
    fix = "name a pipeline folder (model_index.json, scheduler/, unet/ or transformer/)"
    raise InputError(f"{model}: {what}", fix=fix)


def denoiser_part(folder: str | Path) -> str:
    """Return the name of the denoiser's component in a pipeline, `unet` if there is none."""
    index = read_index(Path(folder))
    return next((name for name in COMPONENTS if name in index), "unet")


def load_denoiser(folder: str | Path) -> diffusers.ModelMixin:
    """Load the denoiser in float32, with the W of `--projection paper` if the folder has them.

    Raises:
        InputError: if its class is not supported, or the weights do not fit the config.
    """
    component = denoiser_part(folder)
    name = _class_name(folder, component)
    if name not in DENOISERS:
        what = f"{folder}: denoiser class '{name}' is not supported"
        raise InputError(what, fix=f"use one of {', '.join(DENOISERS)}")
    stock: Callable[[dict[str, Any]], nn.Module] = DENOISERS[name].from_config
    is_projected = (_component_folder(Path(folder), component) / PROJECTED).is_file()
    build = (lambda config: attach_to_blocks(stock(config))) if is_projected else stock
    denoiser: diffusers.ModelMixin = _load(folder, component, DenoiserConfig, build)
    keep_labels(denoiser)
    return denoiser


def build_unet(config: Mapping[str, Any], where: str) -> diffusers.UNet2DModel:
    """Build a UNet with random weights, if its weights fit into memory.

    Raises:
        InputError: if a value has another type or range, or diffusers refuses the config.
        ResourceError: if its weights do not fit into memory.
    """
    build = partial(diffusers.UNet2DModel.from_config, dict(config))
    check_config(config, DenoiserConfig, where)
    with init_empty_weights():
        needed = 4 * sum(p.numel() for p in _built(build, where).parameters())
    free = free_bytes()
    if free is not None and needed > free:
        what = f"{where}: its weights take {needed:,} bytes, {free:,} are free"
        raise ResourceError(what, fix="make it smaller")
    unet: diffusers.UNet2DModel = _built(build, where)
    return unet


def load_vae(folder: str | Path) -> diffusers.AutoencoderKL | None:
    """Load the autoencoder in float32; None if the pipeline has none.

    Raises:
        InputError: if its class is not supported, or the weights do not fit the config.
    """
    if not _has(folder, "vae", "AutoencoderKL"):
        return None
    build = diffusers.AutoencoderKL.from_config
    vae: diffusers.AutoencoderKL = _load(folder, "vae", VaeConfig, build)
    return vae


def load_scheduler(folder: str | Path) -> Any:
    """Load the base's own scheduler.

    Raises:
        InputError: if it is missing, not a scheduler of diffusers, or has no valid schedule.
    """
    folder, name = Path(folder), _class_name(folder, "scheduler")
    kind: Any = getattr(diffusers, name, None)
    if diffusers.SchedulerMixin not in getattr(kind, "__mro__", ()):
        what = f"{folder}: scheduler class '{name}' is unknown to diffusers"
        raise InputError(what, fix="use a stock scheduler")
    path = inside(folder, _component_folder(folder, "scheduler") / "scheduler_config.json")
    return build_scheduler(read_scheduler(path), kind, str(path))


def build_scheduler(config: Mapping[str, Any], kind: Any, where: str) -> Any:
    """Build a scheduler of a class of diffusers from its config.

    Raises:
        InputError: if a value has another type or range, or the schedule is not one.
    """
    check_config(config, SchedulerConfig, where)
    scheduler = _built(lambda: kind.from_config(dict(config)), where)
    abar = getattr(scheduler, "alphas_cumprod", None)
    if isinstance(abar, Tensor):
        has_all = len(abar) == scheduler.config.num_train_timesteps
        if not has_all or not bool(((abar >= 0) & (abar <= 1)).all()):
            what = f"{where}: its betas give no schedule of signal in [0, 1]"
            raise InputError(what, fix=THIS_CONFIG)
    return scheduler


def load_text(folder: str | Path) -> TextEncoder | None:
    """Load the tokenizer and the text encoder in float32; None if the pipeline has none.

    Raises:
        UsageError: if transformers is not installed.
        InputError: if a class is not supported, the weights do not fit the config, or the tokenizer
            does not fit the encoder.
    """
    if not _has(folder, "text_encoder", "CLIPTextModel"):
        return None
    try:
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    except ImportError as error:
        what = "the base takes text, which needs transformers"
        raise UsageError(what, fix="pip install 'demerge[sd]'") from error

    def build(config: dict[str, Any]) -> Any:
        return CLIPTextModel(CLIPTextConfig.from_dict(config))

    model = _load(folder, "text_encoder", TextConfig, build)
    where = _checked_folder(folder, "tokenizer")
    tokenizer = _built(lambda: CLIPTokenizer.from_pretrained(where), str(where))
    most, length = model.config.max_position_embeddings, tokenizer.model_max_length
    is_short = type(length) is int and 0 < length <= most
    if not is_short or len(tokenizer) > model.config.vocab_size:
        texts = f"{len(tokenizer):,} tokens in texts of up to {str(length)[:40]}"
        encoder = f"the text encoder takes {model.config.vocab_size:,} in {most:,}"
        fix = "use the tokenizer of this text encoder"
        raise InputError(f"{where}: {texts}; {encoder}", fix=fix)
    return TextEncoder(tokenizer, model)


def _component_folder(folder: Path, name: str) -> Path:
    """Return the folder of a component; old pipelines of one model keep it in their own."""
    return folder / name if (folder / name).is_dir() else folder


def _class_name(folder: str | Path, component: str) -> str:
    match read_index(Path(folder)).get(component):
        case [_, str(name)]:
            return name
    what = f"{folder}/model_index.json: no component '{component}'"
    raise InputError(what, fix="use a pipeline with scheduler, and unet or transformer")


def _has(folder: str | Path, component: str, kind: str) -> bool:
    """Return whether the pipeline has a component; check that it is of the supported class."""
    if read_index(Path(folder)).get(component) in (None, [None, None]):
        return False
    name = _class_name(folder, component)
    if name != kind:
        what = f"{folder}: {component} is of class '{name}', which is not supported"
        raise InputError(what, fix=f"use a base with {kind}")
    return True


def _checked_folder(folder: str | Path, component: str) -> Path:
    """Return the folder of a component whose files are all inside the pipeline's."""
    folder = Path(folder)
    found = _component_folder(folder, component)
    if found == folder and not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no folder '{component}'", fix="fetch the whole pipeline")
    for file in [found, *found.iterdir()]:
        inside(folder, file)
    return found


def _load(
    folder: str | Path, component: str, kind: type[Foreign], build: Callable[[dict[str, Any]], Any]
) -> Any:
    """Build a component without memory, compare it with its weights file, and only then load it."""
    where = _checked_folder(folder, component)
    weights = Checkpoint(component_place(where, projected=True))
    config = read_json(where / "config.json")
    check_config(config, kind, f"{where}/config.json", len(weights))
    with init_empty_weights(include_buffers=False):
        model = _built(lambda: build(config), f"{where}/config.json")
    stored = {_bare(name): name for name in weights}
    state = model.state_dict()
    shapes = {stored.get(_bare(name), name): tuple(state[name].shape) for name in state}
    _check_keys(weights, shapes, f"{where}: the weights do not fit the config")
    values = {}
    for name in state:
        tensor = weights[stored[_bare(name)]]
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        values[name] = tensor.to(dtype, copy=True)
    model.load_state_dict(values, assign=True)
    return model


def _check_keys(weights: Checkpoint, shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Check names and shapes of weights; a `position_ids` of older files may be extra."""
    extra = [name for name in weights if not name.endswith("position_ids")]
    stored = {name: weights.specs[name].shape for name in shapes if name in weights}
    other = [f"{n} {list(s)} for {list(shapes[n])}" for n, s in stored.items() if s != shapes[n]]
    problems = {
        "missing": [name for name in shapes if name not in stored],
        "unknown": [name for name in extra if name not in shapes],
        "of another shape": other,
    }
    parts = [f"{len(n)} {kind}: {', '.join(n[:3])}" for kind, n in problems.items() if n]
    if parts:
        files = ", ".join(file.name for file in weights.place.files[:3])
        fix = "fetch weights and config of one model again"
        raise InputError(f"{what}: {files} has {'; '.join(parts)}", fix=fix)


def _bare(name: str) -> str:
    """Return the name of a tensor, whatever the version of the library that wrote it."""
    return modern(name).removeprefix("text_model.")


@contextmanager
def running(what: object) -> Iterator[None]:
    """Turn an error of a model's own parts into one that names the model.

    Raises:
        InputError: with the words of the library that it came from.
        ResourceError: if there is not enough memory; an accelerator's own error is passed on.
    """
    try:
        yield
    except MISFITS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = _reason(error)
        if "memory" in str(error):
            message = f"{what} needs more memory than this machine has: {reason}"
            raise ResourceError(message, fix="use a smaller batch") from error
        fix = "use the configs of this very model"
        raise InputError(f"{what} cannot be run: {reason}", fix=fix) from error


def _built(make: Callable[[], Any], where: str) -> Any:
    """Return what a library builds from a foreign file; any error is the file's fault."""
    try:
        return make()
    except Exception as error:
        fix = "use the file of this very model"
        raise InputError(f"{where}: cannot be loaded: {_reason(error)}", fix=fix) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
