"""Who is evaluated, and as what; read from the records that demerge leaves in its folders.

base        the model that the others were made from: drift and changes of loss are taken against it
joint       an expert of [0, T), or a merge of such experts alone, theta_0 + a (theta_joint - theta_0)
expert      an expert of a part of [0, T)
ensemble    a folder of expert folders, routed by timestep on the base's schedule
merge       a folder with demerge.json
model       any other pipeline; and a folder of images, which is scored as it is
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demerge.errors import UsageError
from demerge.evaluate.protocol import Kind
from demerge.expert import EXPERT, read_expert
from demerge.headers import read_json


@dataclass(frozen=True, slots=True)
class Entrant:
    """A model to be scored: `source` is a pipeline folder, a Hub id, a folder of experts or a folder of images."""

    name: str
    kind: Kind
    source: str

    @property
    def is_images(self) -> bool:
        """Whether the source is a folder of images."""
        folder = Path(self.source)
        return self.kind == "model" and folder.is_dir() and not _is_pipeline(folder)

    @property
    def slug(self) -> str:
        """The name as part of a file name."""
        return re.sub(r"[^\w.=-]+", "-", self.name).strip("-.") or "model"


def entrants(models: Sequence[str], base: str | None = None) -> list[Entrant]:
    """Tell what each MODEL or NAME=MODEL is; the base is `base`, or else the first pipeline that demerge did not make.

    Raises:
        UsageError: where there are none, or two have one name.
    """
    if not models:
        raise UsageError("there is no model to evaluate", fix="name at least one")
    named = [_split(text) for text in models]
    found = [_entrant(name, source) for name, source in named]
    if base is None:
        base = next((e.source for e in found if e.kind == "model" and not e.is_images), None)
    found = [Entrant(e.name, "base", e.source) if e.source == base else e for e in found]
    repeated = {e.slug for e in found if sum(other.slug == e.slug for other in found) > 1}
    found = [Entrant(_long(e.source), e.kind, e.source) if e.slug in repeated else e for e in found]
    if len({e.slug for e in found}) < len(found):
        raise UsageError(f"several models are named {', '.join(sorted(repeated))}", fix="name them: NAME=MODEL")
    return found


def kind_of(folder: Path) -> Kind:
    """Tell a model's kind by the records in its folder.

    Raises:
        InputError: where a record is damaged.
    """
    if (folder / EXPERT).is_file():
        return "joint" if _is_whole(list(read_expert(folder / EXPERT).range), folder) else "expert"
    if (folder / "demerge.json").is_file():
        experts = read_json(folder / "demerge.json").get("experts")
        known = [e for e in experts if isinstance(e, dict)] if isinstance(experts, list) else []
        return "joint" if known and all(_is_whole(e.get("range"), folder) for e in known) else "merge"
    return "ensemble" if not _is_pipeline(folder) and any(folder.glob(f"*/{EXPERT}")) else "model"


def _entrant(name: str, source: str) -> Entrant:
    kind, folder = kind_of(Path(source)), Path(source)
    plain = {"ensemble": "routed ensemble", "joint": "joint"}.get(kind) if not (folder / "demerge.json").is_file() else None
    return Entrant(name or plain or _short(source), kind, source)


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
    total = read_json(scheduler).get("num_train_timesteps") if scheduler.is_file() else None
    return total is not None and span == [0, total]
