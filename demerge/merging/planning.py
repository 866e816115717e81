"""From a recipe to a plan: everything a merge needs is found, checked and hashed, and nothing is written."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, Unpack

import torch

from demerge.diffusion.schedule import snr_of
from demerge.errors import UsageError
from demerge.lora import NoBase, is_lora, open_expert
from demerge.merging.contract import Method
from demerge.merging.engine.job import Execution, MergeJob
from demerge.merging.engine.probe import check_equal_shares, find_copies
from demerge.merging.engine.validation import (
    Tensors,
    check_inputs,
    holds_deltas,
    resolve_weights,
)
from demerge.merging.inputs.compatibility import Rules, fitted, is_buffer, without_ema
from demerge.merging.inputs.components import component_tasks
from demerge.merging.inputs.denoisers import Task, denoisers, tasks
from demerge.merging.inputs.experts import (
    Base,
    Expert,
    check_same_base,
    check_unchanged,
    range_of,
    scheduler_config,
    source,
)
from demerge.merging.inputs.statistics import check_measured_on, input_paths
from demerge.merging.output.denoiser import Lora, OutputDenoiser
from demerge.merging.output.writer import layout
from demerge.merging.plan import MergeResult, Plan
from demerge.merging.recipe.fields import MergeFields
from demerge.merging.recipe.method_names import translated
from demerge.merging.recipe.recipe import Recipe
from demerge.merging.recipe.rules import Rule, matcher, only, settle
from demerge.merging.registry import find_method
from demerge.progress import Progress, silent
from demerge.provenance import versions
from demerge.storage.atomic import check_is_new, place_for
from demerge.storage.checkpoint import Checkpoint
from demerge.storage.hashing import Hashing
from demerge.storage.hub import resolve_model_path
from demerge.storage.layout import CheckpointLocation, locate
from demerge.timesteps import TimestepRange

MOST_THREADS = 4
VERSIONS = ("demerge", "numpy", "torch")
Number = TypeVar("Number")


def merge(
    base: Path | str,
    experts: Sequence[Path | str],
    out: Path | str,
    *,
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress = silent,
    **asked: Unpack[MergeFields],
) -> MergeResult:
    """Merge experts into a base, files or folders, and write the result to `out`.

    Args:
        base: pipeline folder, component folder, .safetensors file or shard index; the name of an embedded model or a Hub id.
        experts: the same, or LoRA files of the base.
        out: a new folder, or a new file that ends in `.safetensors`.
        device: where the arithmetic runs.
        threads: processes that share the work; the available cores, up to 4, by default. The result does not depend on it.
        progress: called with (done, total, what).
        asked: the method, its options and more, see `MergeFields`.

    Raises:
        UsageError: where method, options, weights or rules are wrong, or `out` exists.
        InputError: where a file is damaged, or the experts do not fit the base.
        ResourceError: where the disk does not suffice.
        NumericalError: where the result is not finite.
    """
    out = place_for(out)
    check_is_new(out)
    recipe = Recipe.of(base, experts, **asked)
    return prepare(recipe, device=device, threads=threads, progress=progress).run(out)


def prepare(
    recipe: Recipe,
    *,
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress = silent,
) -> Plan:
    """Check the merge that a recipe asks for, and hash its inputs; see `merge`.

    Raises:
        InputError: also where an input is not the one whose SHA-256 the recipe names.
    """
    recipe = _without_base(translated(recipe))
    method = find_method(recipe.method)
    ranges, sides, notes = _opened(recipe, method)
    hashing = Hashing(_files(sides))
    if recipe.base.files:  # then this comes first
        found = _resolved(recipe, ranges, sides, hashing.result())
        for asked, there in zip(
            (recipe.base, *recipe.experts), (found.base, *found.experts), strict=True
        ):
            check_unchanged(asked, there)
    execution = Execution(device, threads or _cores(), progress)
    parts = [_part(recipe, side, execution) for side in sides]
    _check_not_a_copy(recipe, sides, parts)
    parts[0] = replace(parts[0], notes=[*parts[0].notes, *notes])
    weights = (
        parts[0].job.weights
        if len(parts) == 1 and len(parts[0].experts) == len(recipe.experts)
        else recipe.weights
    )
    rules = [rule.parsed(method) for rule in recipe.rules]
    settled = replace(
        recipe, method=method.name, options=parts[0].job.options, weights=weights, rules=rules
    )
    return Plan(
        partial(_resolved, settled, ranges, sides), hashing, parts, recipe.boundary, recipe.variant
    )


def check_mergeable(
    base: Path | str, experts: Sequence[Path | str], **asked: Unpack[MergeFields]
) -> list[str]:
    """Make the checks of a merge that need no hash; return the notes that its plan has.

    Raises:
        DemergeError: as `prepare` does.
    """
    recipe = _without_base(translated(Recipe.of(base, experts, **asked)))
    _, sides, notes = _opened(recipe, find_method(recipe.method))
    parts = [_part(recipe, side, Execution()) for side in sides]
    return [*(note for part in parts for note in part.notes), *notes]


def _opened(
    recipe: Recipe, method: Method
) -> tuple[list[TimestepRange | None], list[_Side], list[str]]:
    """Return the ranges of the experts, the parts of the output with their inputs opened, and notes of what is not used."""
    weights = resolve_weights(recipe.weights, len(recipe.experts))
    if not method.has_weights and (
        any(w != weights[0] for w in weights) or any(rule.weights for rule in recipe.rules)
    ):
        raise UsageError(
            f"method {method.name} has no weights",
            fix="leave them out, and name the experts that count alone",
        )
    places = [
        locate(resolve_model_path(s.path, recipe.variant), recipe.variant)
        for s in (recipe.base, *recipe.experts)
    ]
    base, *experts = (denoisers(place, recipe.variant) for place in places)
    for asked, sides_of in zip(recipe.experts, experts, strict=True):
        if asked.range and len(sides_of) > 1:
            raise UsageError(
                f"{asked.path} has two denoisers, whose timesteps its boundary_ratio tells; the range {asked.range} is given",
                fix="leave the range out (none), or name the folder of one of the two",
            )
    ranges = [
        range_of(place, asked) for place, asked in zip(places[1:], recipe.experts, strict=True)
    ]
    beside, notes = _beside(recipe, places, ranges)
    sides = [
        _Side.of(task, recipe, method)
        for task in [*tasks(base, experts, ranges, recipe.boundary), *beside]
    ]
    if recipe.out_rank is not None and len(sides) > 1:
        fix = "give --components denoiser" if beside else "merge each side alone"
        raise UsageError(
            "an adapter is made for one denoiser, and the output has more parts", fix=fix
        )
    return ranges, sides, notes


def _beside(
    recipe: Recipe, places: Sequence[CheckpointLocation], ranges: Sequence[TimestepRange | None]
) -> tuple[list[Task], list[str]]:
    """Return what is merged next to the denoisers; with --only, which leaves the rest the base's, nothing."""
    if recipe.only and recipe.components is None:
        return [], []
    found, notes = component_tasks(places[0], places[1:], ranges, recipe.components, recipe.variant)
    if recipe.only and found:
        raise UsageError(
            "--only merges a part of the denoiser, --components other parts too",
            fix="leave one of them out",
        )
    return found, notes


