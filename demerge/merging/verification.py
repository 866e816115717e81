"""Repeating a merge to see that it is what its recipe says: the same inputs, and the same bytes.

The inputs are compared with the SHA-256 that the recipe names. Then the merge is run again, without
being kept, and its SHA-256 is compared with the recorded one and with the present file. The header
has the versions of the recipe, so that the bytes differ only if the numbers do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from demerge.errors import InputError, NumericalError, UsageError, listed
from demerge.merging.output.denoiser import OutputDenoiser
from demerge.merging.output.writer import is_file, pieces
from demerge.merging.planning import plan as plan_merge
from demerge.merging.recipe.recipe import DOCUMENT, Recipe, find_home
from demerge.progress import Progress, silent
from demerge.provenance import installed
from demerge.storage.atomic import place_for, sha256
from demerge.storage.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Verified:
    """A merge that was repeated with the same bytes.

    Attributes:
        files: the SHA-256 of each file of weights.
        versions: packages of another version than the recipe's: {name: (recorded, now)}.
    """

    files: Mapping[str, str]
    versions: Mapping[str, tuple[str, str]]

    def lines(self) -> list[str]:
        """Return the finding for a person."""
        lines = [f"equal   {name}: SHA-256 {digest}" for name, digest in self.files.items()]
        for name, (then, now) in self.versions.items():
            lines.append(f"version {name} {now}, recorded {then}")
        return lines

    def document(self) -> dict[str, Any]:
        """Return the finding as JSON values."""
        return {"equal": True, "files": self.files, "versions": self.versions}


def verify(
    path: str | Path,
    recipe: Recipe | None = None,
    out: str | Path | None = None,
    *,
    device: str = "cpu",
    num_workers: int | None = None,
    progress: Progress = silent,
) -> Verified:
    """Repeat the merge of a recipe and compare.

    Args:
        path: demerge.json, its folder, or a merged file.
        recipe: that of `path`, if it was read already.
        out: the output to compare with; by default what lies next to the recipe.

    Raises:
        UsageError: if there is nothing to compare with.
        InputError: if an input is not the one that the recipe names, or `out` is missing.
        NumericalError: if the result differs, naming how.
    """
    path = Path(path)
    recipe = recipe or Recipe.read(path)
    out = None if out is None else place_for(out)
    if not recipe.base.files:
        what = f"{path} names no SHA-256 of its inputs"
        raise UsageError(what, fix="verify the demerge.json of a finished merge")
    home, file = _find_output(out or path)
    plan = plan_merge(recipe, device=device, num_workers=num_workers)
    parts = [part.with_progress(progress) for part in plan.parts]
    files = {part.path.as_posix(): file or home / part.path for part in parts}
    if out is not None and not all(file.is_file() for file in files.values()):
        what = f"{out} has no {' and '.join(files)}"
        raise InputError(what, fix="name the output of this recipe")
    if not recipe.output and not any(file.is_file() for file in files.values()):
        what = f"no output lies next to {path}, and the recipe holds no SHA-256 of it"
        raise UsageError(what, fix="give -o OUT")
    metadata = replace(plan.recipe.relative_to(home), versions=recipe.versions).metadata()
    digests = {part.path.as_posix(): part.digest(metadata) for part in parts}
    versions = {name: (then, installed(name)) for name, then in recipe.versions.items()}
    versions = {name: (then, now) for name, (then, now) in versions.items() if then != now}
    faults = [fault for part in parts for fault in _find_faults(part, files, digests, recipe)]
    if faults:
        faults += [f"{name} was {then}, is {now}" for name, (then, now) in versions.items()]
        what = f"verification failed: running the merge again gave other bytes: {'; '.join(faults)}"
        fix = "output or recipe were changed after the merge; merge again"
        raise NumericalError(what, fix="use the recorded versions" if versions else fix)
    return Verified(digests, versions)


def _find_output(path: Path) -> tuple[Path, Path | None]:
    """Return the folder that the recipe is relative to, and the file of weights if alone."""
    if not is_file(path):
        return (path if path.is_dir() else path.parent), None
    home = find_home(path)
    is_alone = home == path.parent and not (home / DOCUMENT).is_file()
    return home, path if is_alone else None


def _find_faults(
    part: OutputDenoiser, files: Mapping[str, Path], digests: Mapping[str, str], recipe: Recipe
) -> Iterator[str]:
    name = part.path.as_posix()
    recorded, file, digest = recipe.output.get(name), files[name], digests[name]
    if recorded is not None and recorded != digest:
        yield f"{name} was recorded with the SHA-256 {recorded[:16]}..., now it is {digest[:16]}..."
    if file.is_file() and sha256(file) != digest:
        yield f"{file} {_describe_difference(part, file)}"


def _describe_difference(part: OutputDenoiser, file: Path) -> str:
    """Say what differs between a file of weights and the repeated merge."""
    tensors = Checkpoint.open(file).stored()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if part.lora or shapes != {entry.name: entry.shape for entry in part.entries}:
        return "holds other tensors or bytes"
    names = list(_find_unequal(part, tensors))
    if not names:
        return "has the same tensors under another header"
    return f"differs in {len(names)} of {len(part.entries)} tensors: {listed(names)}"


def _find_unequal(part: OutputDenoiser, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    stream = pieces(part.job, part.entries, part.storage)
    for entry in part.entries:
        position, is_equal, flat = 0, True, tensors[entry.name].reshape(-1)
        while position < entry.numel:
            stored = next(stream).stored
            span = flat[position : position + stored.numel()]
            is_equal &= span.dtype == stored.dtype and bool((span == stored).all())
            position += stored.numel()
        if not is_equal:
            yield entry.name
