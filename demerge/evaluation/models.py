"""Who is evaluated, and as what; read from the records that demerge leaves in its folders.

base        the model that the others were made from: drift and changes of loss are taken against it
joint       an expert of [0, T), or a merge of such experts alone, theta_0 + a (theta_joint - theta_0)
expert      an expert of a part of [0, T)
ensemble    a folder of expert folders, routed by timestep on the base's schedule
merge       a folder with demerge.json
model       any other pipeline; and a folder of images, which is scored as it is

A folder with demerge's own plots, pages or scores is none of these: its pictures are not a model's images.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from demerge.diffusion.model import Diffusion
from demerge.diffusion.sampling import load_routed
from demerge.errors import UsageError
from demerge.evaluation.scores import FORMAT, Kind
from demerge.expert import EXPERT, Expert
from demerge.reporting.html import is_page, printable
from demerge.storage.safetensors_header import read_json, read_scheduler

Models = Sequence[str] | Mapping[str, "str | Path | Diffusion"]
PLOT = b"<dc:title>Matplotlib"
SLUG = 180  # bytes, so that seed and ending still fit into a file name


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model to be scored.

    Attributes:
        source: a pipeline folder, a Hub id, a folder of experts or a folder of images.
        model: the model itself, if it is in memory; then `source` is its name.
    """

    name: str
    kind: Kind
    source: str
    model: Diffusion | None = field(default=None, repr=False, compare=False)

    @property
    def is_images(self) -> bool:
        """Whether the source is a folder of images."""
        folder = Path(self.source)
        return (
            self.model is None
            and self.kind == "model"
            and folder.is_dir()
            and not _is_pipeline(folder)
        )

    def load(self, base: ModelSpec | None = None, device: str = "cpu") -> Diffusion:
        """Load the model; a routed ensemble takes the schedule of `base`.

        Raises:
            InputError: if the model is missing, damaged or not supported.
            UsageError: if an ensemble comes without a base.
        """
        if self.model is not None:
            return self.model.to(device)
        if self.kind != "ensemble":
            return Diffusion.load(self.source, device=device)
        if base is None:
            raise UsageError("a routed ensemble needs the base's schedule", fix="give --base MODEL")
        return load_routed(base.model or base.source, Path(self.source), device=device)

    @property
    def slug(self) -> str:
        """The name as part of a file name, of at most 180 bytes."""
        slug = re.sub(r"[^\w.=-]+", "-", self.name).strip("-.") or "model"
        if len(slug.encode()) <= SLUG:
            return slug
        digest = hashlib.sha256(self.name.encode()).hexdigest()[:8]
        return f"{slug.encode()[: SLUG - 9].decode(errors='ignore')}-{digest}"


def entrants(
    models: Models, base: str | None = None, kinds: Mapping[str, Kind] | None = None
) -> list[ModelSpec]:
    """Tell what each model is; the base is `base`, or else the first pipeline that demerge did not make.

    Args:
        models: paths, ids or NAME=MODEL; or a table of names and paths, ids or models in memory.
        base: the name, path or id of the base.
        kinds: what a model of this name is, if its records do not say so, as for a model in memory.

    Raises:
        UsageError: if there are none, two have one name, or a folder holds demerge's own plots.
    """
    if not models:
        raise UsageError("there is no model to evaluate", fix="name at least one")
    pairs = (
        list(models.items()) if isinstance(models, Mapping) else [_split(text) for text in models]
    )
    found = [_entrant(name, source, (kinds or {}).get(name)) for name, source in pairs]
    if base is None:
        base = next(
            (e.source for e in found if e.kind in ("model", "base") and not e.is_images), None
        )
    found = [replace(e, kind="base") if base in (e.source, e.name) else e for e in found]
    repeated = {e.slug for e in found if sum(other.slug == e.slug for other in found) > 1}
    found = [
        replace(e, name=printable(_long(e.source))) if e.slug in repeated else e for e in found
    ]
    if len({e.slug for e in found}) < len(found):
        raise UsageError(
            f"several models are named {', '.join(sorted(repeated))}", fix="name them: NAME=MODEL"
        )
    return found


