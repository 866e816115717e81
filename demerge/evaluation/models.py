"""Which models are evaluated, and as what, by the records that demerge leaves in folders.

base        the model that the others were made from: drift and changes of loss are taken against it
joint       an expert of [0, T), or a merge of such alone, theta_0 + a (theta_joint - theta_0)
expert      an expert of a part of [0, T)
ensemble    a folder of expert folders, routed by timestep on the base's schedule; a pipeline of two
            denoisers, which routes them itself
merge       a folder with demerge.json
model       any other pipeline; and a folder of images, which is scored as it is

A folder with demerge's own plots, pages or scores is none of these: its pictures are not a model's
images.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from demerge.diffusion.adapters import is_lora_path, load_model
from demerge.diffusion.ensemble import load_routed
from demerge.diffusion.model import Diffusion
from demerge.errors import UsageError
from demerge.evaluation.scores import FORMAT, Kind
from demerge.expert import EXPERT, Expert, find_plain_experts
from demerge.reporting.html import is_page, printable
from demerge.storage.safetensors_header import read_json, read_scheduler
from demerge.timesteps import Partition

Models = Sequence[str | Path] | Mapping[str, str | Path | Diffusion]
MERGE = "demerge.json"
OWN_PLOT = b"<dc:title>Matplotlib"
SLUG = 180  # bytes, so that seed and ending still fit into a file name


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model to be scored; if it is in memory, `source` is its name."""

    name: str
    kind: Kind
    source: str  # a pipeline folder, a Hub id, a folder of experts or a folder of images
    model: Diffusion | None = field(default=None, repr=False, compare=False)

    @property
    def is_images(self) -> bool:
        """Whether the source is a folder of images."""
        if self.model is not None or self.kind != "model":
            return False
        return Path(self.source).is_dir() and not _is_pipeline(Path(self.source))

    def load(
        self, base: ModelSpec | None = None, device: str = "cpu", resolution: int | None = None
    ) -> Diffusion:
        """Load the model; a LoRA and a routed ensemble need `base`."""
        if self.model is not None:
            return self.model.to(device)
        is_lora = is_lora_path(self.source)
        is_routed = self.kind == "ensemble" and not _is_pipeline(Path(self.source))
        if not is_routed and not is_lora:
            return Diffusion.load(self.source, device=device, resolution=resolution)
        if base is None:
            what = (
                "a LoRA needs its base"
                if is_lora
                else "a routed ensemble needs the base's schedule"
            )
            raise UsageError(f"{self.source}: {what}", fix="give --base MODEL")
        origin = base.model or Diffusion.load(base.source, device=device, resolution=resolution)
        if is_lora:
            return load_model(self.source, origin, device=device)
        return load_routed(origin, self.source, device=device)

    @property
    def slug(self) -> str:
        """The name as part of a file name, of at most 180 bytes."""
        slug = re.sub(r"[^\w.=-]+", "-", self.name).strip("-.") or "model"
        if len(slug.encode()) <= SLUG:
            return slug
        digest = hashlib.sha256(self.name.encode()).hexdigest()[:8]
        return f"{slug.encode()[: SLUG - 9].decode(errors='ignore')}-{digest}"


def specify_models(
    models: Models, base: str | None = None, kinds: Mapping[str, Kind] | None = None
) -> list[ModelSpec]:
    """Return what each of some paths, ids, NAME=MODEL or models in memory is; see `evaluate`.

    Raises:
        UsageError: if there are none, two have one name, or a folder holds demerge's own plots.
    """
    if not models:
        raise UsageError("there is no model to evaluate", fix="name at least one")
    pairs: Sequence[tuple[str, str | Path | Diffusion]]
    pairs = list(models.items()) if isinstance(models, Mapping) else list(map(_split, models))
    specs = [_specify(name, source, (kinds or {}).get(name)) for name, source in pairs]
    if base is None:
        stock = (s for s in specs if s.kind in ("model", "base") and not s.is_images)
        base = next((spec.source for spec in stock if not is_lora_path(spec.source)), None)
    specs = [replace(s, kind="base") if base in (s.source, s.name) else s for s in specs]
    counts = Counter(spec.slug for spec in specs)
    repeated = sorted(slug for slug in counts if counts[slug] > 1)
    for i, spec in enumerate(specs):
        if spec.slug in repeated:
            longer = "/".join(Path(spec.source).resolve().parts[-2:])
            specs[i] = replace(spec, name=printable(longer))
    if len({spec.slug for spec in specs}) < len(specs):
        what = f"several models are named {', '.join(repeated)}"
        raise UsageError(what, fix="name them: NAME=MODEL")
    return specs


