"""Images from a model: exactly n of them, image i a function of (seed, i) alone.

The starting noise of image i, and the noise a stochastic sampler adds at each of its steps, come from streams keyed by
(seed, i), so that images do not depend on batch size (up to float rounding), order or process, and models are compared on
common noise.

`ddim` is DDIM with eta 0 (arXiv 2010.02502) on `leading` timesteps t_k = k floor(T / S), for which the update's previous
timestep t - floor(T / S) is exact. `base` is the base's own scheduler with its own config.

`routed` is the ensemble that merging is measured against: each x_t goes to the expert whose range holds t (DeMe, arXiv
2410.06664, section 3.2).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from demerge.diffusion.loading import running
from demerge.diffusion.model import Diffusion
from demerge.diffusion.threads import fitting_threads
from demerge.errors import InputError, NumericalError, UsageError
from demerge.expert import list_experts
from demerge.randomness import key_of, normal
from demerge.reporting.images import to_uint8
from demerge.timesteps import Partition

SAMPLERS = ("ddim", "base")


def sample(
    model: Diffusion,
    n: int,
    *,
    seed: int,
    steps: int = 50,
    sampler: str = "ddim",
    guidance_scale: float = 1.0,
    batch_size: int = 64,
    captions: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    first: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draw images first .. first + n - 1 of the seed's sequence, uint8 [n C H W].

    Args:
        guidance_scale: g of classifier-free guidance, f(x, "") + g (f(x, c) - f(x, "")), with no class in place of "" for a
            DiT; 1 is none.
        captions: for a text-to-image model; image i gets captions[i % len(captions)].
        labels: for a model of C classes, likewise; 0, 1 .. C - 1 by default. A DiT takes C for no class.
        progress: called with (images done, n) after each batch.

    Raises:
        UsageError: where n, steps, the sampler or a label is out of range, or captions are missing.
        NumericalError: where an image is not finite.
    """
    images = torch.empty(n, *model.image_shape, dtype=torch.uint8)
    for indices, draw in batches(
        model,
        n,
        seed=seed,
        steps=steps,
        sampler=sampler,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
        captions=captions,
        labels=labels,
        first=first,
    ):
        images[indices[0] - first : indices[-1] - first + 1] = draw()
        if progress is not None:
            progress(indices[-1] - first + 1, n)
    return images


def batches(
    model: Diffusion,
    n: int,
    *,
    seed: int,
    steps: int,
    sampler: str,
    guidance_scale: float,
    batch_size: int,
    captions: Sequence[str] | None,
    labels: Sequence[int] | None,
    first: int = 0,
) -> list[tuple[list[int], Callable[[], Tensor]]]:
    """Return the batches of `sample`: the images' numbers, and the function that draws them, uint8 [B C H W]."""
    check_sampling(model, n, steps, sampler, batch_size, captions, guidance_scale)
    condition = _conditions(model, captions, labels)
    scheduler = make_scheduler(model, steps, sampler)
    starts = range(first, first + n, batch_size)
    groups = [list(range(start, min(start + batch_size, first + n))) for start in starts]
    return [
        (indices, partial(_batch, model, scheduler, seed, indices, condition, guidance_scale))
        for indices in groups
    ]


def captions_of(file: Path) -> list[str]:
    """Read captions, one per line.

    Raises:
        InputError: if the file cannot be read as UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{file}: cannot be read as UTF-8: {error}", fix="save it as UTF-8, a caption per line"
        ) from error


def labels_of(text: str) -> list[int]:
    """Read numbers of classes, separated by commas.

    Raises:
        UsageError: where one is no whole number.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() for word in words):
        raise UsageError(
            f"labels '{text}' are no numbers of classes",
            fix="give whole numbers, for example 3,3,7",
        )
    return [int(word) for word in words]


