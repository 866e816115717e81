"""A diffusion model: denoiser, noise schedule and, if it has them, text encoder and autoencoder.

    q(x_t | x_0):      x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,    eps ~ N(0, I), t in [0, T)
    flow matching:     x_t = (1 - sigma) x_0 + sigma eps,  sigma = t / T,  t in [0, T]
    target y:          epsilon          eps
                       v_prediction     sqrt(abar_t) eps - sqrt(1 - abar_t) x_0
                       sample           x_0
                       flow_prediction  eps - x_0
    loss at t:         |y - f(x_t, t, c)|^2, averaged over the elements of one sample
    SNR(t):            abar_t / (1 - abar_t), or ((1 - sigma) / sigma)^2

The schedule, the prediction type and T are the base's own, read from its scheduler's config;
nothing is filled in by a default. Models are stock diffusers pipelines, read by
`demerge.diffusion.loading`. What is particular to a kind of denoiser is in its file of
`demerge.diffusion.families`. The condition c is that of `demerge.diffusion.conditioning`. Of a
denoiser that also learns the variance (a DiT: 2 C channels) the first C channels are f.

Papers: DDPM (arXiv 2006.11239), v-prediction (arXiv 2202.00512), latent diffusion (arXiv
2112.10752), rectified flow (arXiv 2209.03003, 2403.03206).
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
from demerge.diffusion.components import running
from demerge.diffusion.conditioning import Classes, Condition
from demerge.diffusion.families import Family, Text, family_of
from demerge.diffusion.loading import (
    build_scheduler,
    build_unet,
    denoiser_part,
    find_component,
    find_pipeline,
    load_denoiser,
    load_scheduler,
    load_text,
    load_vae,
)
from demerge.diffusion.projection import FOLDABLE, has_projection
from demerge.diffusion.routing import RoutedDenoiser
from demerge.errors import InputError, UsageError
from demerge.inspection import find_other_input
from demerge.storage.atomic import commit_json
from demerge.storage.checkpoint import commit_tensors, content_sha256, finite
from demerge.storage.hashing import Hashing
from demerge.storage.layout import PROJECTED, SECOND, inside, read_index
from demerge.storage.schema import Record, Table, read_record
from demerge.timesteps import Partition, TimestepRange

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")


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
    text: Text | None = None
    resolution: int | None = None
    _family: Family | None = field(default=None, repr=False)
    _tables: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.is_flow and not hasattr(self.scheduler, "alphas_cumprod"):
            what = f"scheduler {type(self.scheduler).__name__} has no alphas_cumprod"
            fix = "use a base with a schedule like DDPM's or of flow matching"
            raise UsageError(what, fix=fix)
        if self.prediction_type not in PREDICTION_TYPES:
            what = f"prediction type '{self.prediction_type}' is unknown"
            raise UsageError(what, fix=f"use one of {', '.join(PREDICTION_TYPES)}")
        if self._family is None:
            object.__setattr__(self, "_family", self._find_family())

    def _find_family(self) -> Family:
        """Return the denoiser's family.

        Raises:
            UsageError: if it takes something besides x_t, t, text and classes.
        """
        denoiser, config = self.denoiser, self.config
        if isinstance(denoiser, RoutedDenoiser):
            denoiser = denoiser.experts[0]
        name = type(denoiser).__name__
        sides = None if self.resolution is None else (self.resolution, self.resolution)
        family = family_of(name, config)(config, self.vae, sides)
        if other := find_other_input({"_class_name": name, **config}, family.latent_channels):
            fix = "use a base that takes x_t alone, as its text-to-image model; merge takes both"
            raise UsageError(f"{self.folder or 'the denoiser'}: {other}", fix=fix)
        family.check()
        if self.resolution is not None:
            family.check_side(self.resolution, "resolution")
        return family

    def __repr__(self) -> str:
        kind, where = type(self.denoiser).__name__, f", {str(self.folder)!r}" if self.folder else ""
        size = f"{self.parameters:,} parameters"
        return f"Diffusion({kind}, {size}, {self.prediction_type}, T = {self.T}{where})"

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        device: str | torch.device = "cpu",
        resolution: int | None = None,
        pairs: bool = True,
    ) -> Diffusion:
        """Load a pipeline folder or a Hub id, in float32, in eval mode.

        A pipeline of two denoisers becomes a routed ensemble; the folder of one of them stands for
        the pipeline with that one alone.

        Args:
            resolution: the side of the images in pixels; by default that of the config.
            pairs: whether there may be two denoisers.

        Raises:
            InputError: if the folder is not a supported pipeline, or a weight is missing.
        """
        folder, component = find_pipeline(model), find_component(model)
        partition = None if component else Partition.of_pipeline(folder)
        if partition is None:
            denoiser: nn.Module = load_denoiser(folder, component)
        elif pairs:
            both = [load_denoiser(folder, name) for name in (SECOND, denoiser_part(folder))]
            denoiser = RoutedDenoiser(partition, both)
        else:
            low, high = partition
            what = f"{folder} has two denoisers: transformer for t in {high}, {SECOND} for {low}"
            raise InputError(what, fix=f"name one of them, for example {folder}/{SECOND}")
        scheduler, vae, text = load_scheduler(folder), load_vae(folder), load_text(folder)
        loaded = cls(denoiser, scheduler, folder, vae, text, resolution)
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
        own: tuple[str, ...] = (denoiser_part(self.folder), "scheduler")
        denoisers = {own[0]: self.denoiser}
        if isinstance(self.denoiser, RoutedDenoiser) and index.get(SECOND):
            low, high = self.denoiser.experts
            denoisers, own = {own[0]: high, SECOND: low}, (*own, SECOND)
        elif index.pop(SECOND, None):
            index["boundary_ratio"] = None
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
            return
        for name, denoiser in denoisers.items():
            denoiser.save_pretrained(path / name)  # type: ignore[operator]

    def with_denoiser(self, denoiser: nn.Module) -> Diffusion:
        """Return the same diffusion around another denoiser."""
        return replace(self, denoiser=denoiser)

    def to(self, device: str | torch.device) -> Diffusion:
        """Move the modules to a device, in place; return self."""
        for module in self._modules().values():
            module.to(device)
        return self

    def _modules(self) -> dict[str, nn.Module]:
        text = {} if self.text is None else self.text.modules
        parts = {"denoiser": self.denoiser, "vae": self.vae, **text}
        return {name: module for name, module in parts.items() if module is not None}

    @property
    def family(self) -> Family:
        """What is particular to the kind of the denoiser."""
        assert self._family is not None
        return self._family

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
    def is_flow(self) -> bool:
        """Whether x_t is on the straight line from x_0 to noise: flow matching."""
        return schedule.is_flow(self.scheduler.config, type(self.scheduler).__name__)

    @property
    def prediction_type(self) -> str:
        """`epsilon`, `v_prediction`, `sample` or `flow_prediction`."""
        return (
            "flow_prediction" if self.is_flow else str(self.scheduler.config.get("prediction_type"))
        )

    @property
    def shift(self) -> float:
        """The s of a flow's schedule: sigma = s u / (1 + (s - 1) u) for u uniform in its steps."""
        return schedule.shift_of(self.scheduler.config, self.family.tokens)

    @property
    def alphas_cumprod(self) -> Tensor:
        """The share of the signal in the variance of x_t, [T] float64: abar of a DDPM."""
        if self.is_flow:
            signal, noise = self.powers
            return signal / (signal + noise)
        abar: Tensor = self.scheduler.alphas_cumprod.to("cpu", torch.float64)
        return abar

    @property
    def powers(self) -> tuple[Tensor, Tensor]:
        """a^2 and s^2 [T] float64 of x_t = a x_0 + s eps."""
        if self.is_flow:
            sigma = schedule.flow_sigmas(self.T)
            return (1 - sigma) ** 2, sigma**2
        return self.alphas_cumprod, 1 - self.alphas_cumprod

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(C, H, W) of x_t; (C, F, H, W) of a video."""
        return self.family.sample_shape

    def load_images(self, source: str, *, split: str, skip_broken: bool) -> ImageData:
        """Load a data set in the shape of this model's images, which are square."""
        channels, height, _ = self.image_shape
        return load_images(
            source, split=split, resolution=height, channels=channels, skip_broken=skip_broken
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        return self.family.image_shape

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
        return self.family.classes

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
            **({} if self.resolution is None else {"resolution": self.resolution}),
        }
        document: dict[str, Any] = json.loads(json.dumps(identity, default=str), parse_constant=str)
        return document

    def _components(self) -> dict[str, str]:
        """Return the hash of each file of the other components."""
        if self.folder is None:
            return {}
        index = read_index(self.folder)
        names = sorted(index.keys() - {denoiser_part(self.folder), SECOND, "scheduler"})
        paths = [path for name in names for path in sorted((self.folder / name).rglob("*"))]
        files = [path for path in paths if path.is_file()]
        hashes = Hashing([inside(self.folder, file) for file in files]).result()
        return {str(file.relative_to(self.folder)): hashes[file] for file in files}

    @property
    def fingerprint(self) -> str:
        """The hash of `identity`."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def snr(self) -> Tensor:
        """SNR(t) = a^2 / s^2, [T] float64."""
        signal, noise = self.powers
        return signal / noise

    @torch.no_grad()
    def encode(
        self,
        images: Tensor,
        captions: Sequence[str] | None = None,
        labels: Sequence[int] | None = None,
    ) -> tuple[Tensor, Condition]:
        """Turn images [B C H W] in [-1, 1] into (x_0 [B *sample_shape], c); see `condition`.

        Raises:
            UsageError: if the images have another shape than the base's, or captions or labels are
                missing.
        """
        if tuple(images.shape[1:]) != self.image_shape:
            what = f"images are {tuple(images.shape[1:])}, the base expects {self.image_shape}"
            raise UsageError(what, fix="load the data with the base's resolution and channels")
        condition = self.condition(len(images), captions, labels)
        with running(f"{self.folder}/vae"):
            return self.family.encode(images.to(self.device)), condition

    @torch.no_grad()
    def condition(
        self, n: int, captions: Sequence[str] | None = None, labels: Sequence[int] | None = None
    ) -> Condition:
        """Return c of n samples, the denoiser's own arguments; each tensor has n rows.

        Raises:
            UsageError: if captions or labels are missing, or a label is not a class of the base.
        """
        condition: Condition = {}
        if self.text is not None:
            condition = self.text(_required(captions))
        elif self.classes is not None:
            condition = {"class_labels": self.classes.labels(labels, n).to(self.device)}
        return condition | self.family.extra(torch.empty(n, device=self.device))

    @torch.no_grad()
    def no_condition(self, n: int) -> Condition:
        """Return what guidance takes in place of a caption or a class, for n samples."""
        return self.condition(n, None if self.text is None else [""] * n)

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

    def encode_from(self, data: ImageData, indices: Sequence[int]) -> tuple[Tensor, Condition]:
        """Encode images of a data set with their captions or labels; see `encode`."""
        return self.encode(data.floats(indices), *data.annotations(indices))

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """Turn x_0 [B *sample_shape] into images [B C H W], nominally in [-1, 1]."""
        with running(f"{self.folder}/vae"):
            return self.family.decode(x0)

    def _coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return a and s [B 1 ..] of x_t = a x_0 + s eps; no device is waited for."""
        t, shape = t.to(like.device), (-1, *[1] * (like.ndim - 1))
        if self.is_flow:
            sigma = (t.to(torch.float32) / self.T).view(shape).to(like.dtype)
            return 1 - sigma, sigma
        if like.device not in self._tables:
            abar = self.alphas_cumprod
            dtype = torch.float32 if like.device.type == "mps" else torch.float64
            table = torch.stack([abar.sqrt(), (1 - abar).sqrt()])
            self._tables[like.device] = table.to(like.device, dtype)
        a, s = self._tables[like.device][:, t].to(like.dtype)
        return a.view(shape), s.view(shape)

    def timesteps(self, span: TimestepRange, position: Tensor) -> Tensor:
        """Return the timesteps [B] at these shares, in [0, 1), of a range.

        They are integers, each with an equal share of positions; for flow matching any number.
        """
        if self.is_flow:
            return below((span.start + position * len(span)).float(), span.stop)
        return span.start + (position * len(span)).long().clamp(max=len(span) - 1)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Draw x_t from q(x_t | x_0) with the given noise; x0, noise [B *], t [B].

        t are integers, but for flow matching, which takes any t in [0, T].
        """
        a, s = self._coefficients(t, x0)
        return a * x0 + s * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return y [B *], what the denoiser is trained to predict."""
        if self.is_flow:
            return noise - x0
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        a, s = self._coefficients(t, x0)
        return a * noise - s * x0

    def predict(self, x_t: Tensor, t: Tensor | float, condition: Condition | None = None) -> Tensor:
        """Return f(x_t, t, c) [B *] for t [B] or one for all, without a learned variance."""
        each = torch.as_tensor(t, device=x_t.device).reshape(-1).expand(len(x_t))
        with running(self.folder or "the model"):
            return self.family.predict(self.denoiser, x_t, each, condition or {})

    def loss(
        self, x0: Tensor, noise: Tensor, t: Tensor, condition: Condition | None = None
    ) -> Tensor:
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


def below(t: Tensor, stop: int) -> Tensor:
    """Return float32 timesteps, those that were rounded up to `stop` just below it."""
    most = torch.tensor(stop, dtype=torch.float32).nextafter(torch.tensor(0.0))
    return t.clamp(max=float(most))


def not_finite(module: nn.Module) -> str:
    """Name the first tensors of a module that hold NaN or Inf; empty if none does."""
    bad = [name for name, tensor in module.state_dict().items() if not finite(tensor)]
    return ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of each sample [B], in float32."""
    return reduce((prediction.float() - target.float()).square(), "b ... -> b", "mean")
