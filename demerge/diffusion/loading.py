"""Stock diffusers pipelines on disk: where one lies, and its parts, loaded by stock classes from an allow-list.

No remote code ever runs, no weight is filled in at random, and no scheduler is replaced by a default: a part that is missing or
foreign is an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from demerge.errors import InputError, ResourceError, UsageError
from demerge.storage.checkpoint import Checkpoint, modern
from demerge.storage.hub import resolve_model_path
from demerge.storage.layout import COMPONENTS, component_place, inside
from demerge.storage.safetensors_header import read_json, read_scheduler
from demerge.storage.schema import Foreign

DENOISERS: Mapping[str, type[diffusers.ModelMixin]] = {
    "UNet2DModel": diffusers.UNet2DModel,
    "UNet2DConditionModel": diffusers.UNet2DConditionModel,
    "DiTTransformer2DModel": diffusers.DiTTransformer2DModel,
    "Transformer2DModel": diffusers.DiTTransformer2DModel,  # its name in older files, as those of facebook/DiT-XL-2-256
}


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """A tokenizer and a CLIP text model, frozen."""

    tokenizer: Any
    model: nn.Module

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Encode B captions into their last hidden states [B L D]."""
        tokens = self.tokenizer(
            list(captions),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        states: Tensor = self.model(tokens.input_ids.to(next(self.model.parameters()).device))[0]
        return states


def find_pipeline(model: str | Path) -> Path:
    """Return the pipeline folder of a path, an embedded model or a Hub id; a component folder stands for its pipeline.

    Raises:
        InputError: where there is no such folder, or no pipeline in it.
    """
    path = resolve_model_path(model)
    for folder in (path, path.parent):
        if (folder / "model_index.json").is_file() and (
            folder == path or (path / "config.json").is_file()
        ):
            return folder
    what = (
        "no model_index.json there, so no scheduler is known" if path.exists() else "no such folder"
    )
    raise InputError(
        f"{model}: {what}",
        fix="name a pipeline folder (model_index.json, scheduler/, unet/ or transformer/)",
    )


def part(folder: Path, name: str) -> Path:
    """Return the folder of a component; older pipelines of one model keep it in the pipeline's own."""
    return folder / name if (folder / name).is_dir() else folder


def _class_name(folder: Path, index: Mapping[str, Any], part: str) -> str:
    entry = index.get(part)
    if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)):
        raise InputError(
            f"{folder}/model_index.json: no component '{part}'",
            fix="use a pipeline with scheduler, and unet or transformer",
        )
    return entry[1]


def denoiser_part(index: Mapping[str, Any]) -> str:
    """Return the name of the denoiser's component in a pipeline's index, `unet` where there is none."""
    return next((name for name in COMPONENTS if name in index), "unet")


def load_denoiser(folder: Path, index: Mapping[str, Any]) -> diffusers.ModelMixin:
    """Load the denoiser in float32.

    Raises:
        InputError: where its class is not supported, or the weights do not fit the config.
    """
    component = denoiser_part(index)
    name = _class_name(folder, index, component)
    if name not in DENOISERS:
        raise InputError(
            f"{folder}: denoiser class '{name}' is not supported",
            fix=f"use one of {', '.join(DENOISERS)}",
        )
    denoiser: diffusers.ModelMixin = _load(
        folder, component, DenoiserConfig, DENOISERS[name].from_config
    )
    keep_labels(denoiser)
    return denoiser


def make_unet(config: Mapping[str, Any], where: str) -> diffusers.UNet2DModel:
    """Make a UNet with random weights, once its size is known to fit into memory.

    Raises:
        InputError: where a value has another type or range, or diffusers refuses the config.
        ResourceError: where its weights do not fit into memory.
    """
    check_config(config, DenoiserConfig, where)
    with init_empty_weights():
        empty = _built(lambda: diffusers.UNet2DModel.from_config(dict(config)), where)
    needed, free = 4 * sum(p.numel() for p in empty.parameters()), free_bytes()
    if free is not None and needed > free:
        raise ResourceError(
            f"{where}: its weights take {needed:,} bytes, {free:,} are free", fix="make it smaller"
        )
    unet: diffusers.UNet2DModel = _built(
        lambda: diffusers.UNet2DModel.from_config(dict(config)), where
    )
    return unet