def make_scheduler(model: Diffusion, steps: int, sampler: str) -> Any:
    """Return a scheduler with `steps` inference steps, as the base's own pipeline would make it.

    `ddim` steps on the base's own abar. A field of DDIM that the base's scheduler does not have is set to what that
    scheduler does, never to DDIM's default; see `_own_config`.

    Raises:
        UsageError: if the base's own scheduler needs a variance that the denoiser learned, or a step starts at SNR 0,
            where a predicted epsilon says nothing of x_0.
    """
    own, config = model.scheduler, _own_config(model)
    if sampler == "ddim":
        if config["steps_offset"] > model.T - 1 - (steps - 1) * (model.T // steps):
            config["steps_offset"] = 0  # the offset would lead beyond T
        fields = inspect.signature(diffusers.DDIMScheduler).parameters
        schedule = {
            "beta_schedule": "linear",
            "trained_betas": None,
            "rescale_betas_zero_snr": False,
        }  # abar is set below
        stated = {name: value for name, value in config.items() if name in fields}
        with running(f"the scheduler of {model.folder}"):
            scheduler: Any = diffusers.DDIMScheduler(
                **{**stated, **schedule, "timestep_spacing": "leading"}
            )
        scheduler.alphas_cumprod = own.alphas_cumprod.clone()
        scheduler.final_alpha_cumprod = (
            torch.tensor(1.0) if config["set_alpha_to_one"] else scheduler.alphas_cumprod[0]
        )
    else:
        if str(own.config.get("variance_type", "")).startswith("learned"):
            raise UsageError(
                f"the base's own {type(own).__name__} draws with a learned variance, which is not supported",
                fix="use the sampler ddim",
            )
        scheduler = type(own).from_config(
            {name: config[name] for name in own.config if name in config}
        )
    with running(f"the scheduler of {model.folder}"):
        scheduler.set_timesteps(steps)
    _check_terminal_snr(model, scheduler.timesteps, steps)
    return scheduler


def _own_config(model: Diffusion) -> dict[str, Any]:
    """Return the config of the base's scheduler with the fields of DDIM that it lacks, as the base's pipeline would run it.

        clip_sample       False: only a scheduler that has the field clips
        thresholding      False, likewise
        steps_offset      0
        set_alpha_to_one  whether the last step goes to sigma 0: not in DEIS and SA-Solver, nor with final_sigmas_type sigma_min
        prediction_type   the model's own

    `StableDiffusionPipeline` overrides its scheduler: no clipping, and an offset of 1.
    """
    own = model.scheduler
    least_noise = (
        type(own).__name__.startswith(("DEIS", "SASolver"))
        or own.config.get("final_sigmas_type") == "sigma_min"
    )
    lacking = {
        "clip_sample": False,
        "thresholding": False,
        "steps_offset": 0,
        "set_alpha_to_one": not least_noise,
    }
    config = {**lacking, **own.config, "prediction_type": model.prediction_type}
    config.pop(
        "_use_default_values", None
    )  # of the base's class; another class would put its own in their place
    return config | ({"clip_sample": False, "steps_offset": 1} if model.requires_text else {})


def _check_terminal_snr(model: Diffusion, timesteps: Tensor, steps: int) -> None:
    empty = (model.alphas_cumprod == 0).nonzero().flatten().tolist()
    if model.prediction_type == "epsilon" and set(empty) & set(timesteps.long().tolist()):
        raise UsageError(
            f"with {steps} steps the sampler starts at t = {max(empty)}, where the SNR is 0: epsilon says nothing of x_0 there",
            fix=f"use fewer steps, for example {min(50, model.T // 2)}, with the sampler ddim",
        )


def check_sampling(
    model: Diffusion,
    n: int,
    steps: int,
    sampler: str,
    batch_size: int,
    captions: Sequence[str] | None,
    guidance_scale: float = 1.0,
) -> None:
    """Refuse options that `sample` would refuse.

    Raises:
        UsageError: if a number or the sampler is out of range, captions are missing, or there is nothing to guide by.
    """
    for name, value, top in (
        ("n", n, 10**9),
        ("steps", steps, model.T),
        ("batch_size", batch_size, 10**6),
    ):
        if not 1 <= value <= top:
            raise UsageError(f"{name} is {value}", fix=f"give 1 <= {name} <= {top}")
    if sampler not in SAMPLERS:
        raise UsageError(f"sampler '{sampler}' is unknown", fix=f"use one of {', '.join(SAMPLERS)}")
    if model.requires_text and not captions:
        raise UsageError(
            "the model takes text", fix="give captions; in a command, --captions FILE, one per line"
        )
    if not 1 <= guidance_scale < math.inf:
        raise UsageError(
            f"guidance_scale is {guidance_scale:g}",
            fix="give 1 for no guidance, or more, for example 7.5",
        )
    null = model.requires_text or (model.classes is not None and model.classes.null is not None)
    if guidance_scale > 1 and (
        not null or getattr(model.config, "time_cond_proj_dim", None) is not None
    ):
        what = (
            "has its guidance distilled into it"
            if null
            else "takes no condition that it could be without"
        )
        raise UsageError(
            f"guidance_scale is {guidance_scale:g}, and the model {what}",
            fix="leave out --guidance-scale",
        )


def _conditions(
    model: Diffusion, captions: Sequence[str] | None, labels: Sequence[int] | None
) -> Callable[[Sequence[int]], Tensor | None]:
    """Return the function that gives the condition of some images."""
    known: Sequence[int] = []
    if labels is not None and (model.classes is None or not labels):
        what = "the model takes no classes" if model.classes is None else "there is none among them"
        raise UsageError(f"labels were given, and {what}", fix="leave them out")
    if model.classes is not None:
        known = labels or range(model.classes.count)
        model.classes.labels(known, len(known))

    def of(indices: Sequence[int]) -> Tensor | None:
        texts = [captions[i % len(captions)] for i in indices] if captions else None
        return model.condition(
            len(indices), texts, [known[i % len(known)] for i in indices] if known else None
        )

    return of


@torch.inference_mode()
def _batch(
    model: Diffusion,
    scheduler: Any,
    seed: int,
    indices: Sequence[int],
    condition_of: Callable[[Sequence[int]], Tensor | None],
    guidance_scale: float,
) -> Tensor:
    condition, guided = condition_of(indices), guidance_scale > 1
    if guided and condition is not None:
        nulls = None if model.classes is None else [model.classes.null or 0] * len(indices)
        empty = model.condition(len(indices), [""] * len(indices), nulls)
        condition = condition if empty is None else torch.cat([empty, condition])
    scheduler.set_timesteps(
        scheduler.num_inference_steps
    )  # forgets the batch before: PNDM and others keep a history
    x = (
        normal(model.sample_shape, seed, "image", samples=indices).to(model.device)
        * scheduler.init_noise_sigma
    )
    arguments: dict[str, Any] = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        arguments["generator"] = [
            torch.Generator(model.device).manual_seed(key_of(seed, "sampler", i) % 2**63)
            for i in indices
        ]
    with fitting_threads(model, len(indices)):
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t)
            prediction = model.predict(
                torch.cat([scaled, scaled]) if guided else scaled, t.to(model.device), condition
            )
            if guided:
                without, given = prediction.chunk(2)
                prediction = without + guidance_scale * (given - without)
            with running(f"the scheduler of {model.folder}"):
                x = scheduler.step(prediction, t, x, **arguments).prev_sample
    if not bool(torch.isfinite(x).all()):
        raise NumericalError(
            "the sampler left the finite numbers", fix="check the weights: `demerge inspect MODEL`"
        )
    return to_uint8(model.decode(x)).cpu()


