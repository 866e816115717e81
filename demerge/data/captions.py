"""Captions of a folder of images.

    metadata.jsonl, metadata.csv   rows with file_name and text; file_name is relative to the folder that holds the file
    NAME.txt, NAME.caption         the caption of NAME.png, as trainers in kohya's style keep them

The first is the layout of the Hub's image folders. Names match in any Unicode form: `é` in one character or two.
"""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demerge.data.listing import Listing
from demerge.errors import InputError

MOST_BYTES = 128 << 10
FIX_JSONL = 'write one line per image: {"file_name": "a.png", "text": "a red fox"}'
FIX_CSV = 'write UTF-8 with the header file_name,text and one row per image; a quote inside of a caption is "" in a quoted field'


@dataclass(frozen=True, slots=True)
class Captions:
    """The captions of a folder: text and the file that gave it, by the image's path in Unicode's composed form."""

    of: dict[str, tuple[str, str]]

    def get(self, image: Path) -> str | None:
        """Return the caption of an image, None without one."""
        found = self.of.get(_key(image))
        return None if found is None else found[0]

    def unmatched(self, images: Sequence[Path]) -> int:
        """Return how many captions name none of the images."""
        return len(self.of.keys() - {_key(image) for image in images})


def read_captions(listing: Listing, images: Sequence[Path]) -> list[str] | None:
    """Return one caption per image, or None if the folder holds no captions.

    Raises:
        InputError: if a file of captions is damaged, or an image has no caption; it lists the first ten.
    """
    captions = find_captions(listing)
    if captions is None:
        return None
    found = [captions.get(path) for path in images]
    missing = [listing.name(path) for path, text in zip(images, found, strict=True) if text is None]
    if missing:
        raise InputError(
            f"{listing.folder}: {len(missing)} of {len(images)} images have no caption: {', '.join(missing[:10])}",
            fix="add them to metadata.jsonl or metadata.csv or as NAME.txt, or remove the images",
        )
    return [text for text in found if text is not None]


def find_captions(listing: Listing) -> Captions | None:
    """Return all captions of a folder, None if it holds no file of captions.

    Raises:
        InputError: if a file is damaged, names an image outside of its folder, or an image has two different captions.
    """
    images: dict[str, list[Path]] = {}
    for image in listing.images:
        images.setdefault(_key(image.with_suffix("")), []).append(image)
    of: dict[str, tuple[str, str]] = {}
    for text in listing.texts:
        for image in images.get(_key(text.with_suffix("")), ()):
            _add(of, image, _sidecar(text), str(text))
    for file in listing.metadata:
        for number, name, caption in _rows(file):
            where = f"{file}, line {number}"
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise InputError(
                    f"{where}: '{name}' leads out of its folder",
                    fix="name files relative to the metadata",
                )
            _add(of, file.parent / name, caption, where)
    return Captions(of) if of or listing.metadata else None


def _add(of: dict[str, tuple[str, str]], image: Path, caption: str, where: str) -> None:
    known, first = of.setdefault(_key(image), (caption, where))
    if known != caption:
        raise InputError(
            f"{where}: another caption of {image.name} is in {first}",
            fix="keep one caption per image",
        )


def _key(path: Path) -> str:
    return unicodedata.normalize("NFC", str(path))


def _sidecar(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            raw = stream.read(MOST_BYTES + 1)
        return _checked(raw.decode("utf-8-sig"), str(file)).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{file}: cannot be read as UTF-8: {error}", fix="save it as UTF-8"
        ) from error


def _rows(file: Path) -> Iterator[tuple[int, str, str]]:
    """Yield the line, the file's name and the caption of each row."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{file}: cannot be read as UTF-8: {error}", fix="save it as UTF-8"
        ) from error
    fix = FIX_CSV if file.suffix == ".csv" else FIX_JSONL
    for number, row in _csv(file, text) if file.suffix == ".csv" else _jsonl(text):
        match row:
            case {"file_name": str(name), "text": str(caption)}:
                yield number, name, _checked(caption, f"{file}, line {number}")
            case _:
                raise InputError(f"{file}, line {number}: no file_name and text", fix=fix)


def _checked(caption: str, where: str) -> str:
    size = len(caption.encode("utf-8", "surrogatepass"))
    if size > MOST_BYTES:
        raise InputError(
            f"{where}: a caption of more than {MOST_BYTES >> 10} KiB", fix="shorten it"
        )
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: half of a character in the caption {escaped_text(caption[:40])}",
            fix="correct it",
        ) from error
    return caption


def escaped_text(text: str) -> str:
    """Return text that UTF-8 can hold: half a character becomes its code."""
    return text.encode("utf-8", "backslashreplace").decode()


def _csv(file: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Yield the line on which each row begins, and the row; a quote that is not closed ends at the limit or the file's end."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    begin = 1
    while True:
        try:
            begin = reader.line_num + 1 if reader.fieldnames else 1
            row = next(reader, None)
        except csv.Error as error:
            raise InputError(
                f"{file}, line {begin}: the row that begins here cannot be read: {error}",
                fix=FIX_CSV,
            ) from error
        if row is None:
            return
        yield begin, row


def _jsonl(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None
