"""A checked merge, to be measured or run: files out.

A base that is a pipeline folder gives a pipeline folder in which only what is merged is new. A
component folder gives a component folder. An output that ends in `.safetensors` is that one file.
"""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from demerge.errors import UsageError
from demerge.merging.inputs.denoisers import make_pair_index, make_single_index
from demerge.merging.inputs.experts import name_base
from demerge.merging.output.denoiser import Metadata, OutputDenoiser, Written
from demerge.merging.output.lora import AdapterSummary
from demerge.merging.output.model_card import render_card
from demerge.merging.output.writer import Tally, is_file, list_kept_files
from demerge.merging.recipe.recipe import DOCUMENT, Recipe
from demerge.merging.report.diagnosis import DIAGNOSIS, Diagnosis, Sums, sum_chunk
from demerge.progress import Progress, silent
from demerge.stage import Cost
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
from demerge.storage.layout import SECOND
from demerge.storage.safetensors_header import read_json

OVERHEAD = 1 << 20  # header, recipe, card
SHOWN = 20
REPORT = "report"  # a folder that no program takes for a part of the pipeline
INDEX, CONFIG = Path("model_index.json"), "config.json"


@dataclass(frozen=True)
class Survey:
    """What of a merge survives the rounding to the stored dtype."""

    plan: Plan
    tally: Tally

    def lines(self) -> list[str]:
        """Return the counts for a person."""
        tally = self.tally
        share = f"{tally.share:.1%} of them survive the rounding"
        lines = [f"delta   {tally.changed:,} entries change, {share}"]
        return [*lines, f"stored  {tally.rounding}"] if tally.rounding else lines

    def document(self) -> dict[str, Any]:
        """Return the plan and the counts as JSON values."""
        return {
            **self.plan.document(),
            "changed_entries": self.tally.changed,
            "surviving_entries": self.tally.survived,
            "surviving_share": self.tally.share,
            "rounding": self.tally.rounding,
        }


@dataclass(frozen=True)
class MergeResult(Survey):
    """A finished merge: where it is, its recipe as stored there, and what survived the rounding.

    Attributes:
        adapters: what each LoRA holds of the merge, if some were written.
    """

    path: Path
    recipe: Recipe
    adapters: Sequence[AdapterSummary] = ()

    def __repr__(self) -> str:
        share = f"{self.tally.share:.1%} of the changes survive"
        return f"MergeResult({str(self.path)!r}, {self.recipe!r}, {share})"

    @property
    def adapter(self) -> AdapterSummary | None:
        """What the first LoRA holds of the merge, if one was written."""
        return self.adapters[0] if self.adapters else None

    @property
    def report(self) -> Path | None:
        """The folder of the report, if one was written."""
        return self.plan.report

    def lines(self) -> list[str]:
        """Return what was made, for a person."""
        lines = super().lines()
        for adapter in self.adapters:
            energy = f"{adapter.share:.1%} of the energy of the merged change"
            name = f"{adapter.path.name} " if len(self.adapters) > 1 else ""
            lines.append(f"adapter {name}holds {energy} at rank {adapter.rank}")
        if self.report is not None:
            lines.append(f"report  {self.report / 'index.html'}")
        return lines

    def document(self) -> dict[str, Any]:
        """Return the plan and what was made, as JSON values."""
        document = super().document()
        if self.adapter is not None:
            document["adapter"] = self.adapter.document()
        if len(self.adapters) > 1:
            document["adapters"] = [adapter.document() for adapter in self.adapters]
        if self.report is not None:
            document["report"] = str(self.report)
        return document