def load_vae(folder: Path, index: Mapping[str, Any]) -> diffusers.AutoencoderKL | None:
    """Load the autoencoder in float32; None where the pipeline has none.

    Raises:
        InputError: where its class is not supported, or the weights do not fit the config.
    """
    if not _has(folder, index, "vae", "AutoencoderKL"):
        return None
    vae: diffusers.AutoencoderKL = _load(
        folder, "vae", VaeConfig, diffusers.AutoencoderKL.from_config
    )
    return vae


def load_scheduler(folder: Path, index: Mapping[str, Any]) -> Any:
    """Load the base's own scheduler.

    Raises:
        InputError: where it is missing, no scheduler of diffusers, or its schedule is none.
    """
    name = _class_name(folder, index, "scheduler")
    kind: Any = getattr(diffusers, name, None)
    if diffusers.SchedulerMixin not in getattr(kind, "__mro__", ()):
        raise InputError(
            f"{folder}: scheduler class '{name}' is unknown to diffusers",
            fix="use a stock scheduler",
        )
    path = inside(folder, part(folder, "scheduler") / "scheduler_config.json")
    return make_scheduler(read_scheduler(path), kind, str(path))


def make_scheduler(config: Mapping[str, Any], kind: Any, where: str) -> Any:
    """Make a scheduler of a class of diffusers from its config.

    Raises:
        InputError: where a value has another type or range, or the schedule is not one.
    """
    check_config(config, SchedulerConfig, where)
    scheduler = _built(lambda: kind.from_config(dict(config)), where)
    abar = getattr(scheduler, "alphas_cumprod", None)
    if isinstance(abar, Tensor) and not (
        len(abar) == scheduler.config.num_train_timesteps
        and bool(((abar >= 0) & (abar <= 1)).all())
    ):
        raise InputError(
            f"{where}: its betas give no schedule of signal in [0, 1]",
            fix="use the config of this very model",
        )
    return scheduler


def load_text(folder: Path, index: Mapping[str, Any]) -> TextEncoder | None:
    """Load the tokenizer and the text encoder in float32; None where the pipeline has none.

    Raises:
        UsageError: where transformers is not installed.
        InputError: where a class is not supported, the weights do not fit the config, or the tokenizer not the encoder.
    """
    if not _has(folder, index, "text_encoder", "CLIPTextModel"):
        return None
    try:
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    except ImportError as error:
        raise UsageError(
            "the base takes text, which needs transformers", fix="pip install 'demerge[sd]'"
        ) from error
    model = _load(
        folder,
        "text_encoder",
        TextConfig,
        lambda config: CLIPTextModel(CLIPTextConfig.from_dict(config)),
    )
    where = _folder(folder, "tokenizer")
    tokenizer = _built(lambda: CLIPTokenizer.from_pretrained(where), str(where))
    config, length = model.config, tokenizer.model_max_length
    if (
        type(length) is not int
        or not 0 < length <= config.max_position_embeddings
        or len(tokenizer) > config.vocab_size
    ):
        raise InputError(
            f"{where}: {len(tokenizer):,} tokens in texts of up to {str(length)[:40]}; the text encoder takes "
            f"{config.vocab_size:,} in {config.max_position_embeddings:,}",
            fix="use the tokenizer of this text encoder",
        )
    return TextEncoder(tokenizer, model)


# -- one component -------------------------------------------------------------------------------------------------------


