"""Splits and classes of a folder of images, from the names of its folders.

`train/`, and `test/` or `validation/` next to it, are splits. So are the other names in `SPLITS`,
also with a year at the end (`val2017/`), and below the folders of classes. The other folder is the
class: `train/cat/1.png` and `cat/train/1.png` are both a training image of the class cat.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demerge.data.listing import escape_name
from demerge.errors import InputError, listed

TRAIN, TEST, VALIDATION = "train", "test", "validation"
SPLITS = {  # the names that the library datasets knows
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), TEST),
    **dict.fromkeys(("validation", "valid", "val", "dev"), VALIDATION),
}
YEAR = re.compile(r"[-_ ]?(?:19|20)\d\d\Z")


@dataclass(frozen=True, slots=True)
class Splits:
    """The splits of a folder; None if there are none.

    Attributes:
        depth: the level of the folders that are splits.
        test, spare: positions of held-out images, and of validation images next to a `test/`.
    """

    depth: int | None = None
    test: tuple[int, ...] | None = None
    spare: tuple[int, ...] = ()


def find_splits(folder: Path, images: Sequence[Path]) -> Splits:
    """Find the held-out images of a folder: those of `test/`, or else of the validation folder."""
    for depth in (0, 1):
        splits = [_split(_folder_at(folder, path, depth)) for path in images]
        if None in splits:
            continue
        held = next((split for split in (TEST, VALIDATION) if split in splits), None)
        if held is None:
            return Splits(depth)
        test = tuple(i for i, split in enumerate(splits) if split == held)
        spare = tuple(i for i, split in enumerate(splits) if split not in (TRAIN, held))
        return Splits(depth, test, spare)
    _check_no_images_outside(folder, images)
    return Splits()


def _check_no_images_outside(folder: Path, images: Sequence[Path]) -> None:
    tops = {path: _folder_at(folder, path, 0) for path in images}
    names = {split: top for top in tops.values() if (split := _split(top))}
    if TRAIN in names and len(names) > 1:
        outside = [path.relative_to(folder) for path, top in tops.items() if not _split(top)]
        held_out = " and ".join(f"{name}/" for name in sorted(names.values()))
        shown = listed([escape_name(path.as_posix()) for path in outside])
        what = f"{folder}: {len(outside)} images are outside {held_out}: {shown}"
        raise InputError(what, fix=f"move them, or name one split: {folder}/{names[TRAIN]}")


def class_labels(
    folder: Path, images: Sequence[Path], every: Sequence[Path], depth: int | None
) -> list[int] | None:
    """Return the class of each image: the place of its folder's name in alphabetical order.

    The folder is the first below the source that is not a split. If all names are numbers, the
    number is the class. None if an image is in no such folder, or if there is only one folder.

    Args:
        every: images of all classes, also broken ones, so that these do not shift the classes.
        depth: the level of the folders that are splits.
    """

    def class_of(path: Path) -> str:
        folders = path.relative_to(folder).parts[:-1]
        return next((name for level, name in enumerate(folders) if level != depth), "")

    names = sorted({class_of(path) for path in every} - {""})
    labels = [class_of(path) for path in images]
    if len(names) < 2 or "" in labels:
        return None
    if all(name.isascii() and name.isdigit() for name in names):
        return [int(name) for name in labels]
    number = {name: i for i, name in enumerate(names)}
    return [number[name] for name in labels]


def _folder_at(folder: Path, path: Path, depth: int) -> str:
    folders = path.relative_to(folder).parts[:-1]
    return folders[depth] if len(folders) > depth else ""


def _split(name: str) -> str | None:
    return SPLITS.get(YEAR.sub("", name.casefold()))