@dataclass(frozen=True, slots=True)
class _Side:
    """One part of the output, its inputs opened: base, experts, and the tensors that the method needs with its options."""

    task: Task
    method: Method
    base: Base
    experts: Sequence[Expert]
    inputs: Mapping[str, Sequence[Checkpoint]]
    options: Mapping[str, Any]

    @classmethod
    def of(cls, task: Task, recipe: Recipe, method: Method) -> _Side:
        options, given = method.split_inputs(recipe.options)
        settled = method.resolve_options(options)
        method = method.specialize(
            settled, *(settled | rule.parsed(method).plain for rule in recipe.rules)
        )
        if method.inputs and not task.is_denoiser:
            what = f"method {method.name} needs {' and '.join(method.inputs)}, which {task.folder} does not have"
            raise UsageError(what, fix="give --components denoiser, or another method")
        asked = [recipe.experts[i] for i, _ in task.experts]
        paths = input_paths(method, given, asked, [denoiser for _, denoiser in task.experts])
        base: Base = Checkpoint(task.base.place)
        if is_lora(base):
            base = NoBase([Checkpoint(denoiser.place) for _, denoiser in task.experts])
        experts = [
            open_expert(d.place, base, skip_text=recipe.skip_text_encoder) for _, d in task.experts
        ]
        inputs = {
            name: [Checkpoint.open(path).named_like(base) for path in files]
            for name, files in paths.items()
        }
        return cls(task, method, base, experts, inputs, options)

    def has(self, rule: Rule) -> bool:
        """Whether a rule is for this side: all are for denoisers, and for another part those that match something."""
        return self.task.is_denoiser or any(map(matcher(rule.pattern), self.base))

    def picked(self, numbers: Sequence[Number] | None, K: int) -> tuple[Number, ...] | None:
        """Return, of one number for each named expert, those of this side's experts."""
        if numbers is None or len(numbers) != K:
            return None if numbers is None else tuple(numbers)
        return tuple(numbers[i] for i, _ in self.task.experts)


