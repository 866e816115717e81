"""Splits and classes of a folder of images, from the names of its folders.

`train/`, and `test/` or `validation/` next to it, are splits. So are the other names in `SPLITS`, with a year behind them
(`val2017/`), and below the folders of classes. The other folder is the class: `train/cat/1.png` and `cat/train/1.png` are both
a training image of the class cat.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demerge.data.listing import escaped
from demerge.errors import InputError, listed

TRAIN, TEST, VALIDATION = "train", "test", "validation"
SPLITS = {  # the names that the library datasets knows
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), TEST),
    **dict.fromkeys(("validation", "valid", "val", "dev"), VALIDATION),
}
YEAR = re.compile(r"[-_ ]?(?:19|20)\d\d\Z")


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the splits of a folder are.

    Attributes:
        depth: the level of the folders that are splits, None if none are.
        test: positions of the held-out images: those of `test/`, or else of the validation folder. None if there are none.
        spare: positions of validation images next to a `test/`; they are in neither split.
    """

    depth: int | None = None
    test: tuple[int, ...] | None = None
    spare: tuple[int, ...] = ()


def layout(folder: Path, images: Sequence[Path]) -> Layout:
    """Tell which images of a folder are held out.

    Raises:
        InputError: if there are training and held-out images, and images outside of both.
    """
    for depth in (0, 1):
        splits = [_split(_at(folder, path, depth)) for path in images]
        if None not in splits:
            held = next((split for split in (TEST, VALIDATION) if split in splits), None)
            if held is None:
                return Layout(depth)
            test = tuple(i for i, split in enumerate(splits) if split == held)
            return Layout(
                depth,
                test,
                tuple(i for i, split in enumerate(splits) if split not in (TRAIN, held)),
            )
    tops = [_at(folder, path, 0) for path in images]
    found = {split: top for top in tops if (split := _split(top))}
    if TRAIN in found and len(found) > 1:
        outside = [
            escaped(p.relative_to(folder).as_posix())
            for p, top in zip(images, tops, strict=True)
            if not _split(top)
        ]
        held_out = " and ".join(f"{name}/" for name in sorted(found.values()))
        raise InputError(
            f"{folder}: {len(outside)} images lie outside of {held_out}: {listed(outside)}",
            fix=f"move them, or name one split: {folder}/{found[TRAIN]}",
        )
    return Layout()


def class_labels(
    folder: Path, images: Sequence[Path], every: Sequence[Path], depth: int | None
) -> list[int] | None:
    """Return the class of each image: its folder's place in alphabetical order, or the folder's name as a number.

    The folder is the first below the source that is not a split, at `depth`. Numbers count if every folder's name is one.
    None if an image lies in no such folder, or if there is only one.

    Args:
        every: images of all classes, readable or not, so that a broken file does not shift the others' classes.
    """

    def class_of(path: Path) -> str:
        folders = path.relative_to(folder).parts[:-1]
        return next((name for level, name in enumerate(folders) if level != depth), "")

    names = sorted({class_of(path) for path in every} - {""})
    labels = [class_of(path) for path in images]
    if len(names) < 2 or "" in labels:
        return None
    numbers = all(name.isascii() and name.isdigit() for name in names)
    of = {name: int(name) if numbers else i for i, name in enumerate(names)}
    return [of[name] for name in labels]


def _at(folder: Path, path: Path, depth: int) -> str:
    folders = path.relative_to(folder).parts[:-1]
    return folders[depth] if len(folders) > depth else ""


def _split(name: str) -> str | None:
    return SPLITS.get(YEAR.sub("", name.casefold()))
