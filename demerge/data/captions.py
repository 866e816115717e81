"""Captions of a folder of images, from `metadata.jsonl` or `metadata.csv` with the columns `file_name` and `text`.

This is the layout of the Hub's image folders; `file_name` is relative to the folder that holds the metadata.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from demerge.errors import InputError

FIX_JSONL = 'write one line per image: {"file_name": "a.png", "text": "a red fox"}'
FIX_CSV = "write UTF-8 with the header file_name,text and one row per image"


def read_captions(folder: Path, images: Sequence[Path]) -> list[str] | None:
    """Return one caption per image, or None where the folder holds no captions.

    Raises:
        InputError: where a metadata file is damaged, or an image has no caption; it lists the first ten.
    """
    captions = find_captions(folder)
    if captions is None:
        return None
    missing = [path for path in images if path not in captions]
    if missing:
        names = ", ".join(path.relative_to(folder).as_posix() for path in missing[:10])
        raise InputError(
            f"{folder}: {len(missing)} of {len(images)} images have no caption: {names}",
            fix="add them to metadata.jsonl or metadata.csv, or remove the images",
        )
    return [captions[path] for path in images]


def find_captions(folder: Path) -> dict[Path, str] | None:
    """Return the captions of all metadata files in the folder and its subfolders by image, None without such a file.

    Raises:
        InputError: where a metadata file is damaged or names a file outside of its folder.
    """
    found = [*folder.rglob("metadata.jsonl"), *folder.rglob("metadata.csv")]
    files = sorted(file for file in found if not any(p.startswith(".") for p in file.relative_to(folder).parts))
    if not files:
        return None
    captions: dict[Path, str] = {}
    for file in files:
        for name, text in _rows(file):
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise InputError(f"{file}: '{name}' leads out of its folder", fix="name files relative to the metadata")
            captions[file.parent / name] = text
    return captions


def _rows(file: Path) -> Iterator[tuple[str, str]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as UTF-8: {error}", fix="save it as UTF-8") from error
    fix = FIX_CSV if file.suffix == ".csv" else FIX_JSONL
    for number, row in _csv(text) if file.suffix == ".csv" else _jsonl(text):
        match row:
            case {"file_name": str(name), "text": str(caption)}:
                yield name, caption
            case _:
                raise InputError(f"{file}, line {number}: no file_name and text", fix=fix)


def _csv(text: str) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    for row in reader:
        yield reader.line_num, row


def _jsonl(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None
