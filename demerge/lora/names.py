"""What the keys of a LoRA file mean: which rows of the base, and which part of their delta.

Dots and underscores in a module's name do not matter:

    diffusers, peft   unet.down_blocks.0.attentions.0.to_q.lora_A.weight,
                      base_model.model.transformer_blocks.0.ff.lora_B.weight
    older diffusers   down_blocks.0.attentions.0.attn1.processor.to_q_lora.down.weight,
                      unet.conv_in.lora.up.weight
    kohya, musubi     lora_unet_down_blocks_0_attentions_0_to_q.lora_down.weight, .alpha; or by the
                      names of the original code, lora_unet_double_blocks_0_img_attn_qkv.alpha
    ComfyUI           diffusion_model.blocks.0.self_attn.q.lora_up.weight
    ai-toolkit        transformer.transformer_blocks.0.attn.to_q.lora_A.weight, or as ComfyUI
    LyCORIS           lycoris_blocks_0_attn1_to_q.lokr_w1; .hada_w1_a, .dora_scale and so on

A base may have diffusers' names or those of the original code, with or without a prefix; either is
found by either. `demerge.storage.names` knows which modules of diffusers the rows of an original
one are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from demerge.storage.checkpoint import canonical, modern
from demerge.storage.names import Family, Span, find_family, flat

ROLES: Mapping[str, re.Pattern[str]] = {
    "down": re.compile(
        r"\.(?:lora_A(?:\.\w+)?|lora_down|lora\.down|lora_linear_layer\.down)\.weight\Z"
    ),
    "up": re.compile(r"\.(?:lora_B(?:\.\w+)?|lora_up|lora\.up|lora_linear_layer\.up)\.weight\Z"),
    "mid": re.compile(r"\.lora_mid\.weight\Z"),
    "alpha": re.compile(r"\.alpha\Z"),
    "magnitude": re.compile(r"\.lora_magnitude_vector(?:\.\w+)?(?:\.weight)?\Z"),
    "dora_scale": re.compile(r"\.dora_scale\Z"),
    "diff": re.compile(r"\.(?:diff|w_norm)\Z"),
    **{
        name: re.compile(rf"\.{name}(?:\.\w+)?\Z")
        for name in (
            "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
            "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
        )
    },
}  # fmt: skip
BIAS = re.compile(r"\.(?:diff_b|b_norm)\Z")
PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out|add_[qkv]_proj)_lora\.(?=(?:down|up)\.)")
FOREIGN: Mapping[str, re.Pattern[str]] = {
    "LoKr with a core in its first factor": re.compile(r"\.lokr_t1\Z"),
    "IA3": re.compile(r"\bia3_|\.on_input\Z"),
    "OFT": re.compile(r"\boft_|\bboft_"),
    "AdaLoRA": re.compile(r"\.lora_E\b"),
    "VeRA": re.compile(r"\bvera_"),
    "GLoRA": re.compile(r"\.[ab][12]\.weight\Z"),
    "an embedding LoRA": re.compile(r"\.lora_embedding_[AB]\b"),
    "a LoRA with trained biases": re.compile(r"\.lora_B(?:\.\w+)?\.bias\Z"),
    "weights in place of the base's": re.compile(r"\.set_weight\Z"),
}
TEXT = re.compile(
    r"(?:base_model\.model\.)?"
    r"(?:lora_(?:prior_)?te\d?_|te\d?\.|(?:text_encoders?|cond_stage_model)(?:_\d)?\.|clip_[lg]\.)"
)
PREFIXES = (
    "base_model_model_", "model_diffusion_model_", "diffusion_model_", "lora_unet_",
    "lora_transformer_", "lora_", "lycoris_", "unet_", "transformer_",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of a LoRA file, sorted by what they mean.

    Attributes:
        parts: module as the file names it -> part -> key.
        text: keys of text encoders.
        foreign: kind of adapter -> keys that demerge does not read.
        unknown: keys of no adapter.
    """

    parts: dict[str, dict[str, str]] = field(default_factory=dict)
    text: list[str] = field(default_factory=list)
    foreign: dict[str, list[str]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, names: Iterable[str]) -> Keys:
        """Sort the keys of a file."""
        keys = cls()
        for name in names:
            kinds = [kind for kind, pattern in FOREIGN.items() if pattern.search(name)]
            if TEXT.match(name):
                keys.text.append(name)
            elif kinds:
                keys.foreign.setdefault(kinds[0], []).append(name)
            elif part := _split_part(name):
                module, role = part
                keys.parts.setdefault(module, {})[role] = name
            else:
                keys.unknown.append(name)
        return keys

    @property
    def is_adapter(self) -> bool:
        """Whether the file is an adapter; some names of a model may look like an adapter's."""
        known = sum(map(len, self.parts.values())) + sum(map(len, self.foreign.values()))
        if known + len(self.text) < len(self.unknown):
            return False
        has_factors = any(set(parts) - {"alpha"} for parts in self.parts.values())
        return has_factors or bool(self.foreign) or any(map(_split_part, self.text))


