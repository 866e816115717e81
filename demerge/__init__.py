"""Turn a pretrained diffusion model into a better one by merging experts of timestep ranges.

Measure how the gradients of different timesteps conflict. Partition the timesteps into ranges if
they do. Finetune one expert per range, merge the experts into one stock model, and evaluate it
(DeMe, Decouple-then-Merge, arXiv 2410.06664). Five nouns, in the order of the data, and the verbs
between them:

    measure(model, data)                  -> ConflictMap
    partition(map, n)                     -> Partition of TimestepRanges
    finetune(model, data, partition, ...) -> one Expert per range
    merge(model, experts, out)            -> a stock model, and the Recipe that made it
    evaluate(models, data)                -> Scores, and a report of them

A name is imported when it is first used, so that `import demerge` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from demerge.analysis import MeasurementOptions, measure, partition
    from demerge.conflict import ConflictMap
    from demerge.data import ImageData, load_images
    from demerge.diffusion.ensemble import load_routed, routed
    from demerge.diffusion.model import Diffusion
    from demerge.diffusion.options import SamplingOptions
    from demerge.diffusion.sampling import sample
    from demerge.errors import DemergeError
    from demerge.evaluation import EvaluationOptions, Scores, evaluate
    from demerge.expert import Expert
    from demerge.finetuning import FinetuneOptions, finetune
    from demerge.merging import Recipe, merge
    from demerge.storage.checkpoint import Checkpoint
    from demerge.timesteps import Partition, TimestepRange

MODULES = {
    "analysis": ["MeasurementOptions", "measure", "partition"],
    "conflict": ["ConflictMap"],
    "data": ["ImageData", "load_images"],
    "diffusion.model": ["Diffusion"],
    "diffusion.options": ["SamplingOptions"],
    "diffusion.ensemble": ["load_routed", "routed"],
    "diffusion.sampling": ["sample"],
    "errors": ["DemergeError"],
    "evaluation": ["EvaluationOptions", "Scores", "evaluate"],
    "expert": ["Expert"],
    "finetuning": ["FinetuneOptions", "finetune"],
    "merging": ["Recipe", "merge"],
    "storage.checkpoint": ["Checkpoint"],
    "timesteps": ["Partition", "TimestepRange"],
}
HOMES = {name: module for module, names in MODULES.items() for name in names}
STAGES = ("analysis", "evaluation", "finetuning", "merging", "statistics")

__all__ = [
    "Checkpoint", "ConflictMap", "DemergeError", "Diffusion", "EvaluationOptions", "Expert",
    "FinetuneOptions", "ImageData", "MeasurementOptions", "Partition", "Recipe", "SamplingOptions",
    "Scores", "TimestepRange", "evaluate", "finetune", "load_images", "load_routed", "measure",
    "merge", "partition", "routed", "sample",
]  # fmt: skip


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *STAGES})


def __getattr__(name: str) -> Any:
    if name in STAGES:
        return import_module(f"demerge.{name}")
    if name not in HOMES:
        raise AttributeError(f"module 'demerge' has no attribute {name!r}")
    return getattr(import_module(f"demerge.{HOMES[name]}"), name)
