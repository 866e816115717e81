"""Making a merge again to see that it is what its recipe says: the same inputs, and the same bytes.

The inputs are compared with the SHA-256 that the recipe names, then the merge is made again, without being kept, and its
SHA-256 compared with the recorded one and with the file that is there. The versions in the header are those of the recipe, so
that the bytes differ only where the numbers do; other versions are told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from demerge.errors import InputError, NumericalError, UsageError
from demerge.merging.output.denoiser import OutputDenoiser
from demerge.merging.output.writer import is_file, pieces
from demerge.merging.planning import prepare
from demerge.merging.recipe.recipe import DOCUMENT, Recipe, home_of
from demerge.progress import Progress, silent
from demerge.provenance import installed
from demerge.storage.atomic import place_for, sha256
from demerge.storage.checkpoint import Checkpoint

SHOWN = 5


@dataclass(frozen=True, slots=True)
class Verified:
    """A merge that was made again with the same bytes.

    Attributes:
        files: the SHA-256 of each file of weights.
        versions: packages of another version than the recipe's: {name: (recorded, now)}.
    """

    files: Mapping[str, str]
    versions: Mapping[str, tuple[str, str]]

    def lines(self) -> list[str]:
        """Return the finding for a person."""
        equal = [f"equal   {name}: SHA-256 {digest}" for name, digest in self.files.items()]
        return [
            *equal,
            *(
                f"version {name} {now} in place of {then}"
                for name, (then, now) in self.versions.items()
            ),
        ]


def verify(
    path: Path | str,
    recipe: Recipe,
    out: Path | str | None = None,
    *,
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress = silent,
) -> Verified:
    """Make the merge of a recipe again and compare.

    Args:
        path: what the recipe was read from: demerge.json, its folder, or a merged file.
        recipe: that recipe.
        out: the output to compare with; by default what lies beside the recipe, and what the recipe records.

    Raises:
        UsageError: where there is nothing to compare with.
        InputError: where an input is not the one that the recipe names, or `out` is missing.
        NumericalError: where the result is another one, saying what differs.
    """
    path = Path(path)
    out = None if out is None else place_for(out)
    if not recipe.base.files:
        raise UsageError(
            f"{path} names no SHA-256 of its inputs",
            fix="verify the demerge.json of a finished merge",
        )
    path, out = Path(path), None if out is None else Path(out)
    home, one = _place(out or path)
    plan = prepare(recipe, device=device, threads=threads, progress=progress)
    files = {part.path.as_posix(): one or home / part.path for part in plan.parts}
    if out is not None and not all(file.is_file() for file in files.values()):
        raise InputError(
            f"{out} has no {' and '.join(files)}", fix="name the output of this recipe"
        )
    if not recipe.output and not any(file.is_file() for file in files.values()):
        raise UsageError(
            f"there is no output beside {path}, and no SHA-256 of it in the recipe",
            fix="give -o OUT",
        )
    stored = replace(plan.recipe.stored(home), versions=recipe.versions)
    found = {part.path.as_posix(): part.digest(stored.metadata()) for part in plan.parts}
    versions = {
        name: (then, installed(name))
        for name, then in recipe.versions.items()
        if installed(name) != then
    }
    faults = [fault for part in plan.parts for fault in _faults(part, files, found, recipe)]
    if faults:
        told = [f"{name} {then} then, {now} now" for name, (then, now) in versions.items()]
        raise NumericalError(
            "the merge made again is another one: " + "; ".join([*faults, *told]),
            fix="use the recorded versions"
            if told
            else "the output or its recipe was changed after the merge; merge again",
        )
    return Verified(found, versions)


def _place(path: Path) -> tuple[Path, Path | None]:
    """Return the folder that an output's recipe is relative to, and the file of weights where the output is one file."""
    if is_file(path):
        home = home_of(path)
        return home, None if home != path.parent or (home / DOCUMENT).is_file() else path
    return (path if path.is_dir() else path.parent), None


def _faults(
    part: OutputDenoiser, files: Mapping[str, Path], found: Mapping[str, str], recipe: Recipe
) -> Iterator[str]:
    name = part.path.as_posix()
    recorded, there = recipe.output.get(name), files[name]
    if recorded is not None and recorded != found[name]:
        yield f"{name} was recorded with the SHA-256 {recorded[:16]}..., now it is {found[name][:16]}..."
    if there.is_file() and sha256(there) != found[name]:
        yield f"{there} {_difference(part, there)}"


def _difference(part: OutputDenoiser, there: Path) -> str:
    """Say what differs between a file of weights and the merge made again."""
    held = Checkpoint.open(there).stored()
    if part.lora or {e.name: e.shape for e in part.entries} != {
        n: tuple(t.shape) for n, t in held.items()
    }:
        return "holds other tensors or bytes"
    names = list(_unequal(part, held))
    if not names:
        return "has the same tensors under another header"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (
        f"differs in {len(names)} of {len(part.entries)} tensors: {', '.join(names[:SHOWN])}{more}"
    )


def _unequal(part: OutputDenoiser, held: Mapping[str, Tensor]) -> Iterator[str]:
    stream = pieces(part.job, part.entries, part.storage)
    for entry in part.entries:
        position, equal, there = 0, True, held[entry.name].reshape(-1)
        while position < entry.numel:
            stored = next(stream).stored
            span = there[position : position + stored.numel()]
            equal &= span.dtype == stored.dtype and bool((span == stored).all())
            position += stored.numel()
        if not equal:
            yield entry.name
