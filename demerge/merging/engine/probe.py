"""What a merge comes to, tried on a few small random tensors before any work.

It may be a copy of one input, or be of no use without a base. Two models and no base are a usual
request: A is then taken for the base, B for its only expert, and the mean of one expert is that
expert. Whether a method with its options and weights gives an input back is not listed anywhere: it
is merged once, in memory, and compared bit by bit. So it holds for other packages' methods, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from demerge.errors import DemergeError, UsageError
from demerge.merging.contract import Method
from demerge.merging.engine.in_memory import assemble
from demerge.merging.engine.job import MergeJob, Setting
from demerge.merging.engine.validation import Tensors, holds_deltas
from demerge.timesteps import TimestepRange

SHAPES = {"conv": (3, 2, 3, 3), "linear": (5, 7), "bias": (5,), "scalar": (), "empty": (0, 4)}


@dataclass(frozen=True, slots=True)
class Case:
    """A base and K experts of a few tensors, the inputs of each, and other fields of the job."""

    base: Tensors
    experts: Sequence[Tensors]
    weights: Sequence[float]
    inputs: Sequence[Tensors]
    fields: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def random(cls, seed: int, K: int, scale: float = 0.01) -> Case:
        """Draw a base, experts at `scale` times a normal number from it, and positive inputs."""
        g = torch.Generator().manual_seed(seed)
        base = {n: torch.randn(s, generator=g) * max(scale, 1.0) for n, s in SHAPES.items()}
        experts, inputs = [], []
        for _ in range(K):
            deltas = {n: scale * torch.randn(t.shape, generator=g) for n, t in base.items()}
            experts.append({n: t + deltas[n] for n, t in base.items()})
        for _ in range(K):
            inputs.append({n: torch.rand(t.shape, generator=g) + 0.1 for n, t in base.items()})
        snr = torch.linspace(100, 0.01, 250, dtype=torch.float64)
        fields = {"ranges": [TimestepRange(0, 250)] * K, "snr": snr}
        return cls(base, experts, [(i + 1) / (K * (K + 1) / 2) for i in range(K)], inputs, fields)

    def pick(self, numbers: Sequence[int]) -> Case:
        """Return the case with these experts, in this order."""
        return Case(
            self.base,
            [self.experts[i] for i in numbers],
            [self.weights[i] for i in numbers],
            [self.inputs[i] for i in numbers],
            {**self.fields, "ranges": [self.fields["ranges"][i] for i in numbers]},
        )

    def job(self, method: Method, **options: object) -> MergeJob:
        """Return the merge with the method's defaults but for `options`."""
        resolved = method.resolve_options(options)
        method = method.specialize(resolved)
        inputs: dict[str, Sequence[Tensors]] = dict.fromkeys(method.inputs, self.inputs)
        for name in method.optional_inputs:
            inputs[name] = [_grams(tensors) for tensors in self.inputs]
        return MergeJob(
            method, self.base, self.experts, self.weights, resolved, inputs, **self.fields
        )

    def merge(self, method: Method, **options: object) -> dict[str, Tensor]:
        """Return the merged tensors."""
        return assemble(self.job(method, **options))


def _grams(tensors: Tensors) -> dict[str, Tensor]:
    """Return Gram matrices [in in] of the matrices: inputs of another shape, which some lack."""
    return {n: t.flatten(1).T @ t.flatten(1) for n, t in tensors.items() if t.ndim > 1}


def find_copies(job: MergeJob, no_base: bool = False) -> set[int]:
    """Return the inputs that the merge gives back to the bit: 0 for the base, 1 for expert 1, ...

    A base that is also the first expert is not counted, nor is a LoRA: it is not a model.
    """
    if not job.experts:
        return {0}
    models = {i for i, expert in enumerate(job.experts, 1) if not holds_deltas(expert)}
    copies = models if no_base else models | {0}
    for setting in _settings(job):
        copies &= _equal_inputs(_case(job, setting, no_base), job.method, setting)
    return copies


def check_equal_shares(job: MergeJob) -> None:
    """Refuse a merge without a base if its result depends on which model is named first."""
    if len(job.experts) < 2:
        what = "--no-base merges models with each other, and only one is given"
        fix = "name two models or more, or a pipeline of two denoisers"
        raise UsageError(what, fix=fix)
    for setting in _settings(job):
        case = _case(job, setting, no_base=True)
        turned = case.pick([*range(1, len(case.experts)), 0])
        turned = replace(turned, base=turned.experts[0])
        one, other = (each.merge(job.method, **setting.options) for each in (case, turned))
        if not all(torch.allclose(one[n], other[n], rtol=1e-4, atol=1e-5) for n in one):
            weights = ",".join(f"{weight:g}" for weight in setting.weights)
            raise UsageError(
                f"{job.method.name} of {len(job.experts)} models with the weights {weights} needs "
                "a base: without one, its result would depend on which of them is named first",
                fix="name the base they were finetuned from: demerge merge BASE A B; "
                "or give --method average with --no-base",
            )


def _settings(job: MergeJob) -> list[Setting]:
    """Return the different weights and options of the tensors."""
    found = {repr(setting): setting for setting in (job.setting(None), *job.settings.values())}
    return list(found.values())


def _case(job: MergeJob, setting: Setting, no_base: bool) -> Case:
    case = Case.random(0, len(job.experts))
    base = case.experts[0] if no_base else case.base
    fields = {"ranges": list(job.ranges), "snr": job.snr, "seed": job.seed}
    return replace(case, base=base, weights=setting.weights, fields=fields)


def _equal_inputs(case: Case, method: Method, setting: Setting) -> set[int]:
    try:
        merged = case.merge(method, **setting.options)
    except DemergeError:  # the merge itself explains it better
        return set()
    models = enumerate([case.base, *case.experts])
    return {i for i, model in models if all(torch.equal(merged[n], t) for n, t in model.items())}
