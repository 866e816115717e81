"""A family of denoisers: how they are called, what they take besides x_t and t, and their latents.

    f(x_t, t, c)     `Family._call`: the stock denoiser's own signature
    c                a dict of tensors, the sample on their first axis: `text` and `extra`
    x_0              `encode`: the mode of the autoencoder, scaled as the stock pipeline does
    t of a sampler   `set_timesteps`: those of the stock pipeline

A new family is one file with one subclass, and one line in `demerge.diffusion.families`. What the
subclass leaves out is as here: an unconditional UNet on images or on the latents of an
`AutoencoderKL`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import diffusers
from torch import Tensor, nn

from demerge.diffusion.conditioning import Classes, Condition
from demerge.diffusion.routing import RoutedDenoiser
from demerge.errors import UsageError

Denoiser = Callable[..., Any]


class Text(Protocol):
    """Frozen text encoders with their tokenizers."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The encoders by the names of their components."""

    def __call__(self, captions: Sequence[str]) -> Condition:
        """Encode B captions into what the denoiser takes of them."""


class Family:
    """One kind of denoiser, with the config of a model of it.

    Attributes:
        denoisers: the stock classes by their names in config.json.
        image_size: (H, W) of the images in pixels; None is that of the config.
    """

    denoisers: ClassVar[Mapping[str, type[diffusers.ModelMixin]]] = {}
    autoencoders: ClassVar[Mapping[str, type[diffusers.ModelMixin]]] = {
        "AutoencoderKL": diffusers.AutoencoderKL
    }

    def __init__(
        self, config: Any, vae: Any = None, image_size: tuple[int, int] | None = None
    ) -> None:
        self.config, self.vae, self.image_size = config, vae, image_size

    @property
    def is_distilled(self) -> bool:
        """Whether the scale of the guidance is an input of the denoiser."""
        return False

    @property
    def classes(self) -> Classes | None:
        """The classes that the denoiser takes; None if it takes none."""
        return None

    @staticmethod
    def takes(config: Mapping[str, Any]) -> bool:
        """Return whether a denoiser of one of these classes and this config is of the family."""
        return True

    @staticmethod
    def prepare(denoiser: Any) -> None:
        """Change a denoiser that was loaded, in place."""

    def check(self) -> None:
        """Check what the denoiser takes.

        Raises:
            UsageError: if that is something besides x_t, t, text and classes.
        """

    @staticmethod
    def load_text(folder: Path) -> Text | None:
        """Load the text encoders of a pipeline; None if the family takes no text."""
        return None

    # -- the denoiser ------------------------------------------------------------------------------

    def predict(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return f(x_t, t, c) [B *] for t [B], without a learned variance."""
        if isinstance(denoiser, RoutedDenoiser):
            return denoiser.predict(self._call, x_t, t, condition)[:, : x_t.shape[1]]
        return self._call(denoiser, x_t, t, condition)[:, : x_t.shape[1]]

    def _call(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        prediction: Tensor = denoiser(x_t, t, **condition).sample
        return prediction

    def extra(self, like: Tensor) -> Condition:
        """Return what the denoiser takes besides text and classes, for as many rows as `like`."""
        return {}

    # -- latents -----------------------------------------------------------------------------------

    @property
    def channels(self) -> int:
        """The channels of x_t."""
        return int(self.config.in_channels)

    @property
    def latent_channels(self) -> int | None:
        """The channels of the autoencoder's latents; None without one."""
        return None if self.vae is None else int(self.vae.config.latent_channels)

    @property
    def factor(self) -> int:
        """Pixels per latent along a side."""
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def patch(self) -> int:
        """Latents along a side of a token."""
        return self.config.get("patch_size") or 1

    def check_side(self, side: int, name: str) -> None:
        """Check that images may have a side of so many pixels.

        Raises:
            UsageError: if it is no whole number of tokens.
        """
        multiple = self.factor * self.patch
        if side % multiple:
            what = f"{name} is {side}, and the base takes multiples of {multiple} pixels"
            raise UsageError(what, fix=f"for example {side // multiple * multiple or 64}")

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of x_t."""
        if self.image_size is None:
            return self.own_size
        height, width = self.image_size
        return height // self.factor, width // self.factor

    @property
    def own_size(self) -> tuple[int, int]:
        """(H, W) of x_t that the config says."""
        size = self.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return int(height), int(width)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(C, H, W) of x_t."""
        return self.channels, *self.size

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        height, width = self.size
        channels = self.channels if self.vae is None else int(self.vae.config.out_channels)
        return channels, height * self.factor, width * self.factor

    def encode(self, images: Tensor) -> Tensor:
        """Return x_0 [B *] of images [B C H W] in [-1, 1]: (z - shift) scale, z the mode."""
        if self.vae is None:
            return images
        encoded = self.vae.encode(images)
        z: Tensor = encoded.latents if "latents" in encoded else encoded.latent_dist.mode()
        x0: Tensor = (z - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor
        return x0

    def decode(self, x0: Tensor) -> Tensor:
        """Return images [B C H W] of x_0 [B *], nominally in [-1, 1]."""
        if self.vae is None:
            return x0
        config = self.vae.config
        z = x0 / config.scaling_factor + (config.shift_factor or 0.0)
        images: Tensor = self.vae.decode(z).sample
        return images

    # -- sampling ----------------------------------------------------------------------------------

    @property
    def tokens(self) -> int:
        """The length of the sequence that a resolution-dependent shift is computed from."""
        height, width = self.size
        return (height // self.patch) * (width // self.patch)

    def sigmas(self, steps: int) -> list[float] | None:
        """Return the noise levels that the stock pipeline hands to its scheduler, if it does."""
        return None
