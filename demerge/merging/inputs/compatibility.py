"""Whether an expert's tensors fit the base's, and what becomes of the differences that checkpoints in the wild have.

    model_ema.*                   left out of base, experts and output: an average of other weights than the merged ones
    position_ids, betas, ...      buffers, no weights: the base's are kept, unless they say that the schedules differ
    no tensor of the VAE, ...     a part that an expert does not have: the base's is kept
    v_pred, ztsnr, ...            markers of what the model predicts: equal in both, or refused
    what --only leaves out        not looked at
    all other tensors             missing: `error`, or `base` to keep the base's; extra: `error`, or `drop`

Names that differ by a wrapper (`_orig_mod.`, `module.`) or by the denoiser's prefix are one name (`Checkpoint.named_like`).
Whatever is left out or kept is told in a note. An expert has no delta where it has no tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from demerge.errors import InputError, UsageError, listed
from demerge.lora import NoBase, notes_of
from demerge.merging.engine.validation import Tensors, find_differences, holds_deltas
from demerge.merging.inputs.experts import Base
from demerge.merging.recipe.blocks import by_depth, grouped
from demerge.merging.recipe.rules import matcher
from demerge.storage.checkpoint import Checkpoint, canonical

MISSING, EXTRA = ("error", "base"), ("error", "drop")
EMA = "model_ema."
BUFFER = re.compile(
    r"(?:.*\.)?position_ids|(?:cond_stage_model|conditioner|text_encoders)\..*logit_scale|(?:denoiser|model_sampling)\.sigmas"
    r"|betas|logvar|scale_factor|edm_\w+(?:\.sigma_(?:max|min))?|(?:sqrt_|log_)?(?:one_minus_)?alphas_cumprod(?:_prev)?"
    r"|sqrt_recip(?:m1)?_alphas_cumprod|posterior_\w+|lvlb_weights"
)
MEANINGFUL = (
    "betas",
    "alphas_cumprod",
    "scale_factor",
    "edm_mean",
    "edm_std",
    "edm_vpred.sigma_max",
    "edm_vpred.sigma_min",
)
MARKERS = ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
ROUNDING = 1e-2  # relative: of values that were stored in bfloat16
ZERO_SNR = 1e-4  # alphas_cumprod at T - 1; Stable Diffusion's is 0.0047
PARTS = {
    "VAE": ("first_stage_model.", "vae."),
    "text encoder": ("cond_stage_model.", "conditioner.", "text_encoders.", "text_encoder."),
}
FIRST_CONVOLUTION = re.compile(
    r"(?:conv_in|input_blocks\.0\.0|x_embedder\.proj|pos_embed\.proj)\.weight"
)
LAYOUTS = {"LDM": "input_blocks.", "diffusers": "down_blocks."}


@dataclass(frozen=True, slots=True)
class Rules:
    """What may differ.

    Attributes:
        missing: `error`, or `base` to take from the base what an expert does not have.
        extra: `error`, or `drop` to leave out what only an expert has.
        only: patterns of the tensors that are merged; none for all.

    Raises:
        UsageError: if a word is unknown.
    """

    missing: str = "error"
    extra: str = "error"
    only: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, value, known in (
            ("missing", self.missing, MISSING),
            ("extra", self.extra, EXTRA),
        ):
            if value not in known:
                raise UsageError(
                    f"--{name} '{value}' is unknown", fix=f"use one of {', '.join(known)}"
                )

    def merges(self, name: str) -> bool:
        """Whether a tensor of this name would be merged."""
        return not self.only or any(matcher(pattern)(name) for pattern in self.only)


def is_buffer(name: str) -> bool:
    """Whether a tensor is a buffer of text encoder or schedule, which is never merged."""
    return BUFFER.fullmatch(name) is not None


def without_ema(base: Base, label: str) -> tuple[Base, list[str]]:
    """Return a base without the running average of its weights, and a note if it has one."""
    average = [name for name in base if name.startswith(EMA)]
    if not average or isinstance(base, NoBase):
        return base, []
    return base.only([name for name in base if not name.startswith(EMA)]), [
        _ema_note(label, len(average))
    ]


def fitted(
    base: Tensors, expert: Tensors, names: tuple[str, str], rules: Rules
) -> tuple[Tensors, list[str]]:
    """Return those tensors of an expert that are merged or compared with the base's, and notes of what was left out.

    Args:
        names: what base and expert are called.

    Raises:
        InputError: with one line for each kind of difference that is not allowed.
    """
    if holds_deltas(expert):
        return expert, notes_of([expert])
    found = _Differences(base, expert, names, rules)
    found.refuse()
    kept = [name for name in expert if name in base]
    if len(kept) == len(expert):
        return expert, found.notes
    return expert.only(kept) if isinstance(expert, Checkpoint) else {
        name: expert[name] for name in kept
    }, found.notes


@dataclass
class _Differences:
    """All differences of one expert: faults, each with what to do about it, and notes."""

    base: Tensors
    expert: Tensors
    names: tuple[str, str]
    rules: Rules
    faults: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def refuse(self) -> None:
        """Refuse what is not allowed.

        Raises:
            InputError: naming all of it.
        """
        base, label = self.names
        if self._other_layout():
            return
        average = [name for name in self.expert if name.startswith(EMA)]
        if average:
            self.notes.append(_ema_note(label, len(average)))
        self._markers()
        self._schedule()
        self._missing(
            [
                n
                for n in self.base
                if n not in self.expert and self.rules.merges(n) and n not in MARKERS
            ]
        )
        self._extra(
            [
                n
                for n in self.expert
                if n not in self.base and not n.startswith(EMA) and n not in MARKERS
            ]
        )
        self._unlike(
            [n for n in self.base if n in self.expert and self.rules.merges(n) and not is_buffer(n)]
        )
        if self.faults:
            whats, fixes = (
                "; ".join(dict.fromkeys(texts)) for texts in zip(*self.faults, strict=True)
            )
            raise InputError(f"{label} does not fit {base}: {whats}", fix=fixes)

    def _other_layout(self) -> bool:
        """Refuse an expert whose denoiser has the names of the other layout."""
        one, other = _layout(self.base), _layout(self.expert)
        if one == other or not one or not other:
            return False
        base, label = self.names
        to = f"FOLDER --config {base}" if one == "diffusers" else "FILE.safetensors"
        what = f"{label} has the names of the {other} layout, {base} those of {one}"
        raise InputError(what, fix=f"demerge convert {label} {to}, and merge what it writes")

    def _markers(self) -> None:
        base, label = self.names
        mine, its = _markers_of(self.base), _markers_of(self.expert)
        for which, of, option, allowed in (
            (mine - its, base, "--missing base", self.rules.missing == "base"),
            (its - mine, label, "--extra drop", self.rules.extra == "drop"),
        ):
            marks = ", ".join(sorted(which))
            if which and allowed:
                self.notes.append(
                    f"only {of} is marked {marks}: taken to predict the same, as {option} says"
                )
            elif which:
                fix = f"name the base that {label} was finetuned from; if both predict the same all the same, give {option}"
                self.faults.append(
                    (f"only {of} is marked {marks}, so the two predict something else", fix)
                )

    def _schedule(self) -> None:
        label = self.names[1]
        held = [n for n in self.base if n in self.expert and is_buffer(n)]
        other = [n for n in held if not _equal(self.base[n], self.expert[n])]
        wrong = [n for n in other if n in MEANINGFUL]
        if wrong:
            what = f"another noise schedule: {', '.join(wrong)} differ"
            self.faults.append((what, f"name the base that {label} was finetuned from"))
        if set(other) - set(wrong):
            self.notes.append(
                f"{label}: the base's buffers are kept: {listed([n for n in other if n not in wrong])}"
            )

    def _missing(self, names: Sequence[str]) -> None:
        label = self.names[1]
        buffers = [n for n in names if is_buffer(n)]
        absent = [part for part in PARTS if _has(part, self.base) and not _has(part, self.expert)]
        whole = [n for n in names if n not in buffers and _part(n) in absent]
        left = [n for n in names if n not in buffers and n not in whole]
        for part in dict.fromkeys(_part(n) for n in whole):
            self.notes.append(f"{label} has no {part}: the base's is kept")
        if buffers:
            self.notes.append(f"{label}: the base's buffers are kept: {listed(buffers)}")
        if left and self.rules.missing == "base":
            self.notes.append(
                f"{label} lacks {len(left)} tensors, the base's are kept: {listed(left)}"
            )
        elif left:
            fix = f"name the base that {label} was finetuned from, or give --missing base to keep the base's"
            self.faults.append((f"{len(left)} missing: {listed(left)}", fix))

    def _extra(self, names: Sequence[str]) -> None:
        label = self.names[1]
        outside = [n for n in names if not self.rules.merges(n)]
        buffers = [n for n in names if is_buffer(n) and n not in outside]
        left = [n for n in names if n not in outside and n not in buffers]
        if buffers:
            self.notes.append(f"{label}: buffers are left out: {listed(buffers)}")
        if outside:
            self.notes.append(
                f"{label}: {len(outside)} tensors outside of --only are left out: {listed(outside)}"
            )
        parts = [part for part in PARTS if _has(part, left) and not _has(part, self.base)]
        told = f" (the base has no {' and no '.join(parts)})" if parts else ""
        if left and self.rules.extra == "drop":
            self.notes.append(f"{label}: {len(left)} tensors dropped{told}: {listed(left)}")
        elif left:
            fix = f"name the base that {label} was finetuned from, or give --extra drop to leave them out"
            self.faults.append((f"{len(left)} extra{told}: {listed(left)}", fix))

    def _unlike(self, names: Sequence[str]) -> None:
        label = self.names[1]
        found = find_differences(self.base, self.expert, names)
        fix = f"name the base that {label} was finetuned from{self._rest({n for told in found.values() for n in told})}"
        shapes = found["of another shape"]
        for n in [
            n
            for n in shapes
            if FIRST_CONVOLUTION.search(n) and _channels(self.base[n], self.expert[n])
        ]:
            its, mine = self.expert[n].shape[1], self.base[n].shape[1]
            kind = {
                4: "a text-to-image model",
                9: "an inpainting model",
                8: "an image editing model",
                5: "a depth model",
            }
            what = f"it takes {its} input channels ({kind.get(its, 'another kind of model')}), the base takes {mine}"
            self.faults.append((f"{what}: {shapes.pop(n)}", fix))
        self.faults += [
            (f"{len(told)} {what}: {listed(list(told.values()))}", fix)
            for what, told in found.items()
            if told
        ]

    def _rest(self, wrong: set[str]) -> str:
        """Return the option that merges the blocks that fit, empty if none does."""
        merged = [
            n
            for n, t in self.base.items()
            if t.is_floating_point() and self.rules.merges(n) and not is_buffer(n)
        ]
        whole = {block for block, names in grouped(merged).items() if not wrong & set(names)}
        words: dict[str, list[str]] = {}
        for block in by_depth(merged):
            words.setdefault(block.partition(".")[0], []).append(block)
        chosen = [
            x
            for word, blocks in words.items()
            for x in ([word] if whole >= set(blocks) else blocks)
            if x == word or x in whole
        ]
        words_alone = [
            pattern for pattern in chosen if re.fullmatch(r"[\w.-]+", pattern)
        ]  # others cannot be typed
        usable = [pattern for pattern in words_alone if any(matcher(pattern)(n) for n in merged)]
        return (
            f", or merge only what fits: {' '.join(f'--only {pattern}' for pattern in usable)}"
            if usable
            else ""
        )


def _ema_note(label: str, n: int) -> str:
    return f"{label}: {n} tensors {EMA}* are left out: the weights are merged, not their running average"


def _markers_of(tensors: Tensors) -> set[str]:
    found = {name for name in MARKERS if name in tensors}
    last = (
        tensors["alphas_cumprod"].reshape(-1)[-1:].tolist() if "alphas_cumprod" in tensors else []
    )
    return found | {"ztsnr" for value in last if value < ZERO_SNR}


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two buffers are equal but for rounding and a leading axis of length 1."""
    a, b = one.reshape(-1).double(), other.reshape(-1).double()
    return a.shape == b.shape and bool(torch.allclose(a, b, rtol=ROUNDING, atol=0))


def _channels(one: Tensor, other: Tensor) -> bool:
    """Whether two weights of a convolution differ in the number of input channels alone."""
    return one.ndim == other.ndim > 1 and (one.shape[0], *one.shape[2:]) == (
        other.shape[0],
        *other.shape[2:],
    )


def _part(name: str) -> str | None:
    return next((part for part, prefixes in PARTS.items() if name.startswith(prefixes)), None)


def _has(part: str, names: Iterable[str]) -> bool:
    return any(name.startswith(PARTS[part]) for name in names)


def _layout(names: Iterable[str]) -> str | None:
    """Return the layout of a UNet's names."""
    plain = {canonical(name).partition(".")[0] + "." for name in names}
    return next((layout for layout, prefix in LAYOUTS.items() if prefix in plain), None)
