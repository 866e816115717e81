"""Captions of a folder of images.

    metadata.jsonl, metadata.csv   rows with file_name and text; file_name is relative to the file
    NAME.txt, NAME.caption         the caption of NAME.png, as trainers in kohya's style keep them

The first is the layout of the Hub's image folders. Names match in any Unicode form: `é` in one
character or two.
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

MAX_BYTES = 128 << 10
FIX_JSONL = 'write one line per image: {"file_name": "a.png", "text": "a red fox"}'
FIX_CSV = (
    "write UTF-8 with the header file_name,text and one row per image; "
    'a quote in a caption is "" in a quoted field'
)


@dataclass(frozen=True, slots=True)
class Captions:
    """Captions by image, and the number of those that name no image of the folder."""

    texts: dict[Path, str]
    unmatched: int


def read_captions(listing: Listing, images: Sequence[Path]) -> list[str] | None:
    """Return one caption per image, or None if the folder holds no captions."""
    captions = find_captions(listing)
    if captions is None:
        return None
    if missing := [listing.name(path) for path in images if path not in captions.texts]:
        count = f"{len(missing)} of {len(images)} images have no caption"
        fix = "add them to metadata.jsonl or metadata.csv or as NAME.txt, or remove the images"
        raise InputError(f"{listing.folder}: {count}: {', '.join(missing[:10])}", fix=fix)
    return [captions.texts[path] for path in images]


def find_captions(listing: Listing) -> Captions | None:
    """Return all captions of a folder; None if it holds no file of captions."""
    images: dict[str, list[Path]] = {}
    for image in listing.images:
        images.setdefault(_key(image.with_suffix("")), []).append(image)
    entries: dict[str, tuple[str, str]] = {}
    for text in listing.texts:
        for image in images.get(_key(text.with_suffix("")), ()):
            caption = _checked(_read_utf8(text, MAX_BYTES + 1), str(text)).strip()
            _add(entries, image, caption, str(text))
    for file in listing.metadata:
        for number, name, caption in _rows(file):
            where = f"{file}, line {number}"
            if Path(name).is_absolute() or ".." in Path(name).parts:
                what = f"{where}: '{name}' leads out of its folder"
                raise InputError(what, fix="name files relative to the metadata")
            _add(entries, file.parent / name, caption, where)
    if not entries and not listing.metadata:
        return None
    named = {image: _key(image) for image in listing.images}
    texts = {image: entries[key][0] for image, key in named.items() if key in entries}
    return Captions(texts, len(entries.keys() - named.values()))


def _add(entries: dict[str, tuple[str, str]], image: Path, caption: str, where: str) -> None:
    known, first = entries.setdefault(_key(image), (caption, where))
    if known != caption:
        what = f"{where}: another caption of {image.name} is in {first}"
        raise InputError(what, fix="keep one caption per image")


def _key(path: Path) -> str:
    return unicodedata.normalize("NFC", str(path))


def _read_utf8(file: Path, limit: int = -1) -> str:
    try:
        with file.open("rb") as stream:
            return stream.read(limit).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        fix = "save it as UTF-8"
        raise InputError(f"{file}: cannot be read as UTF-8: {error}", fix=fix) from error


def _rows(file: Path) -> Iterator[tuple[int, str, str]]:
    is_csv = file.suffix == ".csv"
    text = _read_utf8(file).replace("\r\n", "\n").replace("\r", "\n")
    for number, row in _csv(file, text) if is_csv else _jsonl(text):
        match row:
            case {"file_name": str(name), "text": str(caption)}:
                yield number, name, _checked(caption, f"{file}, line {number}")
            case _:
                fix = FIX_CSV if is_csv else FIX_JSONL
                raise InputError(f"{file}, line {number}: no file_name and text", fix=fix)


def _checked(caption: str, where: str) -> str:
    if len(caption.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        what = f"{where}: a caption of more than {MAX_BYTES >> 10} KiB"
        raise InputError(what, fix="shorten it")
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        what = f"{where}: half of a character in the caption {escape_text(caption[:40])}"
        raise InputError(what, fix="correct it") from error
    return caption


def escape_text(text: str) -> str:
    """Return text that UTF-8 can hold: half of a character becomes its code."""
    return text.encode("utf-8", "backslashreplace").decode()


def _csv(file: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Yield the line on which each row begins, and the row."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    begin = 1
    while True:
        try:
            begin = reader.line_num + 1 if reader.fieldnames else 1
            row = next(reader, None)
        except csv.Error as error:
            what = f"{file}, line {begin}: the row that begins here cannot be read: {error}"
            raise InputError(what, fix=FIX_CSV) from error
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
