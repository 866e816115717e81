"""A diffusion model: denoiser, noise schedule and, if it has them, text encoder and autoencoder.

    q(x_t | x_0):      x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,    eps ~ N(0, I), t in [0, T)
    target y:          epsilon       eps
                       v_prediction  sqrt(abar_t) eps - sqrt(1 - abar_t) x_0
                       sample        x_0
    loss at t:         |y - f(x_t, t, c)|^2, averaged over the elements of one sample
    SNR(t):            abar_t / (1 - abar_t)

abar, the prediction type and T are the base's own, read from its scheduler's config; nothing is
filled in by a default. Models are stock diffusers pipelines, read by `demerge.diffusion.loading`:
UNet2DModel, UNet2DConditionModel with a CLIP text encoder and an AutoencoderKL, or a DiT with class
labels and an AutoencoderKL. The condition c is that of `demerge.diffusion.conditioning`. Of a
denoiser that also learns the variance (a DiT: 2 C channels) the first C channels are f.

Papers: DDPM (arXiv 2006.11239), v-prediction (arXiv 2202.00512), latent diffusion (arXiv
2112.10752).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from einops import reduce
from torch import Tensor, nn

from demerge.data import ImageData, load_images
from demerge.diffusion import schedule
from demerge.diffusion.conditioning import Classes, classes_of
from demerge.diffusion.loading import (
    TextEncoder,
    build_scheduler,
    build_unet,
    denoiser_part,
    find_pipeline,
    load_denoiser,
    load_scheduler,
    load_text,
    load_vae,
    running,
)
from demerge.diffusion.projection import FOLDABLE, has_projection
from demerge.errors import InputError, UsageError
from demerge.inspection import find_other_input
from demerge.storage.atomic import commit_json
from demerge.storage.checkpoint import commit_tensors, content_sha256, finite
from demerge.storage.hashing import Hashing
from demerge.storage.layout import PROJECTED, inside, read_index
from demerge.storage.schema import Record, Table, read_record

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class RandomConfig(Record):
    """The configs of a model from random weights."""

    unet: Table
    scheduler: Table


@dataclass(frozen=True)
class Diffusion:
    """A denoiser f(x_t, t, c) with the noise schedule it was trained on.

    Attributes:
        folder: the pipeline folder it was loaded from; `save` copies the other components from it.
    """

    denoiser: nn.Module
    scheduler: Any
    folder: Path | None = None
    vae: Any | None = None
    text: TextEncoder | None = None
    _tables: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not hasattr(self.scheduler, "alphas_cumprod"):
            what = f"scheduler {type(self.scheduler).__name__} has no alphas_cumprod"
            fix = "use a base with a DDPM-like schedule (DDPM, DDIM, PNDM, Euler, DPM-Solver)"
            raise UsageError(what, fix=fix)
        if self.prediction_type not in PREDICTION_TYPES:
            what = f"prediction type '{self.prediction_type}' is unknown"
            raise UsageError(what, fix=f"use one of {', '.join(PREDICTION_TYPES)}")
        latents = None if self.vae is None else self.vae.config.latent_channels
        if other := find_other_input(self.config, latents):
            fix = "use a base that takes x_t alone, as its text-to-image model; merge takes both"
            raise UsageError(f"{self.folder or 'the denoiser'}: {other}", fix=fix)
        classes_of(self.config)

    def __repr__(self) -> str:
        kind, where = type(self.denoiser).__name__, f", {str(self.folder)!r}" if self.folder else ""
        size = f"{self.parameters:,} parameters"
        return f"Diffusion({kind}, {size}, {self.prediction_type}, T = {self.T}{where})"

    @classmethod
    def load(cls, model: str | Path, *, device: str | torch.device = "cpu") -> Diffusion:
        """Load a pipeline folder or a Hub id, in float32, in eval mode.

        Raises:
            InputError: if the folder is not a supported pipeline, or a weight is missing.
        """
        folder = find_pipeline(model)
        denoiser, scheduler = load_denoiser(folder), load_scheduler(folder)
        loaded = cls(denoiser, scheduler, folder, load_vae(folder), load_text(folder))
        for name, module in loaded._modules().items():
            if bad := not_finite(module):
                what = f"{folder}: the {name} holds NaN or Inf in {bad}"
                raise InputError(what, fix="use an earlier save of this model")
            module.eval().requires_grad_(False)
        return loaded.to(device)

    @classmethod
    def random(cls, config: str | Path, *, seed: int) -> Diffusion:
        """Make a model with random weights from a JSON file {"unet": {...}, "scheduler": {...}}.

        Raises:
            InputError: if the file lacks a part or diffusers refuses it.
        """
        fix = 'write {"unet": {... UNet2DModel ...}, "scheduler": {... DDPMScheduler ...}}'
        parts = read_record(Path(config), RandomConfig, fix=fix)
        kind = diffusers.DDPMScheduler
        scheduler = build_scheduler(parts.scheduler, kind, f"{config}: scheduler")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(build_unet(parts.unet, f"{config}: unet"), scheduler)

    def save(self, path: str | Path, *, keeps_projection: bool = False) -> None:
        """Write a stock pipeline into the empty folder `path`; `folder` gives the components.

        Args:
            keeps_projection: whether a denoiser with the W of `--projection paper` may be written,
                as a folder that only demerge loads.

        Raises:
            UsageError: if the denoiser has such W and may not be written.
        """
        path, is_projected = Path(path), has_projection(self.denoiser)
        if is_projected and not keeps_projection:
            what = "a stock pipeline has no place for the W of `--projection paper`"
            raise UsageError(f"{self.folder or 'the denoiser'}: {what}", fix=FOLDABLE)
        if self.folder is None:
            diffusers.DDPMPipeline(self.denoiser, self.scheduler).save_pretrained(path)
            return
        index = read_index(self.folder)
        own = (denoiser_part(self.folder), "scheduler")
        copied = [n for n in sorted(index.keys() - set(own)) if (self.folder / n).is_dir()]
        for name in copied:
            for file in [self.folder / name, *(self.folder / name).rglob("*")]:
                inside(self.folder, file)
            shutil.copytree(self.folder / name, path / name)
        for name, value in index.items():
            if isinstance(value, list) and name not in (*own, *copied):
                index[name] = [None, None]
        commit_json(path / "model_index.json", index)
        self.scheduler.save_pretrained(path / "scheduler")
        if is_projected:
            self.denoiser.save_config(path / own[0])  # type: ignore[operator]
            commit_tensors(path / own[0] / PROJECTED, self.denoiser.state_dict())
        else:
            self.denoiser.save_pretrained(path / own[0])  # type: ignore[operator]

    def with_denoiser(self, denoiser: nn.Module) -> Diffusion:
        """Return the same diffusion around another denoiser."""
        return replace(self, denoiser=denoiser)

    def to(self, device: str | torch.device) -> Diffusion:
        """Move the modules to a device, in place; return self."""
        for module in self._modules().values():
            module.to(device)
        return self

    def _modules(self) -> dict[str, nn.Module]:
        text = None if self.text is None else self.text.model
        parts = {"denoiser": self.denoiser, "vae": self.vae, "text_encoder": text}
        return {name: module for name, module in parts.items() if module is not None}

    @property
    def config(self) -> Any:
        """The denoiser's own config."""
        return self.denoiser.config

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.denoiser.parameters()).device

    @property
    def T(self) -> int:
        """The number of training timesteps."""
        return int(self.scheduler.config.num_train_timesteps)

    @property
    def prediction_type(self) -> str:
        """`epsilon`, `v_prediction` or `sample`."""
        return str(self.scheduler.config.get("prediction_type"))

    @property
    def alphas_cumprod(self) -> Tensor:
        """abar [T], float64."""
        abar: Tensor = self.scheduler.alphas_cumprod.to("cpu", torch.float64)
        return abar

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of x_t."""
        size = self.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return int(self.config.in_channels), int(height), int(width)

    def load_images(self, source: str, *, split: str, skip_broken: bool) -> ImageData:
        """Load a data set in the shape of this model's images, which are square."""
        channels, height, _ = self.image_shape
        return load_images(
            source, split=split, resolution=height, channels=channels, skip_broken=skip_broken
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        if self.vae is None:
            return self.sample_shape
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        _, height, width = self.sample_shape
        return int(self.vae.config.out_channels), height * factor, width * factor

    @property
    def parameters(self) -> int:
        """The number of the denoiser's parameters."""
        return sum(p.numel() for p in self.denoiser.parameters())

    @property
    def requires_text(self) -> bool:
        """Whether the denoiser takes captions."""
        return self.text is not None

    @property
    def classes(self) -> Classes | None:
        """The classes that the denoiser takes; None if it takes none."""
        return classes_of(self.config)

    @property
    def sha256(self) -> str:
        """The hash of the denoiser's tensors: names, dtypes, shapes and values."""
        return content_sha256(self.denoiser.state_dict())

    @property
    def identity(self) -> dict[str, Any]:
        """All that images and losses of this model depend on, as JSON values; infinity is a text.

        These are the hash of the denoiser's tensors, its config, the scheduler's config, and the
        hash of each file of the other components.
        """
        identity = {
            "sha256": self.sha256,
            "config": _public(self.config),
            "scheduler": _public(self.scheduler.config) | {"class": type(self.scheduler).__name__},
            "components": self._components(),
        }
        document: dict[str, Any] = json.loads(json.dumps(identity, default=str), parse_constant=str)
        return document

    def _components(self) -> dict[str, str]:
        """Return the hash of each file of the other components."""
        if self.folder is None:
            return {}
        index = read_index(self.folder)
        names = sorted(index.keys() - {denoiser_part(self.folder), "scheduler"})
        paths = [path for name in names for path in sorted((self.folder / name).rglob("*"))]
        files = [path for path in paths if path.is_file()]
        hashes = Hashing([inside(self.folder, file) for file in files]).result()
        return {str(file.relative_to(self.folder)): hashes[file] for file in files}

    @property
    def fingerprint(self) -> str:
        """The hash of `identity`."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def snr(self) -> Tensor:
        """SNR(t) = abar_t / (1 - abar_t), [T] float64."""
        return schedule.snr(self.alphas_cumprod)

    @torch.no_grad()
    def encode(
        self,
        images: Tensor,
        captions: Sequence[str] | None = None,
        labels: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Turn images [B C H W] in [-1, 1] into (x_0 [B *sample_shape], c); see `condition`.

        Raises:
            UsageError: if the images have another shape than the base's, or captions or labels are
                missing.
        """
        if tuple(images.shape[1:]) != self.image_shape:
            what = f"images are {tuple(images.shape[1:])}, the base expects {self.image_shape}"
            raise UsageError(what, fix="load the data with the base's resolution and channels")
        condition = self.condition(len(images), captions, labels)
        images = images.to(self.device)
        if self.vae is None:
            return images, condition
        with running(f"{self.folder}/vae"):
            x0 = self.vae.encode(images).latent_dist.mode() * self.vae.config.scaling_factor
        return x0, condition

    @torch.no_grad()
    def condition(
        self, n: int, captions: Sequence[str] | None = None, labels: Sequence[int] | None = None
    ) -> Tensor | None:
        """Return c for n samples: hidden states [n L D], labels [n], or None.

        Raises:
            UsageError: if captions or labels are missing, or a label is not a class of the base.
        """
        if self.text is not None:
            captions = _required(captions)
            with running(f"{self.folder}/text_encoder"):
                return self.text(captions)
        return None if self.classes is None else self.classes.labels(labels, n).to(self.device)

    def describe_condition(self, data: ImageData) -> str | None:
        """Describe the conditions that a data set gives the denoiser; None if it takes none.

        Raises:
            UsageError: if captions or labels are missing, or a label is not a class of the base.
        """
        if self.text is not None:
            return f"captions, {len(set(_required(data.captions))):,} different ones"
        if self.classes is None:
            return None
        self.classes.labels(data.labels, len(data))
        return f"classes, {self.classes.describe_labels(data.labels)}"

    def encode_from(self, data: ImageData, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Encode images of a data set with their captions or labels; see `encode`."""
        return self.encode(data.floats(indices), *data.annotations(indices))

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """Turn x_0 [B *sample_shape] into images [B C H W], nominally in [-1, 1]."""
        if self.vae is None:
            return x0
        with running(f"{self.folder}/vae"):
            images: Tensor = self.vae.decode(x0 / self.vae.config.scaling_factor).sample
        return images

    def _coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(abar_t) and sqrt(1 - abar_t); no device is waited for."""
        if like.device not in self._tables:
            abar = self.alphas_cumprod
            dtype = torch.float32 if like.device.type == "mps" else torch.float64
            table = torch.stack([abar.sqrt(), (1 - abar).sqrt()])
            self._tables[like.device] = table.to(like.device, dtype)
        chosen = self._tables[like.device][:, t.to(like.device)].to(like.dtype)
        a, s = chosen.view(2, -1, *[1] * (like.ndim - 1))
        return a, s

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Draw x_t from q(x_t | x_0) with the given noise; x0, noise [B *], t [B] integers."""
        a, s = self._coefficients(t, x0)
        return a * x0 + s * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return y [B *], what the denoiser is trained to predict."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        a, s = self._coefficients(t, x0)
        return a * noise - s * x0

    def arguments(self, condition: Tensor | None) -> dict[str, Tensor]:
        """Return the denoiser's keyword arguments for a condition."""
        if condition is None:
            return {}
        return {"encoder_hidden_states" if self.classes is None else "class_labels": condition}

    def predict(self, x_t: Tensor, t: Tensor | float, condition: Tensor | None = None) -> Tensor:
        """Return f(x_t, t, c) [B C H W] for t [B] or one for all, without a learned variance."""
        each = torch.as_tensor(t, device=x_t.device).reshape(-1).expand(len(x_t))
        with running(self.folder or "the model"):
            output: Tensor = self.denoiser(x_t, each, **self.arguments(condition)).sample
        return output[:, : x_t.shape[1]]

    def loss(self, x0: Tensor, noise: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return |y - f(x_t, t, c)|^2 for each sample [B], averaged over its elements."""
        prediction = self.predict(self.add_noise(x0, noise, t), t, condition)
        return squared_error(prediction, self.target(x0, noise, t))


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _required(captions: Sequence[str] | None) -> Sequence[str]:
    if captions is None:
        fix = "add a metadata.jsonl with file_name and text, or a NAME.txt next to each image"
        raise UsageError("the base takes text and the data has no captions", fix=fix)
    return captions


def not_finite(module: nn.Module) -> str:
    """Name the first tensors of a module that hold NaN or Inf; empty if none does."""
    bad = [name for name, tensor in module.state_dict().items() if not finite(tensor)]
    return ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of each sample [B], in float32."""
    return reduce((prediction.float() - target.float()).square(), "b ... -> b", "mean")
