"""From a recipe to a plan: all inputs are found, checked and hashed; nothing is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from demerge.device import count_cores
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
from demerge.merging.inputs.compatibility import drop_ema, fit_expert, is_buffer
from demerge.merging.inputs.components import find_component_tasks
from demerge.merging.inputs.denoisers import Task, assign_experts, find_denoisers
from demerge.merging.inputs.experts import (
    BaseWeights,
    ExpertWeights,
    check_same_base,
    find_scheduler_config,
    record_source,
    resolve_range,
)
from demerge.merging.inputs.statistic_files import check_measured_on, find_inputs
from demerge.merging.output.denoiser import Lora, OutputDenoiser
from demerge.merging.output.lora import Naming
from demerge.merging.output.writer import check_not_pickle, list_entries, note_float8
from demerge.merging.recipe.foreign_names import translate
from demerge.merging.recipe.recipe import Ranges, Recipe
from demerge.merging.recipe.rules import compile_pattern, resolve_rules, select
from demerge.merging.registry import find_method
from demerge.merging.stage import MergeResult, Plan, find_report_folder
from demerge.progress import Progress, silent
from demerge.provenance import versions
from demerge.storage.atomic import check_is_new, place_for
from demerge.storage.checkpoint import Checkpoint
from demerge.storage.hashing import Hashing
from demerge.storage.hub import resolve_model_path
from demerge.storage.layout import locate
from demerge.timesteps import TimestepRange

MOST_WORKERS = 4
VERSIONS = ("demerge", "numpy", "torch")
Number = TypeVar("Number")


def merge(
    base: str | Path,
    experts: Sequence[str | Path],
    out: str | Path,
    *,
    ranges: Ranges | None = None,
    device: str = "cpu",
    num_workers: int | None = None,
    progress: Progress = silent,
    **options: Any,
) -> MergeResult:
    """Merge experts into a base, files or folders, and write the result to `out`.

    Args:
        base: pipeline folder, component folder, .safetensors file, shard index, or Hub id.
        experts: the same, or LoRA files of the base.
        out: a new folder, or a new file that ends in `.safetensors`.
        ranges: the timesteps of each expert, if its record does not name them.
        num_workers: processes that share the work; the cores, up to 4, by default. The result does
            not depend on it.
        options: of `MergeOptions`, for example `method="ties", options={"density": 0.2}`.

    Raises:
        UsageError: if an option is wrong, or `out` exists.
        InputError: if a file is damaged, or the experts do not fit the base.
        ResourceError: if the disk is too small.
        NumericalError: if the result is not finite.
    """
    recipe = Recipe.of(base, experts, ranges=ranges, **options)
    return plan(recipe, out, device=device, num_workers=num_workers).run(progress)


def plan(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    report: str | Path | bool | None = None,
    device: str = "cpu",
    num_workers: int | None = None,
) -> Plan:
    """Check a merge, and begin to hash its inputs; see `merge`.

    Args:
        out: None for a merge that is only measured.
        report: the new folder of a report; True for OUT/report, or NAME-report next to a file.

    Raises:
        InputError: also if an input has another SHA-256 than the recipe names.
    """
    if out is not None:
        out = place_for(out)
        check_is_new(out)
        check_not_pickle(out)
    recipe = _without_base(translate(recipe))
    method = find_method(recipe.method)
    models = _Models.open(recipe, method)
    hashing = Hashing([file for side in models.sides for file in side.files()])
    if recipe.base.files:
        now = models.record(recipe, hashing.result())
        recipe.base.check_unchanged(now.base)
        for source, found in zip(recipe.experts, now.experts, strict=True):
            source.check_unchanged(found)
    execution = Execution(device, num_workers or min(MOST_WORKERS, count_cores()))
    parts = [_plan_part(recipe, side, execution) for side in models.sides]
    _check_not_a_copy(recipe, models.sides, parts)
    parts[0] = replace(parts[0], notes=[*parts[0].notes, *models.notes])
    is_whole = len(parts) == 1 and len(parts[0].experts) == len(recipe.experts)
    pairs = zip(recipe.experts, models.ranges, strict=True)
    weights = None if recipe.weights is None else [float(weight) for weight in recipe.weights]
    draft = replace(
        recipe,
        experts=[replace(expert, range=span) for expert, span in pairs],
        method=method.name,
        options=parts[0].job.options,
        weights=parts[0].job.weights if is_whole else weights,
        rules=[rule.parse_options(method) for rule in recipe.rules],
    )
    folder = find_report_folder(out, report)
    return Plan(draft, partial(models.record, draft), hashing, parts, out, folder)


def check_mergeable(base: str | Path, experts: Sequence[str | Path], **options: Any) -> list[str]:
    """Make the checks of a merge that need no hash; return the notes that its plan has.

    Raises:
        DemergeError: as `plan` does.
    """
    recipe = _without_base(translate(Recipe.of(base, experts, **options)))
    models = _Models.open(recipe, find_method(recipe.method))
    parts = [_plan_part(recipe, side, Execution()) for side in models.sides]
    return [*(note for part in parts for note in part.notes), *models.notes]


@dataclass(frozen=True, slots=True)
class _Side:
    """One part of the output with its inputs: base, experts, and the tensors that the method needs.

    `options` are the method's, before defaults.
    """

    task: Task
    method: Method
    base: BaseWeights
    experts: Sequence[ExpertWeights]
    inputs: Mapping[str, Sequence[Checkpoint]]
    options: Mapping[str, Any]

    @classmethod
    def open(cls, task: Task, recipe: Recipe, method: Method) -> _Side:
        options, input_options = method.split_inputs(recipe.options)
        resolved = method.resolve_options(options)
        rules = [resolved | rule.parse_options(method).plain_options for rule in recipe.rules]
        method = method.specialize(resolved, *rules)
        if method.inputs and not task.is_denoiser:
            what = f"method {method.name} needs {' and '.join(method.inputs)}, which {task.folder}"
            fix = "give --components denoiser, or another method"
            raise UsageError(f"{what} does not have", fix=fix)
        sources = [recipe.experts[i] for i, _ in task.experts]
        denoisers = [denoiser for _, denoiser in task.experts]
        paths = find_inputs(method, input_options, sources, denoisers)
        base: BaseWeights = Checkpoint(task.base.place)
        if is_lora(base):
            base = NoBase([Checkpoint(denoiser.place) for denoiser in denoisers])
        skip_text = recipe.skip_text_encoder
        experts = [open_expert(d.place, base, skip_text=skip_text) for d in denoisers]
        inputs = {}
        for name, files in paths.items():
            inputs[name] = [Checkpoint.open(path).named_like(base) for path in files]
        return cls(task, method, base, experts, inputs, options)

    def files(self) -> list[Path]:
        inputs = [checkpoint for files in self.inputs.values() for checkpoint in files]
        opened = [self.base, *self.experts, *inputs]
        return [file for checkpoint in opened for file in checkpoint.place.files]

    def pick(self, numbers: Sequence[Number] | None, K: int) -> tuple[Number, ...] | None:
        """Return, of one number for each expert of the recipe, those of this side's experts."""
        if numbers is None or len(numbers) != K:
            return None if numbers is None else tuple(numbers)
        return tuple(numbers[i] for i, _ in self.task.experts)