def leave_out_reports(models: Models) -> tuple[Models, list[str]]:
    """Split a shell's `*` into models and folders of demerge's plots that were given no name."""
    if isinstance(models, Mapping):
        return models, []
    reports = [str(m) for m in models if not _split(m)[0] and is_report(m)]
    others = [model for model in models if str(model) not in reports]
    return (others, reports) if others else (models, [])


def is_report(folder: str | Path) -> bool:
    """Whether a folder's pictures are demerge's own plots, or lie next to its pages or scores."""
    folder = Path(folder)
    if not folder.is_dir() or _is_pipeline(folder) or any(folder.glob(f"*/{EXPERT}")):
        return False
    for place in {folder, *(path.parent for path in folder.rglob("*.png"))}:
        if any(is_page(path) for path in place.glob("*.html") if path.is_file()):
            return True
        if any(map(_is_own, [*place.glob("*.svg"), *place.glob("*.json")])):
            return True
    return False


def _is_own(path: Path) -> bool:
    """Whether a file is a plot of matplotlib or a score, next to a picture of the same name."""
    if not (path.is_file() and path.with_suffix(".png").is_file()):
        return False
    with path.open("rb") as stream:
        return (OWN_PLOT if path.suffix == ".svg" else FORMAT.encode()) in stream.read(2048)


def detect_kind(folder: str | Path) -> Kind:
    """Return a model's kind by the records in its folder."""
    folder = Path(folder)
    if (folder / EXPERT).is_file():
        span = list(Expert.load(folder / EXPERT).range)
        return "joint" if _is_whole(span, folder) else "expert"
    if (folder / MERGE).is_file():
        experts = read_json(folder / MERGE).get("experts")
        experts = experts if isinstance(experts, list) else []
        spans = [expert.get("range") for expert in experts if isinstance(expert, dict)]
        are_joint = spans and all(_is_whole(span, folder) for span in spans)
        return "joint" if are_joint else "merge"
    return "ensemble" if _expert_folders(folder) or Partition.of_pipeline(folder) else "model"


def _specify(name: str, source: str | Path | Diffusion, kind: Kind | None) -> ModelSpec:
    if isinstance(source, Diffusion):
        return ModelSpec(printable(name), kind or "model", name, source)
    folder = Path(source)
    if is_report(folder):
        what = f"{folder}: its pictures are plots that demerge wrote, not a model's images"
        raise UsageError(what, fix="leave it out, or name a folder that holds images alone")
    experts = _expert_folders(folder)
    if kind is None and len(experts) == 1 and detect_kind(experts[0]) == "joint":
        source = folder = experts[0]  # the folder that finetune printed for the joint control
    kind = kind or detect_kind(folder)
    if not name and kind in ("ensemble", "joint") and not (folder / MERGE).is_file():
        name = "routed ensemble" if kind == "ensemble" else "joint"
    name = name or (folder.resolve().name if folder.exists() else str(source))
    return ModelSpec(printable(name), kind, str(source))


def _expert_folders(folder: Path) -> list[Path]:
    """Return the experts in a folder: subfolders, or files of other trainers."""
    if _is_pipeline(folder):
        return []
    return [path.parent for path in folder.glob(f"*/{EXPERT}")] or find_plain_experts(folder)


def _split(model: str | Path) -> tuple[str, str]:
    name, equals, source = str(model).partition("=")
    return (name, source) if equals and not Path(model).exists() else ("", str(model))


def _is_pipeline(folder: Path) -> bool:
    has_config = any((folder / name).is_file() for name in ("model_index.json", "config.json"))
    return has_config or is_lora_path(folder)


def _is_whole(span: Any, folder: Path) -> bool:
    scheduler = folder / "scheduler" / "scheduler_config.json"
    config: Any = {}
    if scheduler.is_file():
        config = read_scheduler(scheduler)
    elif (folder / EXPERT).is_file():  # a LoRA, whose record describes its base
        base: Any = Expert.load(folder).inputs.get("base") or {}
        config = base.get("scheduler") or {}
    total = config.get("num_train_timesteps")
    return total is not None and span == [0, total]
