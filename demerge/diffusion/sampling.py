"""Images from a model: exactly n of them, image i a function of (seed, i) alone.

The starting noise of image i, and the noise that a stochastic sampler adds at each step, come from
streams keyed by (seed, i). So images do not depend on batch size (up to float rounding), order or
process, and models are compared on common noise.

`ddim` is DDIM with eta 0 (arXiv 2010.02502) on `leading` timesteps t_k = k floor(T / S). The
update's previous timestep t - floor(T / S) is exact for these. `base` is the base model's own
scheduler with its own config.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor

from demerge.diffusion.components import running
from demerge.diffusion.conditioning import Condition, stack
from demerge.diffusion.forward import Forward
from demerge.diffusion.model import Diffusion
from demerge.diffusion.numerics import fitting_threads
from demerge.diffusion.options import SamplingOptions
from demerge.diffusion.schedule import dynamic_mu
from demerge.errors import NumericalError, UsageError
from demerge.progress import Progress, silent
from demerge.randomness import key_of, normal
from demerge.reporting.images import to_uint8


def sample(
    model: Diffusion,
    num_images: int,
    options: SamplingOptions | None = None,
    *,
    seed: int = 0,
    captions: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    first: int = 0,
    on_device: bool = False,
    progress: Progress = silent,
) -> Tensor:
    """Draw images first .. first + n - 1 of the seed's sequence, uint8 [n C H W].

    Args:
        options: `guidance_scale` is g of classifier-free guidance,
            f(x, "") + g (f(x, c) - f(x, "")), with no class in place of "" for a DiT.
        captions: for a text-to-image model; image i gets captions[i % len(captions)].
        labels: for a model of C classes, likewise; 0, 1 .. C - 1 by default. A DiT takes C for
            no class.
        on_device: leave the images on the model's device; else they come to the CPU.

    Raises:
        UsageError: if an option does not suit the model, or captions are missing.
        NumericalError: if an image is not finite.
    """
    options = options or SamplingOptions()
    if num_images < 1:
        raise UsageError(f"num_images is {num_images}", fix="give at least 1")
    sampler = ImageSampler(model, options, seed, captions, labels)
    device = model.device if on_device else "cpu"
    images = torch.empty(num_images, *model.image_shape, dtype=torch.uint8, device=device)
    for start in range(0, num_images, options.batch_size):
        stop = min(start + options.batch_size, num_images)
        images[start:stop] = sampler.draw(range(first + start, first + stop))
        progress(stop, num_images)
    return images


@dataclass(frozen=True, slots=True, eq=False)
class ImageSampler:
    """A model that draws image i of a seed, for any i.

    Raises:
        UsageError: if an option does not suit the model, or captions are missing.
    """

    model: Diffusion
    options: SamplingOptions
    seed: int = 0
    captions: Sequence[str] | None = None
    labels: Sequence[int] | None = None
    scheduler: Any = field(init=False, repr=False)
    forward: Forward = field(init=False, repr=False)

    def __post_init__(self) -> None:
        model, labels = self.model, self.labels
        check_sampling(model, self.options, self.captions)
        if labels is not None and model.classes is None:
            raise UsageError("labels were given, and the model takes no classes", fix="omit them")
        if labels is not None and not len(labels):
            raise UsageError("the list of labels is empty", fix="give one, or omit the list")
        if model.classes is not None:
            labels = labels or range(model.classes.count)
            model.classes.labels(labels, len(labels))
        object.__setattr__(self, "labels", labels)
        scheduler = make_scheduler(model, self.options.steps, self.options.sampler)
        object.__setattr__(self, "scheduler", scheduler)
        object.__setattr__(self, "forward", Forward(model, self.options.mixed_precision))

    @torch.inference_mode()
    def draw(self, indices: Sequence[int]) -> Tensor:
        """Draw the images of these numbers, uint8 [B C H W], on the model's device.

        Raises:
            NumericalError: if an image is not finite.
        """
        model, scheduler, scale = self.model, self.scheduler, self.options.guidance_scale
        is_guided = scale > 1 and not model.family.is_distilled
        condition = self._condition(indices, is_guided)
        set_timesteps(model, scheduler, self.options.steps)  # PNDM and others keep a history
        noise = normal(model.sample_shape, self.seed, "image", samples=indices)
        x = noise.to(model.device) * getattr(scheduler, "init_noise_sigma", 1.0)
        arguments = self._generators(indices)
        with fitting_threads(model, len(indices)):
            for t in scheduler.timesteps:
                scaled = x if model.is_flow else scheduler.scale_model_input(x, t)
                scaled = torch.cat([scaled, scaled]) if is_guided else scaled
                prediction = self.forward(scaled, t, condition)
                if is_guided:
                    without, conditional = prediction.chunk(2)
                    prediction = without + scale * (conditional - without)
                with running(f"the scheduler of {model.folder}"):
                    x = scheduler.step(prediction, t, x, **arguments).prev_sample
        if not bool(torch.isfinite(x).all()):
            fix = "check the weights: `demerge inspect MODEL`"
            if self.options.mixed_precision == "fp16":
                fix = "use --mixed-precision bf16: values above 65,504 overflow in fp16"
            raise NumericalError("sampling produced NaN or Inf: an image is not finite", fix=fix)
        return to_uint8(model.decode(x))

    def _condition(self, indices: Sequence[int], is_guided: bool) -> Condition:
        """Return the condition of images, after the empty one if there is guidance."""
        model, captions, labels = self.model, self.captions, self.labels
        texts = [captions[i % len(captions)] for i in indices] if captions else None
        classes = [labels[i % len(labels)] for i in indices] if labels else None
        condition = model.condition(len(indices), texts, classes)
        if model.family.is_distilled:
            condition["guidance"] *= self.options.guidance_scale
        return stack(model.no_condition(len(indices)), condition) if is_guided else condition

    def _generators(self, indices: Sequence[int]) -> dict[str, Any]:
        """Return the random numbers of each image, if the scheduler's step takes some."""
        is_deterministic = isinstance(self.scheduler, diffusers.DDIMScheduler)  # eta is 0
        takes_none = "generator" not in inspect.signature(self.scheduler.step).parameters
        if is_deterministic or takes_none:
            return {}
        keys = [key_of(self.seed, "sampler", i) % 2**63 for i in indices]
        device = self.model.device
        return {"generator": [torch.Generator(device).manual_seed(key) for key in keys]}