class RoutedDenoiser(nn.Module):
    """A denoiser that sends each sample to the expert of its timestep's range.

    Raises:
        UsageError: where experts and ranges differ in number.
    """

    def __init__(self, partition: Partition, denoisers: Sequence[nn.Module]) -> None:
        super().__init__()
        if len(partition) != len(denoisers):
            raise UsageError(
                f"{len(denoisers)} experts for {len(partition)} ranges",
                fix="give one expert for each range",
            )
        self.partition = partition
        self.experts = nn.ModuleList(denoisers)

    @property
    def config(self) -> Any:
        """The config the experts share."""
        return self.experts[0].config

    def forward(self, x: Tensor, t: Tensor | float, **condition: Any) -> UNet2DOutput:
        """Return the prediction [B C H W] for x [B C H W] at t, a number or [B]."""
        timesteps = torch.as_tensor(t).reshape(-1).expand(len(x)).to(x.device)
        routes = torch.tensor(
            [self.partition.route(value) for value in timesteps.tolist()], device=x.device
        )
        output = x.new_empty(
            len(x), self.config.out_channels or self.config.in_channels, *x.shape[2:]
        )
        for route in routes.unique().tolist():
            rows = (routes == route).nonzero().flatten()
            kept = {name: value[rows] for name, value in condition.items()}
            output[rows] = self.experts[route](x[rows], timesteps[rows], **kept).sample
        return UNet2DOutput(sample=output)


def routed(base: Diffusion, partition: Partition, denoisers: Sequence[nn.Module]) -> Diffusion:
    """Return the ensemble of experts routed by timestep, as a model that samples and scores like any other."""
    return base.with_denoiser(RoutedDenoiser(partition, denoisers))


def load_routed(
    base: str | Path | Diffusion, experts: Path | str, *, device: str = "cpu"
) -> Diffusion:
    """Load the experts in the subfolders of `experts` and route between them on the base's schedule; a base may be loaded.

    Raises:
        InputError: where no expert is there, or their ranges do not cover [0, T).
    """
    experts = Path(experts)
    found = list_experts(experts)
    denoisers = [Diffusion.load(folder, device=device).denoiser for folder in found.values()]
    base = base if isinstance(base, Diffusion) else Diffusion.load(base, device=device)
    return routed(base, Partition(tuple(found)), denoisers)