def _without_base(recipe: Recipe) -> Recipe:
    """Return a recipe with a LoRA in the base's place as one of LoRA files alone: it has no base.

    Raises:
        UsageError: if an expert is a model.
    """
    opened = [Checkpoint.open(recipe.base.path, recipe.variant)]
    if not is_lora(opened[0]):
        return recipe
    recipe = recipe.changed(no_base=True)
    opened += [Checkpoint.open(expert.path, recipe.variant) for expert in recipe.experts[1:]]
    model = next(
        (e.path for e, o in zip(recipe.experts[1:], opened[1:], strict=True) if not is_lora(o)),
        None,
    )
    if model is not None:
        what = f"{recipe.base.path} is a LoRA in the base's place, and {model} is a model"
        others = " ".join(e.path for e in recipe.experts if e.path != model)
        raise UsageError(
            what, fix=f"name the base first; if it is that model: demerge merge {model} {others}"
        )
    if len(opened) == 1 and not recipe.out_rank:
        what = f"{recipe.base.path} is a LoRA alone, and a merge of it is a copy"
        raise UsageError(
            what,
            fix="name its base before it, or more LoRA files, or give --out-rank for a smaller one",
        )
    return recipe if recipe.out_rank else replace(recipe, out_rank=NoBase(opened).rank)


def _part(recipe: Recipe, side: _Side, execution: Execution) -> OutputDenoiser:
    method = side.method
    asked = [recipe.experts[i] for i, _ in side.task.experts]
    names = [source.path for source in (recipe.base, *asked)]
    rules = Rules(recipe.missing, recipe.extra, recipe.only)
    base, notes = without_ema(side.base, names[0])
    if isinstance(base, NoBase):
        notes.append(
            f"no base: the deltas of {len(asked)} LoRA files are merged, into a LoRA of rank {recipe.out_rank}"
        )
    experts: list[Tensors] = []
    for expert, name in zip(side.experts, names[1:], strict=True):
        fit, more = fitted(base, expert, (names[0], name), rules)
        experts, notes = [*experts, fit], [*notes, *more]
    if side.task.is_denoiser:
        check_same_base(side.base, side.experts, recipe.no_base)
    check_inputs(method, base, side.inputs, len(asked))
    ranges = [denoiser.range for _, denoiser in side.task.experts]
    check_measured_on(side.base, side.experts, ranges, side.inputs, models=recipe.variant is None)
    floating = [name for name, spec in base.specs.items() if spec.is_float and not is_buffer(name)]
    chosen = only(recipe.only, floating) if recipe.only else set(floating)
    part = partial(
        OutputDenoiser,
        place=side.base.place,
        folder=side.task.folder,
        file=side.task.file,
        entries=layout(base, recipe.save_dtype),
        experts=[replace(source, range=span) for source, span in zip(asked, ranges, strict=True)],
        lora=_lora(recipe),
        notes=notes,
    )
    settled = method.resolve_options(side.options)
    if not asked:  # no expert changes this one of a pipeline's two denoisers
        job = MergeJob(
            method, base, [], [], settled, names=names, only=frozenset(), execution=execution
        )
        return part(job)
    K = len(recipe.experts)
    whole = recipe.weights if side.task.is_denoiser else resolve_weights(recipe.weights, K)
    weights = resolve_weights(side.picked(whole, K), len(asked))
    own = [
        replace(rule, weights=side.picked(rule.weights, K))
        for rule in recipe.rules
        if side.has(rule)
    ]
    settings, taken = settle(
        own, [name for name in floating if name in chosen], method, side.options, weights
    )
    job = MergeJob(
        method,
        base,
        experts,
        weights,
        settled,
        side.inputs,
        recipe.seed,
        names,
        settings=settings,
        only=chosen,
        ranges=ranges,
        snr=snr_of(scheduler_config(side.base.place)),
        execution=execution,
    )
    return part(job, taken=taken)


