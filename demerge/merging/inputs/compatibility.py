"""Whether an expert's tensors fit the base's, and what happens to the usual differences.

    model_ema.*                   dropped: an average of other weights than the merged ones
    position_ids, betas, ...      buffers: the base's are kept; different schedules are an error
    no tensor of the VAE, ...     a part that an expert does not have: the base's is kept
    v_pred, ztsnr, ...            markers of what the model predicts: equal in both, or an error
    what --only leaves out        not looked at
    other tensors                 --missing: `error`, or `base` keeps the base's;
                                  --extra: `error`, or `drop`

Names that differ by a wrapper (`_orig_mod.`, `module.`) or by the denoiser's prefix are the same
name, and names of the original code are those of diffusers (`Checkpoint.named_like`). A note says
what is dropped or kept. Without a tensor, an expert has no delta there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from demerge.errors import InputError, listed
from demerge.lora import NoBase, notes_of
from demerge.merging.blocks import group_by_block
from demerge.merging.engine.validation import Tensors, find_differences, holds_deltas
from demerge.merging.inputs.experts import BaseWeights
from demerge.merging.options import MergeOptions
from demerge.merging.recipe.rules import compile_pattern, is_pattern
from demerge.storage.checkpoint import Checkpoint

EMA = "model_ema."
BUFFER = re.compile(
    r"(?:.*\.)?position_ids|(?:cond_stage_model|conditioner|text_encoders)\..*logit_scale"
    r"|(?:denoiser|model_sampling)\.sigmas|betas|logvar|scale_factor"
    r"|edm_\w+(?:\.sigma_(?:max|min))?|(?:sqrt_|log_)?(?:one_minus_)?alphas_cumprod(?:_prev)?"
    r"|sqrt_recip(?:m1)?_alphas_cumprod|posterior_\w+|lvlb_weights"
)
EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
SCHEDULE = ("betas", "alphas_cumprod", "scale_factor", *EDM)
MARKERS = ("v_pred", "ztsnr", *EDM)
ROUNDING = 1e-2  # relative: of values that were stored in bfloat16
ZERO_SNR = 1e-4  # alphas_cumprod at T - 1; Stable Diffusion's is 0.0047
PARTS = {
    "VAE": ("first_stage_model.", "vae."),
    "text encoder": ("cond_stage_model.", "conditioner.", "text_encoders.", "text_encoder."),
}
FIRST_CONVOLUTION = re.compile(
    r"(?:conv_in|input_blocks\.0\.0|x_embedder\.proj|pos_embed\.proj)\.weight"
)
INPUTS = {
    4: "a text-to-image model",
    5: "a depth model",
    8: "an image editing model",
    9: "an inpainting model",
}


def is_buffer(name: str) -> bool:
    """Whether a tensor is a buffer of text encoder or schedule, which is never merged."""
    return BUFFER.fullmatch(name) is not None


def drop_ema(base: BaseWeights, label: str) -> tuple[BaseWeights, list[str]]:
    """Return a base without the running average of its weights, and a note if it has one."""
    kept = [name for name in base if not name.startswith(EMA)]
    if len(kept) == len(base) or isinstance(base, NoBase):
        return base, []
    return base.only(kept), [_ema_note(label, len(base) - len(kept))]


def fit_expert(
    base: Tensors, expert: Tensors, names: tuple[str, str], options: MergeOptions
) -> tuple[Tensors, list[str]]:
    """Return the tensors of an expert that are compared with the base's, and notes on the others.

    Args:
        names: what base and expert are called.
        options: `missing`, `extra` and `only` say which differences are allowed.

    Raises:
        InputError: naming each kind of difference that is not allowed.
    """
    if holds_deltas(expert):
        return expert, notes_of([expert])
    comparison = _Comparison(base, expert, *names, options)
    comparison.check()
    kept = [name for name in expert if name in base]
    if len(kept) == len(expert):
        return expert, comparison.notes
    if isinstance(expert, Checkpoint):
        return expert.only(kept), comparison.notes
    return {name: expert[name] for name in kept}, comparison.notes


@dataclass
class _Comparison:
    """All differences of one expert: faults, each with its fix, and notes."""

    base: Tensors
    expert: Tensors
    base_name: str
    label: str
    options: MergeOptions
    faults: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.right_base = f"name the base that {self.label} was finetuned from"

    def is_merged(self, name: str) -> bool:
        """Whether --only leaves a tensor of this name in."""
        only = self.options.only
        return not only or any(compile_pattern(pattern)(name) for pattern in only)

    def check(self) -> None:
        """Collect notes, and raise `InputError` with all faults."""
        base, expert = self.base, self.expert
        average = sum(name.startswith(EMA) for name in expert)
        if average:
            self.notes.append(_ema_note(self.label, average))
        self.check_markers()
        self.check_schedule()
        missing = [name for name in base if name not in expert and self.is_merged(name)]
        extra = [name for name in expert if name not in base and not name.startswith(EMA)]
        common = [name for name in base if name in expert and self.is_merged(name)]
        self.check_missing([name for name in missing if name not in MARKERS])
        self.check_extra([name for name in extra if name not in MARKERS])
        self.check_equal_kinds([name for name in common if not is_buffer(name)])
        if self.faults:
            fixes = "; ".join(dict.fromkeys(self.faults.values()))
            what = f"{self.label} does not fit {self.base_name}: {'; '.join(self.faults)}"
            raise InputError(what, fix=fixes)

    def check_markers(self) -> None:
        mine, theirs = _find_markers(self.base), _find_markers(self.expert)
        for marks, owner, option, is_allowed in (
            (mine - theirs, self.base_name, "--missing base", self.options.missing == "base"),
            (theirs - mine, self.label, "--extra drop", self.options.extra == "drop"),
        ):
            what = f"only {owner} is marked {', '.join(sorted(marks))}"
            if marks and is_allowed:
                self.notes.append(f"{what}: {option} says that both predict the same")
            elif marks:
                fix = f"{self.right_base}; if both predict the same, give {option}"
                self.faults[f"{what}, so the two predict something else"] = fix

    def check_schedule(self) -> None:
        buffers = [name for name in self.base if name in self.expert and is_buffer(name)]
        different = [n for n in buffers if not _is_close(self.base[n], self.expert[n])]
        wrong = [name for name in different if name in SCHEDULE]
        if wrong:
            self.faults[f"another noise schedule: {', '.join(wrong)} differ"] = self.right_base
        self.note_buffers([name for name in different if name not in SCHEDULE])

    def note_buffers(self, names: Sequence[str]) -> None:
        if names:
            self.notes.append(f"{self.label}: the base's buffers are kept: {listed(names)}")

    def check_missing(self, names: Sequence[str]) -> None:
        absent = [p for p in PARTS if _has_part(p, self.base) and not _has_part(p, self.expert)]
        parts = {name: _part_of(name) for name in names if not is_buffer(name)}
        for part in dict.fromkeys(part for part in parts.values() if part in absent):
            self.notes.append(f"{self.label} has no {part}: the base's is kept")
        self.note_buffers([name for name in names if is_buffer(name)])
        left = [name for name, part in parts.items() if part not in absent]
        what = f"{self.label} lacks {len(left)} tensors, the base's are kept: {listed(left)}"
        fault = f"{len(left)} missing: {listed(left)}"
        fix = f"{self.right_base}, or give --missing base to keep the base's"
        self.note_or_refuse(left, self.options.missing == "base", what, fault, fix)

    def check_extra(self, names: Sequence[str]) -> None:
        outside = [name for name in names if not self.is_merged(name)]
        inside = [name for name in names if self.is_merged(name)]
        buffers = [name for name in inside if is_buffer(name)]
        left = [name for name in inside if not is_buffer(name)]
        if buffers:
            self.notes.append(f"{self.label}: buffers are dropped: {listed(buffers)}")
        if outside:
            what = f"{self.label}: {len(outside)} tensors outside of --only are dropped"
            self.notes.append(f"{what}: {listed(outside)}")
        parts = [part for part in PARTS if _has_part(part, left) and not _has_part(part, self.base)]
        reason = f" (the base has no {' and no '.join(parts)})" if parts else ""
        what = f"{self.label}: {len(left)} tensors dropped{reason}: {listed(left)}"
        fault = f"{len(left)} extra{reason}: {listed(left)}"
        fix = f"{self.right_base}, or give --extra drop to drop them"
        self.note_or_refuse(left, self.options.extra == "drop", what, fault, fix)

    def note_or_refuse(
        self, names: Sequence[str], is_allowed: bool, note: str, fault: str, fix: str
    ) -> None:
        if names and is_allowed:
            self.notes.append(note)
        elif names:
            self.faults[fault] = fix

    def check_equal_kinds(self, names: Sequence[str]) -> None:
        differences = find_differences(self.base, self.expert, names)
        wrong = {name for texts in differences.values() for name in texts}
        fix = f"{self.right_base}{self.suggest_only(wrong)}" if wrong else ""
        shapes = differences["of another shape"]
        for name in [name for name in shapes if self.has_other_inputs(name)]:
            theirs, mine = self.expert[name].shape[1], self.base[name].shape[1]
            kind = INPUTS.get(theirs, "another kind of model")
            what = f"it takes {theirs} input channels ({kind}), the base takes {mine}"
            self.faults[f"{what}: {shapes.pop(name)}"] = fix
        for kind, texts in differences.items():
            if texts:
                self.faults[f"{len(texts)} {kind}: {listed(list(texts.values()))}"] = fix

    def has_other_inputs(self, name: str) -> bool:
        """Whether a first convolution differs in the number of input channels alone."""
        one, other = list(self.base[name].shape), list(self.expert[name].shape)
        is_first = FIRST_CONVOLUTION.search(name) is not None and len(one) > 1
        return is_first and one[:1] + one[2:] == other[:1] + other[2:]

    def suggest_only(self, wrong: set[str]) -> str:
        """Return the --only that merges the blocks that fit, empty if none does."""
        merged = [
            name
            for name, tensor in self.base.items()
            if tensor.is_floating_point() and self.is_merged(name) and not is_buffer(name)
        ]
        blocks = group_by_block(merged)
        fits = {block for block, names in blocks.items() if not wrong & set(names)}
        stages: dict[str, list[str]] = {}
        for block in blocks:
            stages.setdefault(block.partition(".")[0], []).append(block)
        patterns: list[str] = []
        for stage, members in stages.items():
            whole = fits.issuperset(members)
            patterns += [stage] if whole else [block for block in members if block in fits]
        usable = [p for p in patterns if is_pattern(p) and any(map(compile_pattern(p), merged))]
        options = " ".join(f"--only {pattern}" for pattern in usable)
        return f", or merge only what fits: {options}" if usable else ""


def _ema_note(label: str, count: int) -> str:
    return f"{label}: {count} tensors {EMA}* are dropped: the weights are merged, not their average"


def _find_markers(tensors: Tensors) -> set[str]:
    markers = {name for name in MARKERS if name in tensors}
    if "alphas_cumprod" in tensors:
        last = tensors["alphas_cumprod"].reshape(-1)[-1:]
        markers |= {"ztsnr"} if bool((last < ZERO_SNR).any()) else set()
    return markers


def _is_close(one: Tensor, other: Tensor) -> bool:
    """Whether two buffers are equal up to rounding and a leading axis of length 1."""
    a, b = one.reshape(-1).double(), other.reshape(-1).double()
    return a.shape == b.shape and bool(torch.allclose(a, b, rtol=ROUNDING, atol=0))


def _part_of(name: str) -> str | None:
    return next((part for part, prefixes in PARTS.items() if name.startswith(prefixes)), None)


def _has_part(part: str, names: Iterable[str]) -> bool:
    return any(name.startswith(PARTS[part]) for name in names)