def make_scheduler(model: Diffusion, steps: int, sampler: str) -> Any:
    """Return a scheduler with `steps` inference steps, as the base's own pipeline would make it.

    `ddim` steps on the base's own abar. A field of DDIM that the base's scheduler lacks is set to
    what that scheduler does, never to DDIM's default; see `_own_config`.

    Raises:
        UsageError: if the base's own scheduler needs a variance that the denoiser learned, or a
            step starts at SNR 0, at which a predicted epsilon says nothing of x_0.
    """
    own, config = model.scheduler, _own_config(model)
    if model.is_flow:
        scheduler = own if sampler == "base" else _euler(model)
        scheduler = type(scheduler).from_config(scheduler.config)
    elif sampler == "ddim":
        scheduler = _ddim(model, config, steps)
    elif str(own.config.get("variance_type", "")).startswith("learned"):
        raise UsageError(
            f"the base's own {type(own).__name__} draws with a learned variance,"
            " which is not supported",
            fix="use --sampler ddim",
        )
    else:
        known = {name: config[name] for name in own.config if name in config}
        scheduler = type(own).from_config(known)
    set_timesteps(model, scheduler, steps)
    _check_terminal_snr(model, scheduler.timesteps, steps)
    return scheduler


def set_timesteps(model: Diffusion, scheduler: Any, steps: int) -> None:
    """Set a scheduler's timesteps as the stock pipeline of the family does."""
    sigmas = model.family.sigmas(steps)
    if sigmas is None or scheduler.config.get("use_flow_sigmas"):
        arguments: dict[str, Any] = {"num_inference_steps": steps}
    else:
        arguments = {"sigmas": sigmas}
    if scheduler.config.get("use_dynamic_shifting"):
        arguments["mu"] = dynamic_mu(scheduler.config, model.family.tokens)
    with running(f"the scheduler of {model.folder}"):
        scheduler.set_timesteps(**arguments)