def without_reports(models: Models) -> tuple[Models, list[str]]:
    """Leave out of a list of paths, as a shell's `*` makes it, the folders of demerge's own plots; return these, too.

    What has a name is not left out: `entrants` refuses it.
    """
    if isinstance(models, Mapping):
        return models, []
    left_out = [text for text in models if not _split(text)[0] and is_report(Path(text))]
    kept = [text for text in models if text not in left_out]
    return (kept, left_out) if kept else (models, [])


def is_report(folder: Path) -> bool:
    """Whether a folder's pictures are demerge's own plots, or lie next to a page or scores that it wrote."""
    if not folder.is_dir() or _is_pipeline(folder) or any(folder.glob(f"*/{EXPERT}")):
        return False
    places = {folder, *(path.parent for path in folder.rglob("*.png"))}
    pages = any(
        is_page(path) for place in places for path in place.glob("*.html") if path.is_file()
    )
    return pages or any(
        _is_own(path)
        for place in places
        for kind in ("svg", "json")
        for path in place.glob(f"*.{kind}")
    )


def _is_own(path: Path) -> bool:
    """Whether a plot of matplotlib or a score stands next to a picture of the same name."""
    if not (path.is_file() and path.with_suffix(".png").is_file()):
        return False
    with path.open("rb") as stream:
        head = stream.read(2048)
    return (PLOT if path.suffix == ".svg" else FORMAT.encode()) in head


def kind_of(folder: Path) -> Kind:
    """Tell a model's kind by the records in its folder.

    Raises:
        InputError: where a record is damaged.
    """
    if (folder / EXPERT).is_file():
        return "joint" if _is_whole(list(Expert.load(folder / EXPERT).range), folder) else "expert"
    if (folder / "demerge.json").is_file():
        experts = read_json(folder / "demerge.json").get("experts")
        known = [e for e in experts if isinstance(e, dict)] if isinstance(experts, list) else []
        return (
            "joint" if known and all(_is_whole(e.get("range"), folder) for e in known) else "merge"
        )
    return "ensemble" if not _is_pipeline(folder) and any(folder.glob(f"*/{EXPERT}")) else "model"


def _entrant(name: str, source: str | Path | Diffusion, kind: Kind | None) -> ModelSpec:
    if isinstance(source, Diffusion):
        return ModelSpec(printable(name), kind or "model", name, source)
    folder = Path(source)
    if is_report(folder):
        what = f"{folder}: its pictures are plots that demerge wrote, not a model's images"
        raise UsageError(what, fix="leave it out, or name a folder that holds images alone")
    if kind is None and (expert := _only_joint(folder)):
        folder, source = expert, str(expert)
    kind = kind or kind_of(folder)
    plain = (
        {"ensemble": "routed ensemble", "joint": "joint"}.get(kind)
        if not (folder / "demerge.json").is_file()
        else None
    )
    return ModelSpec(printable(name or plain or _short(str(source))), kind, str(source))


def _only_joint(folder: Path) -> Path | None:
    """Return the expert of [0, T) that is alone in the folder that finetune printed: a joint control, no ensemble."""
    found = [path.parent for path in folder.glob(f"*/{EXPERT}")] if not _is_pipeline(folder) else []
    return found[0] if len(found) == 1 and kind_of(found[0]) == "joint" else None


def _split(text: str) -> tuple[str, str]:
    if "=" not in text or Path(text).exists():
        return "", text
    name, _, source = text.partition("=")
    return name, source


def _short(source: str) -> str:
    return Path(source).resolve().name if Path(source).exists() else source


def _long(source: str) -> str:
    return "/".join(Path(source).resolve().parts[-2:])


def _is_pipeline(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("model_index.json", "config.json"))


def _is_whole(span: Any, folder: Path) -> bool:
    scheduler = folder / "scheduler" / "scheduler_config.json"
    total = read_scheduler(scheduler).get("num_train_timesteps") if scheduler.is_file() else None
    return total is not None and span == [0, total]
