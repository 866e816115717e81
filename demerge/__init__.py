"""demerge: one better diffusion model out of a pretrained one.

Measure how the gradients of different timesteps conflict, cut the timesteps into ranges where the conflict is worst,
finetune one expert per range, merge the experts into one stock model, and compare everything honestly (DeMe,
Decouple-then-Merge, arXiv 2410.06664). The five nouns, in the order data flows:

    ConflictMap -> Partition (of TimestepRanges) -> experts -> merged model (by a recipe) -> report (of Scores)

Names below and the stages are imported when first used, so that `import demerge` costs nothing.
Stages are functions in modules: `demerge.analysis.measure`, `demerge.finetuning.finetune`,
`demerge.merging.merge`, `demerge.diffusion.sampling.sample`, `demerge.evaluation.compare`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from demerge.conflict import ConflictMap
    from demerge.data import ImageData, load_images
    from demerge.diffusion.model import Diffusion
    from demerge.diffusion.sampling import load_routed, routed
    from demerge.errors import DemergeError
    from demerge.finetuning import FinetuneOptions
    from demerge.storage.checkpoint import Checkpoint
    from demerge.timesteps import Partition, TimestepRange

HOMES = {
    "Checkpoint": "storage.checkpoint",
    "ConflictMap": "conflict",
    "DemergeError": "errors",
    "Diffusion": "diffusion.model",
    "FinetuneOptions": "finetuning",
    "ImageData": "data",
    "Partition": "timesteps",
    "TimestepRange": "timesteps",
    "load_images": "data",
    "load_routed": "diffusion.sampling",
    "routed": "diffusion.sampling",
}

STAGES = ("analysis", "evaluation", "finetuning", "merging", "statistics")

__all__ = [
    "Checkpoint",
    "ConflictMap",
    "DemergeError",
    "Diffusion",
    "FinetuneOptions",
    "ImageData",
    "Partition",
    "TimestepRange",
    "load_images",
    "load_routed",
    "routed",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *STAGES})


def __getattr__(name: str) -> Any:
    if name in STAGES:
        return import_module(f"demerge.{name}")
    if name not in HOMES:
        raise AttributeError(f"module 'demerge' has no attribute {name!r}")
    return getattr(import_module(f"demerge.{HOMES[name]}"), name)