def _euler(model: Diffusion) -> Any:
    """Return Euler's steps along a flow, which are those of DDIM with eta 0."""
    own = model.scheduler
    if isinstance(own, diffusers.FlowMatchEulerDiscreteScheduler):
        return own
    return diffusers.FlowMatchEulerDiscreteScheduler(model.T, shift=model.shift)


def _ddim(model: Diffusion, config: dict[str, Any], steps: int) -> Any:
    """Return DDIM on the abar of the base's scheduler."""
    if config["steps_offset"] > model.T - 1 - (steps - 1) * (model.T // steps):
        config["steps_offset"] = 0  # the offset would lead beyond T
    fields = inspect.signature(diffusers.DDIMScheduler).parameters
    config = {name: value for name, value in config.items() if name in fields}
    config |= {"beta_schedule": "linear", "trained_betas": None, "rescale_betas_zero_snr": False}
    with running(f"the scheduler of {model.folder}"):
        scheduler: Any = diffusers.DDIMScheduler(**config | {"timestep_spacing": "leading"})
    scheduler.alphas_cumprod = model.scheduler.alphas_cumprod.clone()
    first = torch.tensor(1.0) if config["set_alpha_to_one"] else scheduler.alphas_cumprod[0]
    scheduler.final_alpha_cumprod = first
    return scheduler


def _own_config(model: Diffusion) -> dict[str, Any]:
    """Return the config of the base's scheduler, and the fields of DDIM that it lacks.

        clip_sample       False: only a scheduler that has the field clips
        thresholding      False, likewise
        steps_offset      0
        set_alpha_to_one  whether the last step goes to sigma 0: not in DEIS and SA-Solver, nor
                          with final_sigmas_type sigma_min
        prediction_type   the model's own

    `StableDiffusionPipeline` overrides its scheduler: no clipping, and an offset of 1.
    """
    own = model.scheduler
    ends_noisy = type(own).__name__.startswith(("DEIS", "SASolver"))
    ends_noisy |= own.config.get("final_sigmas_type") == "sigma_min"
    config = {
        "clip_sample": False,
        "thresholding": False,
        "steps_offset": 0,
        "set_alpha_to_one": not ends_noisy,
        **own.config,
        "prediction_type": model.prediction_type,
    }
    # Names of fields of the base's class; another class would put its own defaults in their place.
    config.pop("_use_default_values", None)
    if model.requires_text:
        config |= {"clip_sample": False, "steps_offset": 1}
    return config


def _check_terminal_snr(model: Diffusion, timesteps: Tensor, steps: int) -> None:
    if model.prediction_type != "epsilon":
        return
    empty = (model.alphas_cumprod == 0).nonzero().flatten().tolist()
    if set(empty) & set(timesteps.long().tolist()):
        fewer = min(50, model.T // 2)
        raise UsageError(
            f"with {steps} steps the sampler starts at t = {max(empty)}, where the SNR is 0:"
            " epsilon says nothing of x_0 there",
            fix=f"use fewer steps with DDIM, for example --steps {fewer} --sampler ddim",
        )


def check_sampling(
    model: Diffusion, options: SamplingOptions, captions: Sequence[str] | None
) -> None:
    """Check that a model can draw images with these options.

    Raises:
        UsageError: if there are more steps than timesteps, captions are missing, or the model has
            nothing to be guided by.
    """
    if options.steps > model.T:
        raise UsageError(f"steps is {options.steps}", fix=f"give at most {model.T} steps")
    if model.requires_text and not captions:
        fix = "give captions: --captions FILE, one per line"
        raise UsageError("the model takes text, and there are no captions", fix=fix)
    if options.guidance_scale == 1:
        return
    if model.family.is_distilled:
        return
    has_null = model.requires_text or (model.classes is not None and model.classes.null is not None)
    is_distilled = getattr(model.config, "time_cond_proj_dim", None) is not None
    if has_null and not is_distilled:
        return
    why = "has its guidance distilled into it" if has_null else "takes no condition to be without"
    what = f"guidance_scale is {options.guidance_scale:g}, and the model {why}"
    raise UsageError(what, fix="omit --guidance-scale")
