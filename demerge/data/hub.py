"""Data sets of the Hugging Face Hub, `hf:NAME` or `hf:NAME:CONFIG`, through the `data` extra."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from demerge.data.decode import decode_image
from demerge.data.layout import Splits
from demerge.data.values import Least, Pixels8, Shape, Source
from demerge.errors import InputError, UsageError

TEXT_COLUMNS = ("text", "caption", "prompt")
LABEL_COLUMNS = ("label", "labels", "fine_label")
HELD_OUT = ("test", "validation", "valid", "val")
LOOK_AT = 64


@dataclass(frozen=True, slots=True)
class Rows:
    """Images of one column of a data set's splits, laid end to end and decoded one by one."""

    name: str
    parts: tuple[Any, ...]
    column: str
    resident: ClassVar[bool] = False

    @property
    def shapes(self) -> frozenset[Shape]:
        """The shapes [C H W] of the first images; others may differ."""
        shapes = [self.read(i).shape for i in range(min(LOOK_AT, len(self)))]
        return frozenset((c, h, w) for c, h, w in shapes)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def read(self, index: int, least: Least | None = None) -> Pixels8:
        """Return image `index`, [C H W]."""
        row = index
        for part in self.parts:
            if row < len(part):
                return decode_image(part[row][self.column], f"{self.name}, image {index}", least)
            row -= len(part)
        raise IndexError(index)


def read_hub(text: str) -> Source:
    """Read the first column of images of `hf:NAME[:CONFIG]`, its train and held-out splits."""
    name, _, config = text.removeprefix("hf:").partition(":")
    loaded = _load(name, config or None)
    held = next((name for name in HELD_OUT if name in loaded), None)
    names = [name for name in ("train", held) if name and name in loaded] or sorted(loaded)[:1]
    parts = tuple(loaded[n] for n in names)
    pixels = Rows(text, parts, _image_column(text, parts[0]))
    splits = Splits(test=tuple(range(len(parts[0]), len(pixels))) if len(parts) == 2 else None)
    keys = " ".join(str(getattr(part, "_fingerprint", len(part))) for part in parts)
    content = hashlib.sha256(f"{text} {keys}".encode()).hexdigest()
    captions, labels = _column(parts, TEXT_COLUMNS, str), _column(parts, LABEL_COLUMNS, int)
    return Source(text, pixels, content, splits, captions, labels)


def _load(name: str, config: str | None) -> Mapping[str, Any]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        fix = "pip install 'demerge[data]', or give a local folder"
        raise UsageError(f"'hf:{name}' needs the package 'datasets'", fix=fix) from error
    try:
        splits: Mapping[str, Any] = load_dataset(name, config)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        fix = "check the name (hf:NAME:CONFIG if it has configurations), the network and HF_TOKEN"
        raise InputError(f"hf:{name}: cannot be loaded: {reason}", fix=fix) from error
    return splits


def _image_column(text: str, part: Any) -> str:
    for column, feature in part.features.items():
        if type(feature).__name__ == "Image":
            return str(column)
    what = f"{text}: no column of images among {', '.join(part.features)}"
    raise InputError(what, fix="choose an image data set")


def _column(parts: tuple[Any, ...], names: tuple[str, ...], kind: type) -> list[Any] | None:
    for name in names:
        if all(name in part.features for part in parts):
            values = [value for part in parts for value in part[name]]
            if all(isinstance(value, kind) for value in values):
                return values
    return None