def _check_not_a_copy(
    recipe: Recipe, sides: Sequence[_Side], parts: Sequence[OutputDenoiser]
) -> None:
    """Refuse a merge that gives one of its inputs back, unless weights say that this is meant; and one that lacks a base.

    Raises:
        UsageError: with the commands that may have been meant.
    """
    if recipe.no_base:
        for side, part in zip(sides, parts, strict=True):
            if isinstance(side.base, NoBase):  # LoRA files alone, whose deltas depend on no base
                continue
            if any(map(holds_deltas, side.experts)):
                raise UsageError(
                    "a LoRA is not a model, and --no-base merges models alone",
                    fix="name the LoRA's base first",
                )
            check_equal_shares(part.job)
    stated = recipe.weights is not None or any(rule.weights is not None for rule in recipe.rules)
    if stated or recipe.base.files or recipe.only or recipe.out_rank is not None:
        return
    numbers = [[0, *(1 + i for i, _ in side.task.experts)] for side in sides]
    found = [
        {of[i] for i in find_copies(part.job, recipe.no_base)}
        for part, of in zip(parts, numbers, strict=True)
    ]
    copies = found[0].intersection(*found[1:])
    if not copies:
        return
    first, names = min(copies), [recipe.base.path, *(expert.path for expert in recipe.experts)]
    count = f"{len(recipe.experts)} expert{'s' if len(recipe.experts) > 1 else ''}"
    what = f"{recipe.method} of {count} and the base {names[0]} gives a copy of {names[first]}"
    models = " ".join(names)
    fix = f"experts of a base: demerge merge BASE {models}; the models alone: demerge merge {models} --no-base; "
    fix += "the copy itself: say so by --weights"
    raise UsageError(
        what, fix=fix if first else "choose other options, or give --weights if the copy is meant"
    )


def _lora(recipe: Recipe) -> Lora | None:
    dtype = torch.float32 if recipe.save_dtype == "keep" else getattr(torch, recipe.save_dtype)
    return None if recipe.out_rank is None else Lora(recipe.out_rank, dtype)


def _files(sides: Sequence[_Side]) -> list[Path]:
    given = [tensors for side in sides for found in side.inputs.values() for tensors in found]
    opened = [*(c for side in sides for c in (side.base, *side.experts)), *given]
    return [file for checkpoint in opened for file in checkpoint.place.files]


def _resolved(
    recipe: Recipe,
    ranges: Sequence[TimestepRange | None],
    sides: Sequence[_Side],
    hashes: Mapping[Path, str],
) -> Recipe:
    """Return the recipe with ranges, versions and the SHA-256 of every input."""
    experts = []
    for i, (asked, span) in enumerate(zip(recipe.experts, ranges, strict=True)):
        taken = [
            (side, j)
            for side in sides
            for j, (number, _) in enumerate(side.task.experts)
            if number == i
        ]
        inputs = {name: found[j] for side, j in taken for name, found in side.inputs.items()}
        experts.append(
            source(
                replace(asked, range=span), [side.experts[j] for side, j in taken], hashes, inputs
            )
        )
    base = source(recipe.base, [side.base for side in sides], hashes, {})
    return replace(recipe, base=base, experts=experts, versions=versions(*VERSIONS), output={})


def _cores() -> int:
    available = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return min(MOST_THREADS, available)