def _split_part(name: str) -> tuple[str, str] | None:
    """Return the module and the role of a key, None if it is not a part of a delta."""

    def rename(match: re.Match[str]) -> str:
        return f".{'to_out.0' if match[1] == 'to_out' else match[1]}.lora."

    if bias := BIAS.search(name):
        return f"{name[: bias.start()]}.bias", "diff"
    plain = PROCESSOR.sub(rename, name)
    for role, pattern in ROLES.items():
        if match := pattern.search(plain):
            return plain[: match.start()], role
    return None


@dataclass(frozen=True, slots=True)
class Slot:
    """A module of diffusers in the base: rows of a tensor, all of them for None.

    Attributes:
        is_original: whether the base has it under a name of the original code.
    """

    tensor: str
    rows: Span | None = None
    is_original: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a delta, and the rows of the base's tensor that they are for; None for all."""

    tensor: str
    rows: Span | None = None
    at: Span | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """What a module of a LoRA file changes.

    Attributes:
        parts: its modules by diffusers' names, in the order of its rows.
        slots: what they are in the base; None for one that it does not have.
        original: its name in the original code, if that is how the file names it.
    """

    parts: Sequence[str]
    slots: Sequence[Slot | None]
    original: str = ""


class Modules:
    """The modules of a base that a LoRA may change, found by whatever name a file gives them."""

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Take the names and shapes of the base's tensors."""
        self._shapes = shapes
        stems = {name: canonical(name).removesuffix(".weight") for name in shapes}
        self.family: Family = find_family(stems.values())
        self._names = {name: modern(name.removesuffix(".weight")) for name in shapes}
        self._tensors: dict[str, set[Slot]] = {}
        for name, stem in stems.items():
            for known in {flat(stem), flat(self._names[name])}:
                self._tensors.setdefault(known, set()).add(Slot(name))
        for name, stem in stems.items():
            module, bias = _split_bias(stem)
            parts = self.family.to_diffusers(module) if self.family.is_original(module) else ()
            rows: Sequence[Span | None] = [None]
            if len(parts) > 1:
                try:
                    rows = self.family.split_rows(parts, next(iter(shapes[name]), 0))
                except ValueError:  # it is found as a whole alone
                    continue
            for part, span in zip(parts, rows, strict=True) if parts else ():
                slot = Slot(name, span, is_original=True)
                self._tensors.setdefault(flat(part + bias), set()).add(slot)

    def module(self, target: Target) -> str:
        """Return the name that a configuration has for a module."""
        slot = next(slot for slot in target.slots if slot)
        return self._names[slot.tensor] if len(target.slots) == 1 else target.original

    def find(self, named: str) -> Target | None:
        """Return what a module, as a file names it, is in the base; None if the base lacks it."""
        for name in strip_prefixes(flat(modern(named))):
            if slot := self._slot(name):
                return Target((name,), (slot,))
            module, bias = _split_bias(name, "_bias")
            parts = [flat(part + bias) for part in self.family.to_diffusers(module)]
            slots = [self._slot(part) for part in parts]
            if any(slots):
                return Target(parts, slots, name)
        return None

    def pieces(self, target: Target, rows: int) -> list[Piece]:
        """Return which rows of a delta of `rows` rows go where.

        Raises:
            ValueError: if the base has a part of its rows alone.
        """
        spans: Sequence[Span | None] = [None]
        if len(target.parts) > 1:
            parts = tuple(_split_bias(part, "_bias")[0] for part in target.parts)
            spans = self.family.split_rows(parts, rows)
        pieces = []
        for part, slot, span in zip(target.parts, target.slots, spans, strict=True):
            if slot is None:
                raise ValueError(f"the base has no {part}")
            swapped = bool(target.original) != slot.is_original
            original = target.original if target.original else canonical(slot.tensor)
            if swapped and self._is_swapped(original.removesuffix(".weight"), slot.tensor):
                halves = (0, rows // 2), (rows // 2, rows)
                pieces += [Piece(slot.tensor, *halves), Piece(slot.tensor, *halves[::-1])]
            else:
                pieces.append(Piece(slot.tensor, span, slot.rows))
        return pieces

    def _is_swapped(self, original: str, tensor: str) -> bool:
        stem = original.removesuffix(".bias").removesuffix("_bias")
        weight = self._shapes.get(tensor.removesuffix(".bias").removesuffix(".weight") + ".weight")
        return weight is not None and len(weight) > 1 and self.family.is_swapped(stem, weight)

    def _slot(self, name: str) -> Slot | None:
        slots = self._tensors.get(name, set())
        return next(iter(slots)) if len(slots) == 1 else None


def _split_bias(name: str, bias: str = ".bias") -> tuple[str, str]:
    """Return a name without its bias, and `.bias` if it has one."""
    return name.removesuffix(bias), ".bias" if name.endswith(bias) else ""


def strip_prefixes(name: str) -> Iterator[str]:
    """Yield a name, then the name less each prefix that it has, one after the other."""
    yield name
    for prefix in PREFIXES:
        if name.startswith(prefix):
            yield from strip_prefixes(name.removeprefix(prefix))
            return