@dataclass(frozen=True, slots=True)
class _Models:
    """The opened inputs: the experts' ranges, the parts of the output, notes on what is unused."""

    ranges: Sequence[TimestepRange | None]
    sides: Sequence[_Side]
    notes: Sequence[str]

    @classmethod
    def open(cls, recipe: Recipe, method: Method) -> _Models:
        weights = resolve_weights(recipe.weights, len(recipe.experts))
        is_weighted = any(w != weights[0] for w in weights) or any(r.weights for r in recipe.rules)
        if is_weighted and not method.has_weights:
            fix = "leave them out, and name the experts that count alone"
            raise UsageError(f"method {method.name} has no weights", fix=fix)
        variant = recipe.variant
        paths = [source.path for source in (recipe.base, *recipe.experts)]
        places = [locate(resolve_model_path(path, variant), variant) for path in paths]
        base, *experts = (find_denoisers(place, variant) for place in places)
        if recipe.is_pair_alone and len(base) == 2:
            base = [replace(base[0], range=None)]
        ranges = []
        for source, place, denoisers in zip(recipe.experts, places[1:], experts, strict=True):
            if source.range and len(denoisers) > 1:
                what = f"{source.path} has two denoisers with ranges of their own; the range"
                fix = "leave the range out (none), or name the folder of one of the two"
                raise UsageError(f"{what} {source.range} is given", fix=fix)
            ranges.append(resolve_range(place, source))
        others: list[Task] = []
        notes: list[str] = []
        if not recipe.only or recipe.components is not None:  # --only keeps the other parts
            components = recipe.components
            others, notes = find_component_tasks(places[0], places[1:], ranges, components, variant)
        if recipe.only and others:
            what = "--only merges a part of the denoiser, --components other parts too"
            raise UsageError(what, fix="leave one of them out")
        tasks = [*assign_experts(base, experts, ranges, recipe.boundary), *others]
        if recipe.lora_rank is not None:
            if others or recipe.boundary is not None:
                what = "a LoRA is made for a denoiser of the base, and the output has more parts"
                fix = "give --components denoiser" if others else "leave --boundary out"
                raise UsageError(what, fix=fix)
            tasks = [task for task in tasks if task.experts]
        sides = [_Side.open(task, recipe, method) for task in tasks]
        return cls(ranges, sides, notes)

    def record(self, recipe: Recipe, hashes: Mapping[Path, str]) -> Recipe:
        """Return the recipe with ranges, versions and the SHA-256 of every input."""
        experts = []
        for i, (source, span) in enumerate(zip(recipe.experts, self.ranges, strict=True)):
            opened: list[ExpertWeights] = []
            inputs: dict[str, Checkpoint] = {}
            for side in self.sides:
                for j, (number, _) in enumerate(side.task.experts):
                    if number == i:
                        opened.append(side.experts[j])
                        inputs |= {name: files[j] for name, files in side.inputs.items()}
            experts.append(record_source(replace(source, range=span), opened, hashes, inputs))
        base = record_source(recipe.base, [side.base for side in self.sides], hashes, {})
        made = versions(*VERSIONS)
        return replace(recipe, base=base, experts=experts, versions=made, output={})


