"""From files to files: `prepare` checks everything a merge needs, `Plan.run` makes it.

A base that is a pipeline folder gives a pipeline folder in which only the denoiser is new; a component folder gives a
component folder; an output that ends in `.safetensors` is that one file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demerge.files import commit_dir, commit_file, commit_text, refuse_existing, refuse_small_disk
from demerge.merge.apply import Merge, Progress
from demerge.merge.checks import refuse_missing_inputs, refuse_unlike, settle_weights
from demerge.merge.output import (
    WEIGHTS_FILE,
    Entry,
    Tally,
    chunks,
    copy_files,
    is_file,
    kept_files,
    layout,
    write,
)
from demerge.merge.recipe import Recipe, card
from demerge.merge.registry import Method, find
from demerge.merge.sources import base_model, hash_files, input_paths, refuse_foreign, source
from demerge.places import Place
from demerge.weights import Checkpoint

FLOAT32 = 4
OVERHEAD = 1 << 20  # header, recipe, card


@dataclass(frozen=True, slots=True)
class MergeResult:
    """A finished merge: where it is, its recipe, and what survived the rounding."""

    path: Path
    recipe: Recipe
    tally: Tally


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked merge of which nothing is written yet."""

    job: Merge
    place: Place
    entries: Sequence[Entry]
    recipe: Recipe

    def run(self, out: Path) -> MergeResult:
        """Write the merge, whole or not at all.

        Raises:
            InputError: where `out` exists.
            ResourceError: where the disk does not suffice.
            NumericalError: where the result is not finite.
        """
        refuse_existing(out)
        kept = [] if is_file(out) else kept_files(self.place)
        refuse_small_disk(out, self.disk_bytes(out))
        tally = Tally()
        if is_file(out):
            self._put(out, tally)
        else:
            with commit_dir(out) as folder:
                copy_files(kept, folder)
                self._put(folder / self._component / WEIGHTS_FILE, tally)
                commit_text(folder / "demerge.json", self.recipe.canonical() + "\n")
                commit_text(folder / "README.md", card(self.recipe, base_model(self.place), tally.share))
        return MergeResult(out, self.recipe, tally)

    def survey(self) -> Tally:
        """Run the arithmetic without writing; return what survives the rounding."""
        tally = Tally()
        for done, entry in enumerate(self.entries):
            self.job.progress(done, len(self.entries), "survey")
            for _ in chunks(self.job, entry, tally):
                pass
        return tally

    @property
    def ram_bytes(self) -> int:
        """Anonymous memory of the tensors at the peak: base, deltas and their intermediate values for one chunk."""
        largest = max((entry.bytes // entry.dtype.itemsize for entry in self.entries), default=0)
        held = largest if self.job.method.whole else min(largest, self.job.chunk)
        return FLOAT32 * held * 4 * (len(self.job.experts) + 1)

    def disk_bytes(self, out: Path | None) -> int:
        """What the output takes on disk."""
        kept = kept_files(self.place) if out is not None and not is_file(out) else []
        return sum(entry.bytes for entry in self.entries) + sum(file.stat().st_size for file, _ in kept) + OVERHEAD

    @property
    def dtypes(self) -> dict[str, int]:
        """How many tensors of the output have which dtype."""
        return dict(Counter(str(entry.dtype).removeprefix("torch.") for entry in self.entries))

    @property
    def parameters(self) -> int:
        """The number of merged elements."""
        return sum(self.job.base[name].numel() for name in self.job.floating)

    def document(self, out: Path | None, tally: Tally) -> dict[str, Any]:
        """Return the plan and what survives the rounding, as JSON values."""
        return {
            "out": None if out is None else str(out),
            "recipe": self.recipe.document(),
            "tensors": len(self.entries),
            "tensors_by_dtype": self.dtypes,
            "parameters": self.parameters,
            "ram_bytes": self.ram_bytes,
            "disk_bytes": self.disk_bytes(out),
            "changed_entries": tally.changed,
            "surviving_entries": tally.survived,
            "surviving_share": tally.share,
        }

    def lines(self, out: Path | None, tally: Tally) -> list[str]:
        """Return the plan and what survives the rounding, for a person."""
        r = self.recipe
        options = "".join(f" {name}={value}" for name, value in r.options.items())
        experts = [
            f"expert  {expert.path}: {expert.range or 'no range recorded'}, weight {weight:g}"
            for expert, weight in zip(r.experts, r.weights, strict=True)
        ]
        return [
            f"base    {r.base.path}: {self.parameters:,} parameters",
            *experts,
            f"method  {r.method}{options}, seed {r.seed}",
            f"keys    {len(self.entries)}: {', '.join(f'{n} {dtype}' for dtype, n in self.dtypes.items())}",
            f"needs   {self.ram_bytes / 1e6:.0f} MB of memory, {self.disk_bytes(out) / 1e6:.1f} MB on disk",
            f"delta   {tally.changed:,} entries change, {tally.share:.1%} of them survive the rounding",
        ]

    @property
    def _component(self) -> Path:
        """Return the denoiser's folder inside the output; older pipelines keep it in their own."""
        place = self.place
        return place.component.relative_to(place.pipeline) if place.pipeline and place.component else Path()

    def _put(self, path: Path, tally: Tally) -> None:
        commit_file(path, lambda stream: write(stream, self.job, self.entries, self.recipe.metadata(), tally))


def merge(
    base: Path,
    experts: Sequence[Path],
    out: Path,
    *,
    method: str,
    weights: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    save_dtype: str = "keep",
    progress: Progress | None = None,
) -> MergeResult:
    """Merge experts into a base, files or folders, and write the result to `out`.

    Args:
        base: pipeline folder, component folder, .safetensors file or shard index.
        out: a new folder, or a new file that ends in `.safetensors`.
        method: a name of `methods()`, or `path.py:function`.
        weights: one per expert; 1/K each by default.
        options: the method's; for one that needs tensors NAME also {NAME: paths}, else they are looked for beside the
            experts.
        save_dtype: keep (the base's), float32, float16 or bfloat16.
        progress: called with (done, total, what).

    Raises:
        UsageError: where method, options or weights are wrong.
        InputError: where a file is damaged, the experts do not fit the base, or `out` exists.
        ResourceError: where the disk does not suffice.
        NumericalError: where the result is not finite.
    """
    refuse_existing(out)
    plan = prepare(
        base,
        experts,
        method=method,
        weights=weights,
        options=options,
        seed=seed,
        save_dtype=save_dtype,
        progress=progress,
    )
    return plan.run(out)


def prepare(
    base: Path,
    experts: Sequence[Path],
    *,
    method: str,
    weights: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    save_dtype: str = "keep",
    progress: Progress | None = None,
) -> Plan:
    """Check a merge and hash its inputs; the arguments and errors are those of `merge`."""
    chosen, given = find(method), dict(options or {})
    settled = settle_weights(weights, len(experts))
    origin, tuned = Checkpoint.open(base), [Checkpoint.open(path) for path in experts]
    names = [str(path) for path in (base, *experts)]
    refuse_unlike(origin, tuned, names)
    refuse_foreign(origin, tuned)
    inputs = {
        name: [Checkpoint.open(path) for path in paths]
        for name, paths in input_paths(chosen, given, [e.place for e in tuned]).items()
    }
    refuse_missing_inputs(chosen, origin, inputs, len(tuned))
    job = Merge(chosen, origin, tuned, settled, chosen.settle(given), inputs, seed, names, progress=progress or silent)
    recipe = _recipe(chosen, job, origin, tuned, inputs, save_dtype)
    return Plan(job, origin.place, layout(origin, save_dtype), recipe)


def _recipe(
    method: Method,
    job: Merge,
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    inputs: Mapping[str, Sequence[Checkpoint]],
    save_dtype: str,
) -> Recipe:
    hashes = hash_files([base, *experts, *(c for cs in inputs.values() for c in cs)])
    beside = [{name: checkpoints[i] for name, checkpoints in inputs.items()} for i in range(len(experts))]
    origin, *sources = (
        source(name, checkpoint, hashes, around)
        for name, checkpoint, around in zip(job.names, [base, *experts], [{}, *beside], strict=True)
    )
    return Recipe(method.name, job.options, job.weights, job.seed, save_dtype, origin, sources)


def silent(done: int, total: int, what: str) -> None:
    """Report nothing."""
