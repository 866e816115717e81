"""A checked merge, to be surveyed or run: files out.

A base that is a pipeline folder gives a pipeline folder in which only what is merged is new; a component folder gives a
component folder; an output that ends in `.safetensors` is that one file.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demerge.errors import UsageError
from demerge.merging.inputs.denoisers import index_of_two
from demerge.merging.inputs.experts import base_model
from demerge.merging.output.denoiser import Metadata, OutputDenoiser, Written
from demerge.merging.output.lora import AdapterSummary
from demerge.merging.output.model_card import card
from demerge.merging.output.writer import (
    Entry,
    Tally,
    check_not_pickled,
    copy_files,
    is_file,
    kept_files,
)
from demerge.merging.recipe.recipe import DOCUMENT, Recipe
from demerge.storage.atomic import (
    check_disk_space,
    check_is_new,
    commit_dir,
    commit_files,
    commit_json,
    commit_text,
    place_for,
)
from demerge.storage.hashing import Hashing
from demerge.storage.safetensors_header import read_json

if TYPE_CHECKING:
    from demerge.merging.report.diagnosis import Sums

OVERHEAD = 1 << 20  # header, recipe, card
SHOWN = 20
REPORT = (
    "report"  # a folder inside an output folder, which no program takes for a part of the pipeline
)
INDEX, CONFIG = Path("model_index.json"), "config.json"


@dataclass(frozen=True, slots=True)
class MergeResult:
    """A finished merge: where it is, its recipe as it is stored there, and what survived the rounding.

    Attributes:
        adapter: what an adapter holds of the merge, where one was written.
        report: the folder of the report, where one was written.
    """

    path: Path
    recipe: Recipe
    tally: Tally
    adapter: AdapterSummary | None = None
    report: Path | None = None

    def __repr__(self) -> str:
        """Say where it is, of what, and what survived."""
        return f"MergeResult({str(self.path)!r}, {self.recipe!r}, {self.tally.share:.1%} of the changes survive)"


@dataclass(frozen=True)
class Plan:
    """A checked merge of which nothing is written yet.

    Attributes:
        resolve: returns the recipe with all that is known of the inputs, given the SHA-256 of their files; paths are as
            they were given.
        hashing: these hashes, which are computed while the merge goes on.
        parts: the denoisers of the output, one or two, and what else is merged.
        boundary: where the two share the timesteps, if the output is to have two.
        variant: of the base's weights, which is what is copied.
    """

    resolve: Callable[[Mapping[Path, str]], Recipe]
    hashing: Hashing
    parts: Sequence[OutputDenoiser]
    boundary: float | None = None
    variant: str | None = None

    def __repr__(self) -> str:
        """Say what is merged; the inputs may not be hashed yet."""
        job = self.parts[0].job
        tensors = sum(len(part.entries) for part in self.parts)
        return f"Plan({job.method.name} of {len(job.experts)} experts, {tensors:,} tensors)"

    @cached_property
    def recipe(self) -> Recipe:
        """What was asked for, with all that is known of the inputs."""
        return self.resolve(self.hashing.result())

    def run(self, out: Path | str, report: Path | str | bool | None = None) -> MergeResult:
        """Write the merge, whole or not at all.

        Args:
            report: write tables and plots of what it did, too: into this new folder, or for True into OUT/report, for an output
                of one file into NAME-report next to it. The output is put in its place last: where it is, its report is.

        Raises:
            UsageError: where `out` has the name of a pickle, or `out` or `report` exists.
            ResourceError: where the disk does not suffice.
            NumericalError: where the result is not finite.
        """
        out = place_for(out)
        place = report_place(out, report)
        check_is_new(out)
        if place is not None and not place.is_relative_to(out):
            check_is_new(place, replace=_left_by_a_kill(place, out))
        check_not_pickled(out)
        check_disk_space(out, self.disk_bytes(out))
        if is_file(out):
            first = None if place is None else partial(self._report_of_file, place, out)
            metadata = self._metadata(out.parent)
            written = [
                self._only_part.commit(
                    out, metadata, diagnosed=place is not None, hashed=False, first=first
                )
            ]
            recipe = self.recipe.stored(out.parent)
        else:
            recipe, written = self._folder(out, place)
        return MergeResult(
            out, recipe, _sum([done.tally for done in written]), written[0].adapter, place
        )

    def survey(self) -> Tally:
        """Run the arithmetic without writing; return what survives the rounding."""
        return _sum([part.survey() for part in self.parts])

    # -- what it is ----------------------------------------------------------------------------------------------------

    @property
    def entries(self) -> list[Entry]:
        """The tensors of the output."""
        return [entry for part in self.parts for entry in part.entries]

    @property
    def ram_bytes(self) -> int:
        """Anonymous memory of the tensors at the peak."""
        return max(part.ram_bytes for part in self.parts)

    @property
    def parameters(self) -> int:
        """The number of merged elements."""
        return sum(part.parameters(part.job.floating) for part in self.parts)

    @property
    def dtypes(self) -> dict[str, int]:
        """How many tensors of the output have which dtype."""
        return dict(Counter(str(entry.dtype).removeprefix("torch.") for entry in self.entries))

    @property
    def rules(self) -> list[dict[str, Any]]:
        """What each rule took, as JSON values."""
        return [
            {
                "rule": str(taken.rule),
                "tensors": len(taken.names),
                "parameters": part.parameters(taken.names),
            }
            for part in self.parts
            for taken in part.taken
        ]

    @property
    def notes(self) -> list[str]:
        """What of base and experts is left out, or kept from the base."""
        return list(dict.fromkeys(note for part in self.parts for note in part.notes))

    def disk_bytes(self, out: Path | None) -> int:
        """What the output takes on disk."""
        kept = self._kept() if out is not None and not is_file(out) else []
        return (
            sum(entry.bytes for entry in self.entries)
            + sum(file.stat().st_size for file, _ in kept)
            + OVERHEAD
        )

    def document(self, out: Path | None, tally: Tally) -> dict[str, Any]:
        """Return the plan and what survives the rounding, as JSON values."""
        return {
            "out": None if out is None else str(out),
            "recipe": self.recipe.document(),
            "tensors": len(self.entries),
            "merged_tensors": sum(len(part.job.floating) for part in self.parts),
            "tensors_by_dtype": self.dtypes,
            "parameters": self.parameters,
            "rules": self.rules,
            "notes": self.notes,
            "ram_bytes": self.ram_bytes,
            "disk_bytes": self.disk_bytes(out),
            "changed_entries": tally.changed,
            "surviving_entries": tally.survived,
            "surviving_share": tally.share,
            "rounding": tally.rounding,
        }

    def lines(self, out: Path | None, tally: Tally) -> list[str]:
        """Return the plan and what survives the rounding, for a person."""
        r = self.recipe
        options = "".join(f" {name}={value}" for name, value in r.options.items())
        weights = (
            [f"{weight:g}" for weight in r.weights]
            if r.weights is not None
            else ["an equal share"] * len(r.experts)
        )
        experts = [
            f"expert  {expert.path}: {expert.range or 'no range recorded'}, weight {weight}"
            for expert, weight in zip(r.experts, weights, strict=True)
        ]
        rules = [
            f"rule    {t['rule']}: {t['tensors']} tensors, {t['parameters']:,} parameters"
            for t in self.rules
        ]
        more = [f"rule    and {len(rules) - SHOWN} more"] if len(rules) > SHOWN else []
        merged = sum(len(part.job.floating) for part in self.parts)
        only = (
            [f"only    {', '.join(r.only)}: {merged} of {len(self.entries)} tensors"]
            if r.only
            else []
        )
        return [
            f"{'models  no base' if r.no_base else f'base    {r.base.path}'}: {self.parameters:,} parameters",
            *experts,
            f"method  {r.method}{options}, seed {r.seed}",
            *rules[:SHOWN],
            *more,
            *only,
            *(f"note    {note}" for note in self.notes[:SHOWN]),
            f"keys    {len(self.entries)}: {', '.join(f'{n} {dtype}' for dtype, n in self.dtypes.items())}",
            f"needs   {self.ram_bytes / 1e6:.0f} MB of memory, {self.disk_bytes(out) / 1e6:.1f} MB on disk",
            f"delta   {tally.changed:,} entries change, {tally.share:.1%} of them survive the rounding",
            *([f"stored  {tally.rounding}"] if tally.rounding else []),
        ]

    # -- writing -------------------------------------------------------------------------------------------------------

    @property
    def _only_part(self) -> OutputDenoiser:
        if len(self.parts) > 1:
            raise UsageError(
                f"the output has {len(self.parts)} parts with weights, not one file",
                fix="give -o the name of a folder",
            )
        return self.parts[0]

    def _kept(self) -> list[tuple[Path, Path]]:
        """Return what a folder output copies, as (file, path in the output): nothing that is another part's or made anew."""
        first, several = self.parts[0], len(self.parts) > 1
        if first.lora:
            return []
        made = {part.folder for part in self.parts} if several else set()
        kept = [
            (file, path)
            for file, path in kept_files(first.place, self.variant)
            if path.parent not in made
        ]
        if several:
            kept += [
                (folder / CONFIG, part.folder / CONFIG)
                for part in self.parts
                if (folder := part.place.component)
            ]
        return [(file, path) for file, path in kept if path != INDEX or self.boundary is None]

    def _metadata(self, home: Path) -> Metadata:
        """Return the metadata of weights in `home`, with zeros for the hashes that are still being computed."""
        if self.hashing.known:
            return Metadata(self.recipe.stored(home).metadata())
        draft = self.resolve(defaultdict(lambda: "0" * 64))
        return Metadata(draft.stored(home).metadata(), lambda: self.recipe.stored(home).metadata())

    def _folder(self, out: Path, report: Path | None) -> tuple[Recipe, list[Written]]:
        first, kept, metadata = self.parts[0], self._kept(), self._metadata(out)
        with commit_dir(out) as folder:
            copy_files(kept, folder)
            if self.boundary is not None:
                commit_json(folder / INDEX, index_of_two(first.place, self.boundary))
            written = [
                part.commit(folder / part.path, metadata, diagnosed=report is not None)
                for part in self.parts
            ]
            recipe = self.recipe.stored(out)
            hashes = {
                part.path.as_posix(): done.sha256
                for part, done in zip(self.parts, written, strict=True)
            }
            recipe = replace(recipe, output=hashes)
            commit_text(folder / DOCUMENT, recipe.canonical() + "\n")
            tally = _sum([done.tally for done in written])
            share = written[0].adapter.share if written[0].adapter else tally.share
            commit_text(
                folder / "README.md",
                card(recipe, base_model(first.place), share, tally.rounding, self.notes),
            )
            if report is not None:
                inside = report.is_relative_to(out)
                where, of = (folder / report.relative_to(out), "") if inside else (report, out.name)
                self._report(where, recipe, [done.seen for done in written], of)
        return recipe, written

    def _report_of_file(self, place: Path, out: Path, seen: Sequence[Sums]) -> None:
        self._report(place, self.recipe.stored(out.parent), [seen], out.name)

    def _report(self, place: Path, recipe: Recipe, seen: Sequence[Sequence[Sums]], of: str) -> None:
        """Write a report for each denoiser, in folders of their own where there are several."""
        from demerge.merging.report.diagnosis import Diagnosis
        from demerge.merging.report.page import report_files

        files: dict[str, bytes] = {}
        for part, chunks in zip(self.parts, seen, strict=True):
            if not chunks:
                continue
            diagnosis = Diagnosis.of(chunks, [expert.name for expert in part.experts])
            made = report_files(
                diagnosis, replace(recipe, experts=part.experts, weights=part.job.weights), of
            )
            files |= {
                (part.folder / name).as_posix() if len(self.parts) > 1 else name: data
                for name, data in made.items()
            }
        commit_files(place, files.items(), replace=place.exists())


def report_place(out: Path, report: Path | str | bool | None) -> Path | None:
    """Return the folder of the report that is asked for, None for none; see `Plan.run`."""
    if report is None or report is False:
        return None
    if report is not True:
        return place_for(report)
    return out.with_name(f"{out.stem}-{REPORT}") if is_file(out) else out / REPORT


def _left_by_a_kill(place: Path, out: Path) -> bool:
    """Whether a folder is the report of an output of this name that never came into its place."""
    found = (
        [path for path in place.rglob("diagnosis.json") if path.is_file()] if place.is_dir() else []
    )
    return (
        bool(found)
        and not out.exists()
        and all(read_json(path).get("of") == out.name for path in found)
    )


def _sum(tallies: Sequence[Tally]) -> Tally:
    total = Tally()
    for tally in tallies:
        total.add(tally)
    return total