def _without_base(recipe: Recipe) -> Recipe:
    """Return a recipe of LoRA files alone, if a LoRA stands in the base's place."""
    files = [Checkpoint.open(recipe.base.path, recipe.variant)]
    if not is_lora(files[0]):
        return recipe
    recipe = recipe.changed(no_base=True)
    for expert in recipe.experts[1:]:
        files.append(Checkpoint.open(expert.path, recipe.variant))
        if not is_lora(files[-1]):
            model = expert.path
            others = " ".join(e.path for e in recipe.experts if e.path != model)
            what = f"{recipe.base.path} is a LoRA in the base's place, and {model} is a model"
            fix = f"name the base first; if it is that model: demerge merge {model} {others}"
            raise UsageError(what, fix=fix)
    if len(files) == 1 and not recipe.lora_rank:
        what = f"{recipe.base.path} is a LoRA alone, and a merge of it is a copy"
        fix = "name its base before it, or more LoRA files, or give --lora-rank for a smaller one"
        raise UsageError(what, fix=fix)
    return recipe if recipe.lora_rank else replace(recipe, lora_rank=NoBase(files).rank)


def _plan_part(recipe: Recipe, side: _Side, execution: Execution) -> OutputDenoiser:
    """Check one part of the output, and return how it is merged and stored."""
    task, method = side.task, side.method
    sources = [recipe.experts[i] for i, _ in task.experts]
    names = [source.path for source in (recipe.base, *sources)]
    base, notes = drop_ema(side.base, names[0])
    if isinstance(base, NoBase):
        rank = f"into a LoRA of rank {recipe.lora_rank}"
        notes.append(f"no base: the deltas of {len(sources)} LoRA files are merged, {rank}")
    experts: list[Tensors] = []
    for expert, name in zip(side.experts, names[1:], strict=True):
        fit, more = fit_expert(base, expert, (names[0], name), recipe)
        experts, notes = [*experts, fit], [*notes, *more]
    if task.is_denoiser:
        check_same_base(side.base, side.experts, recipe.no_base)
    check_inputs(method, base, side.inputs, len(sources))
    ranges = [denoiser.range for _, denoiser in task.experts]
    is_plain = recipe.variant is None
    check_measured_on(side.base, side.experts, ranges, side.inputs, models=is_plain)
    lora = None
    if recipe.lora_rank is not None:
        save_dtype = "float32" if recipe.save_dtype == "keep" else recipe.save_dtype
        if save_dtype.startswith("float8"):
            what = f"save_dtype is {save_dtype}, in which no LoRA is stored"
            raise UsageError(what, fix="give --save-dtype bfloat16")
        naming = Naming.of(recipe.lora_format, base, side.base.place)
        lora = Lora(recipe.lora_rank, getattr(torch, save_dtype), naming)
        if task.range is not None:  # of two denoisers
            name = f"pytorch_lora_weights_{'low' if task.range.start == 0 else 'high'}_noise"
            lora = replace(lora, file=f"{name}.safetensors", range=task.range)
    pairs = zip(sources, ranges, strict=True)
    part = OutputDenoiser(
        job=MergeJob(
            method, base, experts, [], method.resolve_options(side.options),
            inputs=side.inputs, seed=recipe.seed, names=names, only=frozenset(), ranges=ranges,
            snr=snr_of(find_scheduler_config(side.base.place)), execution=execution,
        ),
        place=side.base.place,
        folder=task.folder,
        entries=list_entries(base, recipe.save_dtype),
        experts=[replace(source, range=span) for source, span in pairs],
        lora=lora,
        notes=notes,
        file=task.file,
    )  # fmt: skip
    return _with_weights(part, recipe, side) if sources else part