@dataclass(frozen=True)
class Plan:
    """A checked merge of which nothing is written yet.

    Attributes:
        draft: the recipe with all that is known before the inputs are hashed.
        resolve: returns the whole recipe, given the SHA-256 of the input files.
        hashing: these hashes, which are computed in the background.
        parts: the denoisers of the output, one or two, and what else is merged.
        out: the output, None for a merge that is only measured.
        report: the folder of the report, None for none.
    """

    draft: Recipe
    resolve: Callable[[Mapping[Path, str]], Recipe]
    hashing: Hashing
    parts: Sequence[OutputDenoiser]
    out: Path | None = None
    report: Path | None = None

    def __repr__(self) -> str:
        job = self.parts[0].job
        tensors = sum(len(part.entries) for part in self.parts)
        return f"Plan({job.method.name} of {len(job.experts)} experts, {tensors:,} tensors)"

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe with the hashes of its inputs."""
        return self.resolve(self.hashing.result())

    @property
    def notes(self) -> list[str]:
        """What of base and experts is dropped, or kept from the base."""
        return list(dict.fromkeys(note for part in self.parts for note in part.notes))

    def describe(self) -> list[str]:
        """Return the plan for a person."""
        recipe, document, cost = self.draft, self._counts(), self.cost()
        base = "models  no base" if recipe.no_base else f"base    {recipe.base.path}"
        lines = [f"{base}: {document['parameters']:,} parameters"]
        weights = ["an equal share"] * len(recipe.experts)
        if recipe.weights is not None:
            weights = [f"{weight:g}" for weight in recipe.weights]
        for expert, weight in zip(recipe.experts, weights, strict=True):
            span = expert.range or "no range recorded"
            lines.append(f"expert  {expert.path}: {span}, weight {weight}")
        options = "".join(f" {name}={value}" for name, value in recipe.options.items())
        lines.append(f"method  {recipe.method}{options}, seed {recipe.seed}")
        for rule in document["rules"][:SHOWN]:
            counts = f"{rule['tensors']} tensors, {rule['parameters']:,} parameters"
            lines.append(f"rule    {rule['rule']}: {counts}")
        if len(document["rules"]) > SHOWN:
            lines.append(f"rule    and {len(document['rules']) - SHOWN} more")
        if recipe.only:
            counts = f"{document['merged_tensors']} of {document['tensors']} tensors"
            lines.append(f"only    {', '.join(recipe.only)}: {counts}")
        lines += [f"note    {note}" for note in self.notes[:SHOWN]]
        dtypes = [f"{count} {dtype}" for dtype, count in document["tensors_by_dtype"].items()]
        memory, disk = (cost.memory or 0) / 1e6, (cost.disk or 0) / 1e6
        lines.append(f"keys    {document['tensors']}: {', '.join(dtypes)}")
        return [*lines, f"needs   {memory:.0f} MB of memory, {disk:.1f} MB on disk"]

    def cost(self) -> Cost:
        """Return what the merge will take."""
        to_folder = self.out is not None and not is_file(self.out)
        kept = self._list_kept() if to_folder else []
        entries = [entry for part in self.parts for entry in part.entries]
        size = sum(entry.bytes for entry in entries) + OVERHEAD
        return Cost(
            steps=len(entries),
            memory=max(part.ram_bytes for part in self.parts),
            disk=size + sum(file.stat().st_size for file, _ in kept),
        )

    def document(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        cost = self.cost()
        return {
            "out": None if self.out is None else str(self.out),
            "recipe": self.recipe.document(),
            **self._counts(),
            "notes": self.notes,
            "ram_bytes": cost.memory,
            "disk_bytes": cost.disk,
        }

    def _counts(self) -> dict[str, Any]:
        entries = [entry for part in self.parts for entry in part.entries]
        dtypes = Counter(str(entry.dtype).removeprefix("torch.") for entry in entries)
        rules = []
        for part in self.parts:
            for match in part.matches:
                count = part.count_parameters(match.names)
                row = {"rule": str(match.rule), "tensors": len(match.names), "parameters": count}
                rules.append(row)
        return {
            "tensors": len(entries),
            "merged_tensors": sum(len(part.job.floating) for part in self.parts),
            "tensors_by_dtype": dict(dtypes),
            "parameters": sum(part.count_parameters(part.job.floating) for part in self.parts),
            "rules": rules,
        }

    def measure(self, progress: Progress = silent) -> Survey:
        """Run the arithmetic without writing."""
        tallies = [part.with_progress(progress).measure() for part in self.parts]
        return Survey(self, sum(tallies, Tally()))

    def run(self, progress: Progress = silent) -> MergeResult:
        """Write the merge, whole or not at all. The output is put in its place after its report.

        Raises:
            UsageError: if no output is named, or output or report exist.
            ResourceError: if the disk is too small.
            NumericalError: if the result is not finite.
        """
        out, report = self.out, self.report
        if out is None:
            raise UsageError("no output is named", fix="give -o OUT, or --dry-run")
        check_is_new(out)
        if report is not None and not report.is_relative_to(out):
            check_is_new(report, replace=_is_unfinished(report, out))
        check_disk_space(out, self.cost().disk or 0)
        parts = [part.with_progress(progress) for part in self.parts]
        write = self._write_file if is_file(out) else self._write_folder
        recipe, written = write(out, parts)
        tally = sum((done.tally for done in written), Tally())
        adapters = [done.adapter for done in written if done.adapter]
        return MergeResult(self, tally, out, recipe, adapters)

    # -- writing -----------------------------------------------------------------------------------

    def _write_file(
        self, out: Path, parts: Sequence[OutputDenoiser]
    ) -> tuple[Recipe, list[Written]]:
        if len(parts) > 1:
            what = f"the output has {len(parts)} parts with weights, not one file"
            raise UsageError(what, fix="give -o the name of a folder")
        report, home = self.report, out.parent
        observe = None if report is None else sum_chunk

        def report_first(sums: Sequence[Sums]) -> None:
            if report is not None:
                self._write_report(report, self.recipe.relative_to(home), [sums], out.name)

        metadata = self._metadata(home)
        written = parts[0].commit(out, metadata, observe, hashed=False, before=report_first)
        return self.recipe.relative_to(home), [written]

    def _write_folder(
        self, out: Path, parts: Sequence[OutputDenoiser]
    ) -> tuple[Recipe, list[Written]]:
        first, metadata, draft, report = parts[0], self._metadata(out), self.draft, self.report
        kept = self._list_kept()
        observe = None if report is None else sum_chunk
        with commit_dir(out) as folder:
            for source, path in kept:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, folder / path)
            if draft.boundary is not None:
                commit_json(folder / INDEX, make_pair_index(first.place, draft.boundary))
            elif self._becomes_one:
                commit_json(folder / INDEX, make_single_index(first.place))
            written = [part.commit(folder / part.path, metadata, observe) for part in parts]
            pairs = zip(parts, written, strict=True)
            hashes = {part.path.as_posix(): done.sha256 for part, done in pairs}
            recipe = replace(self.recipe.relative_to(out), output=hashes)
            commit_text(folder / DOCUMENT, recipe.canonical() + "\n")
            tally = sum((done.tally for done in written), Tally())
            shares = [done.adapter.share for done in written if done.adapter]
            share = min(shares, default=tally.share)
            base = name_base(first.place)
            card = render_card(recipe, base, share, tally.rounding, self.notes)
            commit_text(folder / "README.md", card)
            if report is not None:
                sums, name = [done.sums for done in written], out.name
                if report.is_relative_to(out):
                    report, name = folder / report.relative_to(out), ""
                self._write_report(report, recipe, sums, name)
        return recipe, written

    def _list_kept(self) -> list[tuple[Path, Path]]:
        """Return what a folder output copies, as (file, path in the output)."""
        first, is_split = self.parts[0], len(self.parts) > 1
        if first.lora:
            return []
        merged = {part.folder for part in self.parts} if is_split else set()
        files = list_kept_files(first.place, self.draft.variant)
        kept = [(file, path) for file, path in files if path.parent not in merged]
        for part in self.parts if is_split else ():
            if part.place.component:
                kept.append((part.place.component / CONFIG, part.folder / CONFIG))
        if self._becomes_one:
            kept = [(file, path) for file, path in kept if path.parts[0] != SECOND]
        is_rewritten = self._becomes_one or self.draft.boundary is not None
        return [(file, path) for file, path in kept if path != INDEX or not is_rewritten]

    @property
    def _becomes_one(self) -> bool:
        """Whether a pipeline of two denoisers is written as one of one."""
        return self.draft.is_pair_alone and not self.parts[0].lora

    def _metadata(self, home: Path) -> Metadata:
        """Return the metadata of weights in `home`, with zeros for unknown hashes."""
        if self.hashing.known:
            return Metadata(self.recipe.relative_to(home).metadata())
        draft = self.resolve(defaultdict(lambda: "0" * 64)).relative_to(home)
        return Metadata(draft.metadata(), lambda: self.recipe.relative_to(home).metadata())

    def _write_report(
        self, folder: Path, recipe: Recipe, sums: Sequence[Sequence[Sums]], of: str
    ) -> None:
        """Write a report for each part, in folders of their own if there are several."""
        from demerge.merging.report.page import report_files

        files: dict[str, bytes] = {}
        for part, chunks in zip(self.parts, sums, strict=True):
            if not chunks:
                continue
            diagnosis = Diagnosis.of(chunks, [expert.name for expert in part.experts])
            own = replace(recipe, experts=part.experts, weights=part.job.weights)
            place = part.folder if len(self.parts) > 1 else Path()
            for name, data in report_files(diagnosis, own, of).items():
                files[(place / name).as_posix()] = data
        commit_files(folder, files.items(), replace=folder.exists())


def find_report_folder(out: Path | None, report: Path | str | bool | None) -> Path | None:
    """Return the folder of a report: a path; for True OUT/report, or NAME-report of a file."""
    if not report or out is None:
        return None
    if report is not True:
        return place_for(report)
    return out.with_name(f"{out.stem}-{REPORT}") if is_file(out) else out / REPORT


def _is_unfinished(folder: Path, out: Path) -> bool:
    """Whether a folder is the report of an output of this name that was never finished."""
    files = [path for path in folder.rglob(DIAGNOSIS) if path.is_file()] if folder.is_dir() else []
    if not files or out.exists():
        return False
    return all(read_json(path).get("of") == out.name for path in files)
