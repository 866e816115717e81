"""Stock diffusers pipelines on disk: their folder, and their parts, by allowed stock classes.

No scheduler is replaced by a default; see also `demerge.diffusion.components`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
from accelerate import init_empty_weights
from torch import Tensor, nn

from demerge.device import free_bytes
from demerge.diffusion.components import (
    built,
    class_name,
    component_folder,
    find_class,
    load_component,
)
from demerge.diffusion.configs import (
    CONFIGS,
    DenoiserConfig,
    SchedulerConfig,
    VaeConfig,
    check_config,
)
from demerge.diffusion.families import DENOISERS, Family, Text, family_of
from demerge.diffusion.projection import attach_to_blocks
from demerge.errors import InputError, ResourceError
from demerge.storage.hub import resolve_model_path
from demerge.storage.layout import COMPONENTS, PROJECTED, SECOND, inside, read_index
from demerge.storage.safetensors_header import read_json, read_scheduler

THIS_CONFIG = "use the config of this very model"


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


def find_component(model: str | Path) -> str | None:
    """Return the denoiser that a path names inside its pipeline; None if it names the pipeline."""
    path = resolve_model_path(model)
    is_named = path.name in (*COMPONENTS, SECOND) and not (path / "model_index.json").is_file()
    return path.name if is_named else None


def denoiser_part(folder: str | Path) -> str:
    """Return the name of the denoiser's component in a pipeline, `unet` if there is none."""
    index = read_index(Path(folder))
    return next((name for name in COMPONENTS if name in index), "unet")


def load_denoiser(folder: str | Path, component: str | None = None) -> diffusers.ModelMixin:
    """Load a denoiser in float32, with the W of `--projection paper` if the folder has them.

    Args:
        component: `denoiser_part` by default.

    Raises:
        InputError: if its class is not supported, or the weights do not fit the config.
    """
    component = component or denoiser_part(folder)
    name = class_name(folder, component)
    family = _family(folder, component)
    stock: Callable[[dict[str, Any]], nn.Module] = family.denoisers[name].from_config
    is_projected = (component_folder(Path(folder), component) / PROJECTED).is_file()
    build = (lambda config: attach_to_blocks(stock(config))) if is_projected else stock
    denoiser: diffusers.ModelMixin = load_component(
        folder, component, CONFIGS.get(name, DenoiserConfig), build
    )
    family.prepare(denoiser)
    return denoiser


def _family(folder: str | Path, component: str) -> type[Family]:
    name = class_name(folder, component)
    if name not in DENOISERS:
        what = f"{folder}: denoiser class '{name}' is not supported"
        raise InputError(what, fix=f"use one of {', '.join(DENOISERS)}")
    config = read_json(component_folder(Path(folder), component) / "config.json")
    return family_of(name, config)


def build_unet(config: Mapping[str, Any], where: str) -> diffusers.UNet2DModel:
    """Build a UNet with random weights, if its weights fit into memory.

    Raises:
        InputError: if a value has another type or range, or diffusers refuses the config.
        ResourceError: if its weights do not fit into memory.
    """
    build = partial(diffusers.UNet2DModel.from_config, dict(config))
    check_config(config, DenoiserConfig, where)
    with init_empty_weights():
        needed = 4 * sum(p.numel() for p in built(build, where).parameters())
    free = free_bytes()
    if free is not None and needed > free:
        what = f"{where}: its weights take {needed:,} bytes, {free:,} are free"
        raise ResourceError(what, fix="make it smaller")
    unet: diffusers.UNet2DModel = built(build, where)
    return unet


def load_vae(folder: str | Path) -> diffusers.ModelMixin | None:
    """Load the autoencoder in float32; None if the pipeline has none.

    Raises:
        InputError: if its class is not supported, or the weights do not fit the config.
    """
    classes = _family(folder, denoiser_part(folder)).autoencoders
    name = find_class(folder, "vae", classes)
    if name is None:
        return None
    kind, build = CONFIGS.get(name, VaeConfig), classes[name].from_config
    vae: diffusers.ModelMixin = load_component(folder, "vae", kind, build)
    return vae


def load_scheduler(folder: str | Path) -> Any:
    """Load the base's own scheduler.

    Raises:
        InputError: if it is missing, not a scheduler of diffusers, or has no valid schedule.
    """
    folder, name = Path(folder), class_name(folder, "scheduler")
    kind: Any = getattr(diffusers, name, None)
    if diffusers.SchedulerMixin not in getattr(kind, "__mro__", ()):
        what = f"{folder}: scheduler class '{name}' is unknown to diffusers"
        raise InputError(what, fix="use a stock scheduler")
    path = inside(folder, component_folder(folder, "scheduler") / "scheduler_config.json")
    return build_scheduler(read_scheduler(path), kind, str(path))


def build_scheduler(config: Mapping[str, Any], kind: Any, where: str) -> Any:
    """Build a scheduler of a class of diffusers from its config.

    Raises:
        InputError: if a value has another type or range, or the schedule is not one.
    """
    check_config(config, SchedulerConfig, where)
    scheduler = built(lambda: kind.from_config(dict(config)), where)
    abar = getattr(scheduler, "alphas_cumprod", None)
    if isinstance(abar, Tensor):
        has_all = len(abar) == scheduler.config.num_train_timesteps
        if not has_all or not bool(((abar >= 0) & (abar <= 1)).all()):
            what = f"{where}: its betas give no schedule of signal in [0, 1]"
            raise InputError(what, fix=THIS_CONFIG)
    return scheduler


def load_text(folder: str | Path) -> Text | None:
    """Load the text encoders in float32 with their tokenizers; None if the pipeline has none.

    Raises:
        UsageError: if transformers is not installed.
        InputError: if a class is not supported, the weights do not fit the config, or a tokenizer
            does not fit its encoder.
    """
    return _family(folder, denoiser_part(folder)).load_text(Path(folder))