def _with_weights(part: OutputDenoiser, recipe: Recipe, side: _Side) -> OutputDenoiser:
    """Return a part that has experts with their weights, its rules, and the tensors to merge."""
    job, K, is_denoiser = part.job, len(recipe.experts), side.task.is_denoiser
    specs = job.base.specs if isinstance(job.base, Checkpoint | NoBase) else {}
    merged = [name for name, spec in specs.items() if spec.is_float and not is_buffer(name)]
    if recipe.only:
        chosen = {n for p in recipe.only for n in select(p, merged, f"--only '{p}'")}
        merged = [name for name in merged if name in chosen]
    weights = recipe.weights if is_denoiser else resolve_weights(recipe.weights, K)
    weights = resolve_weights(side.pick(weights, K), len(part.experts))
    rules = []
    for rule in recipe.rules:  # of another part than the denoiser, those that match
        if is_denoiser or any(map(compile_pattern(rule.pattern), side.base)):
            rules.append(replace(rule, weights=side.pick(rule.weights, K)))
    settings, matches = resolve_rules(rules, merged, side.method, side.options, weights)
    job = replace(job, weights=weights, settings=settings, only=frozenset(merged))
    entries = list_entries(job.base, recipe.save_dtype, frozenset(merged))
    notes = part.notes if part.lora else [*part.notes, *note_float8(job.base, entries)]
    return replace(part, job=job, matches=matches, entries=entries, notes=notes)


def _check_not_a_copy(
    recipe: Recipe, sides: Sequence[_Side], parts: Sequence[OutputDenoiser]
) -> None:
    """Refuse a merge that gives an input back, unless weights mean that; and one without a base."""
    if recipe.no_base:
        for side, part in zip(sides, parts, strict=True):
            if isinstance(side.base, NoBase):  # the deltas of LoRA files alone need no base
                continue
            if any(map(holds_deltas, side.experts)):
                what = "a LoRA is not a model, and --no-base merges models alone"
                raise UsageError(what, fix="name the LoRA's base first")
            check_equal_shares(part.job)
    has_weights = recipe.weights is not None or any(r.weights is not None for r in recipe.rules)
    if has_weights or recipe.base.files or recipe.only or recipe.lora_rank is not None:
        return
    copies = set(range(len(recipe.experts) + 1))
    for side, part in zip(sides, parts, strict=True):
        numbers = [0, *(1 + i for i, _ in side.task.experts)]
        copies &= {numbers[i] for i in find_copies(part.job, recipe.no_base)}
    if not copies:
        return
    first, names = min(copies), [recipe.base.path, *(expert.path for expert in recipe.experts)]
    count = f"{len(recipe.experts)} expert{'s' if len(recipe.experts) > 1 else ''}"
    what = f"{recipe.method} of {count} and the base {names[0]} gives a copy of {names[first]}"
    models = " ".join(names)
    fix = f"experts of a base: demerge merge BASE {models}; the models alone: demerge merge"
    fix = f"{fix} {models} --no-base; the copy itself: say so by --weights"
    copy_of_base = "choose other options, or give --weights if the copy is meant"
    raise UsageError(what, fix=fix if first else copy_of_base)
