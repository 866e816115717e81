"""Data sets of the Hugging Face Hub, `hf:NAME` or `hf:NAME:CONFIG`, through the `data` extra."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from demerge.data.arrays import Source
from demerge.data.decode import decoded
from demerge.data.layout import TEST, TRAIN, VALIDATION
from demerge.data.values import Pixels8, Shape
from demerge.errors import InputError, UsageError

TEXT_COLUMNS = ("text", "caption", "prompt")
LABEL_COLUMNS = ("label", "labels", "fine_label")
LOOK_AT = 64


@dataclass(frozen=True, slots=True)
class Rows:
    """Images of one column of a data set's splits, laid end to end and decoded one by one."""

    name: str
    parts: tuple[Any, ...]
    column: str

    @property
    def resident(self) -> bool:
        """False: reading decodes an image."""
        return False

    @property
    def shapes(self) -> frozenset[Shape]:
        """The shapes [C H W] of the first images; others may differ."""
        shown = [self.read(i).shape for i in range(min(LOOK_AT, len(self)))]
        return frozenset((c, h, w) for c, h, w in shown)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def read(self, index: int, least: tuple[int, int] | None = None) -> Pixels8:
        """Return image `index`, [C H W].

        Raises:
            InputError: where the row holds no readable image.
        """
        row = index
        for part in self.parts:
            if row < len(part):
                return decoded(part[row][self.column], f"{self.name}, image {index}", least)
            row -= len(part)
        raise IndexError(index)


def read_hub(text: str) -> Source:
    """Read `hf:NAME[:CONFIG]`: the splits `train` and `test` (or `validation`, `valid`, `val`), the first column of images.

    Raises:
        UsageError: where the extra is not installed.
        InputError: where the data set is not to be had or has no column of images.
    """
    name, _, config = text.removeprefix("hf:").partition(":")
    splits = _load(name, config or None)
    held = next((name for name in (TEST, *VALIDATION) if name in splits), None)
    names = [name for name in (TRAIN, held) if name and name in splits] or sorted(splits)[:1]
    parts = tuple(splits[n] for n in names)
    pixels = Rows(text, parts, _image_column(text, parts[0]))
    test = tuple(range(len(parts[0]), len(pixels))) if len(parts) == 2 else None
    keys = " ".join(str(getattr(part, "_fingerprint", len(part))) for part in parts)
    content = hashlib.sha256(f"{text} {keys}".encode()).hexdigest()
    captions, labels = _column(parts, TEXT_COLUMNS, str), _column(parts, LABEL_COLUMNS, int)
    return Source(text, pixels, content, test, captions, labels)


def _load(name: str, config: str | None) -> Mapping[str, Any]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UsageError(
            f"'hf:{name}' needs the package 'datasets'",
            fix="pip install 'demerge[data]', or give a local folder",
        ) from error
    try:
        splits: Mapping[str, Any] = load_dataset(name, config)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"hf:{name}: cannot be loaded: {reason}",
            fix="check the name (hf:NAME:CONFIG where it has configurations), the network and HF_TOKEN",
        ) from error
    return splits


def _image_column(text: str, part: Any) -> str:
    for column, feature in part.features.items():
        if type(feature).__name__ == "Image":
            return str(column)
    raise InputError(
        f"{text}: no column of images among {', '.join(part.features)}",
        fix="choose an image data set",
    )


def _column(parts: tuple[Any, ...], names: tuple[str, ...], kind: type) -> list[Any] | None:
    for name in names:
        if all(name in part.features for part in parts):
            values = [value for part in parts for value in part[name]]
            if all(isinstance(value, kind) for value in values):
                return values
    return None