def _has(folder: Path, index: Mapping[str, Any], part: str, kind: str) -> bool:
    """Whether the pipeline has a part, which is then of the one class that is supported."""
    if index.get(part) is None or index[part] == [None, None]:
        return False
    name = _class_name(folder, index, part)
    if name != kind:
        raise InputError(
            f"{folder}: {part} is of class '{name}', which is not supported",
            fix=f"use a base with {kind}",
        )
    return True


def _folder(folder: Path, component: str) -> Path:
    """Return the folder of a component whose files all lie in the pipeline's.

    Raises:
        InputError: where there is none, or a link leads out of it.
    """
    found = part(folder, component)
    if found == folder and not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no folder '{component}'", fix="fetch the whole pipeline")
    for file in [found, *found.iterdir()]:
        inside(folder, file)
    return found


def _load(
    folder: Path, component: str, kind: type[Foreign], build: Callable[[dict[str, Any]], Any]
) -> Any:
    """Build a component without memory, hold it against its weights file by file, name and shape, and only then read them."""
    where = _folder(folder, component)
    weights = Checkpoint(component_place(where))
    config = read_json(where / "config.json")
    check_config(config, kind, f"{where}/config.json", len(weights))
    with init_empty_weights(include_buffers=False):
        model = _built(lambda: build(config), f"{where}/config.json")
    names = {_bare(name): name for name in weights}
    wanted = {_bare(name): name for name in model.state_dict()}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_keys(
        weights,
        {names.get(bare, name): shapes[name] for bare, name in wanted.items()},
        f"{where}: the weights do not fit the config",
    )
    model.load_state_dict(
        {name: _copied(weights[names[bare]]) for bare, name in wanted.items()}, assign=True
    )
    return model


def _copied(tensor: Tensor) -> Tensor:
    """Return a tensor in memory of its own, floating point in float32."""
    return tensor.to(torch.float32, copy=True) if tensor.is_floating_point() else tensor.clone()


def check_keys(weights: Checkpoint, shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Refuse weights that are not of these names and shapes; a `position_ids` of older files is a constant and may be more.

    Raises:
        InputError: naming the file and the first keys that are missing, too many, or of another shape.
    """
    missing = [name for name in shapes if name not in weights]
    more = [name for name in weights if name not in shapes and not name.endswith("position_ids")]
    other = [
        f"{name} {list(weights.specs[name].shape)} for {list(shape)}"
        for name, shape in shapes.items()
        if name in weights and weights.specs[name].shape != shape
    ]
    found = {"missing": missing, "unknown": more, "of another shape": other}
    listed = [
        f"{len(names)} {kind}: {', '.join(names[:3])}" for kind, names in found.items() if names
    ]
    if listed:
        files = ", ".join(file.name for file in weights.place.files[:3])
        raise InputError(
            f"{what}: {files} has {'; '.join(listed)}",
            fix="fetch weights and config of one model again",
        )


def _bare(name: str) -> str:
    """Return the name of a tensor whatever the version of the library that wrote it."""
    return modern(name).removeprefix("text_model.")


@contextmanager
def running(what: object) -> Iterator[None]:
    """Say of a model whose parts cannot compute what they were loaded for that its configs do not fit.

    Raises:
        InputError: with the words of the library that it came from.
        ResourceError: if this machine's memory does not suffice; an accelerator's own error is passed on.
    """
    try:
        yield
    except (
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
        AssertionError,
    ) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if "memory" in str(error):
            raise ResourceError(
                f"{what} needs more memory than there is: {said}", fix="use a smaller batch"
            ) from error
        raise InputError(
            f"{what} cannot be run: {said}", fix="use the configs of this very model"
        ) from error


def _built(make: Callable[[], Any], where: str) -> Any:
    """Return what a library makes of a foreign file; whatever it raises is the file's fault.

    Raises:
        InputError: with the library's words.
    """
    try:
        return make()
    except Exception as error:
        what = " ".join(str(error).split())[:200]
        raise InputError(
            f"{where}: cannot be loaded: {type(error).__name__}: {what}",
            fix="use the file of this very model",
        ) from error
