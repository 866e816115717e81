"""What a model is, from its headers and configs alone: no weight is read and torch is not imported."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from demerge.expert import expert_of
from demerge.headers import read_json
from demerge.weights import Checkpoint

MERGED_CLASSES = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel", "Transformer2DModel")
FACTORS = ("lora_A", "lora_B", "lora_up", "lora_down", "lora.up", "lora.down")


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a model; what its files do not say is None.

    Attributes:
        range: [start, stop) of an expert.
        merged_by: the method, where demerge made it.
        mergeable: whether `demerge merge` takes it.
        note: what else a user should know, for example what the other commands need.
    """

    path: str
    kind: str
    model_class: str | None
    pipeline: str | None
    parameters: int
    tensors: int
    dtypes: list[str]
    bytes: int
    sample_size: Any
    prediction_type: str | None
    scheduler: str | None
    timesteps: int | None
    range: list[int] | None
    merged_by: str | None
    mergeable: bool
    note: str

    def document(self) -> dict[str, Any]:
        """Return the facts as JSON values."""
        return asdict(self)

    def lines(self) -> list[tuple[str, str]]:
        """Return the known facts for a person, as (name, value)."""
        known = [(n, v) for n, v in self.document().items() if v not in (None, "", [])]
        return [(name.replace("_", " "), _text(value)) for name, value in known]


def facts_of(path: Path) -> Facts:
    """Read what a model is.

    Raises:
        InputError: where a file is missing, damaged or hostile.
    """
    checkpoint = Checkpoint.open(path)
    place = checkpoint.place
    config = checkpoint.config or {}
    folder = place.pipeline
    scheduler = _read(folder / "scheduler" / "scheduler_config.json" if folder else None)
    expert = expert_of(place)
    recipe = _read(place.beside("demerge.json"))
    model_class = config.get("_class_name")
    mergeable, note = _verdict(checkpoint, model_class, has_pipeline=folder is not None)
    return Facts(
        path=str(path),
        kind="pipeline" if folder else "component" if place.component else "file",
        model_class=model_class,
        pipeline=_read(folder / "model_index.json" if folder else None).get("_class_name"),
        parameters=checkpoint.parameters,
        tensors=len(checkpoint),
        dtypes=checkpoint.dtypes,
        bytes=sum(file.stat().st_size for file in place.files),
        sample_size=config.get("sample_size"),
        prediction_type=scheduler.get("prediction_type"),
        scheduler=scheduler.get("_class_name"),
        timesteps=scheduler.get("num_train_timesteps"),
        range=None if expert is None else list(expert.range),
        merged_by=recipe.get("method"),
        mergeable=mergeable,
        note=note,
    )


def _verdict(checkpoint: Checkpoint, model_class: Any, *, has_pipeline: bool) -> tuple[bool, str]:
    if checkpoint.parameters == 0:
        return False, "no floating point tensor"
    if any(part in name for name in checkpoint for part in FACTORS):
        return True, "a LoRA: merges as an expert of the base that it was trained on"
    if not has_pipeline:
        return True, "merges; analyze, finetune and sample need a whole pipeline folder"
    if model_class not in MERGED_CLASSES:
        return True, f"merges; analyze, finetune and sample do not know the class {model_class}"
    return True, "merges with models of equal keys and shapes finetuned from one base"


def _read(path: Path | None) -> dict[str, Any]:
    return read_json(path) if path is not None and path.is_file() else {}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
