"""What the keys of a LoRA file mean: which module of the base, and which part of its delta.

Three families of names are read. Dots and underscores in a module's name do not matter:

    diffusers, peft   unet.down_blocks.0.attentions.0.to_q.lora_A.weight,
                      base_model.model.transformer_blocks.0.ff.lora_B.weight
    older diffusers   down_blocks.0.attentions.0.attn1.processor.to_q_lora.down.weight,
                      unet.conv_in.lora.up.weight
    kohya             lora_unet_down_blocks_0_attentions_0_to_q.lora_down.weight, .alpha; or by the
                      blocks of the original Stable Diffusion,
                      lora_unet_input_blocks_4_1_proj_in.lora_up.weight

A base may have diffusers' names or, as a single file, those of the original
(model.diffusion_model.input_blocks.4.1.proj_in); either is found by either.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from demerge.storage.checkpoint import canonical, modern

ROLES: Mapping[str, re.Pattern[str]] = {
    "down": re.compile(
        r"\.(?:lora_A(?:\.\w+)?|lora_down|lora\.down|lora_linear_layer\.down)\.weight\Z"
    ),
    "up": re.compile(r"\.(?:lora_B(?:\.\w+)?|lora_up|lora\.up|lora_linear_layer\.up)\.weight\Z"),
    "mid": re.compile(r"\.lora_mid\.weight\Z"),
    "alpha": re.compile(r"\.alpha\Z"),
    "magnitude": re.compile(r"\.lora_magnitude_vector(?:\.\w+)?(?:\.weight)?\Z"),
    "dora_scale": re.compile(r"\.dora_scale\Z"),
}
PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out|add_[qkv]_proj)_lora\.(?=(?:down|up)\.)")
FOREIGN: Mapping[str, re.Pattern[str]] = {
    "LoHa": re.compile(r"\bhada_[tw]"),
    "LoKr": re.compile(r"\blokr_[tw]"),
    "IA3": re.compile(r"\bia3_|\.on_input\Z"),
    "OFT": re.compile(r"\boft_|\bboft_"),
    "AdaLoRA": re.compile(r"\.lora_E\b"),
    "VeRA": re.compile(r"\bvera_"),
    "GLoRA": re.compile(r"\.[ab][12]\.weight\Z"),
    "an embedding LoRA": re.compile(r"\.lora_embedding_[AB]\b"),
    "a LoRA with trained biases": re.compile(r"\.lora_B(?:\.\w+)?\.bias\Z|\.diff_b\Z"),
    "a full difference": re.compile(r"\.diff\Z|\.set_weight\Z"),
}
TEXT = re.compile(
    r"(?:base_model\.model\.)?"
    r"(?:lora_(?:prior_)?te\d?_|te\d?\.|(?:text_encoders?|cond_stage_model)(?:_\d)?\.|clip_[lg]\.)"
)
DOWNSAMPLER = re.compile(r"(?:\A|\.)input_blocks\.(\d{1,3})\.0\.op\Z")
PREFIXES = (
    "base_model_model_", "model_diffusion_model_", "diffusion_model_", "lora_unet_",
    "lora_transformer_", "lora_", "unet_", "transformer_",
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
        has_factors = any("down" in parts or "up" in parts for parts in self.parts.values())
        return has_factors or bool(self.foreign) or any(map(_split_part, self.text))


def _split_part(name: str) -> tuple[str, str] | None:
    """Return the module and the role of a key, None if it is not a part of a delta."""

    def rename(match: re.Match[str]) -> str:
        return f".{'to_out.0' if match[1] == 'to_out' else match[1]}.lora."

    plain = PROCESSOR.sub(rename, name)
    for role, pattern in ROLES.items():
        if match := pattern.search(plain):
            return plain[: match.start()], role
    return None


class Modules:
    """The modules of a base that a LoRA may change, found by whatever name a file gives them."""

    def __init__(self, weights: Iterable[str]) -> None:
        """Take the names of the base's tensors that have two dimensions or more."""
        self._modules = {name: modern(name.removesuffix(".weight")) for name in weights}
        self._layers = _count_layers(self._modules.values())
        self._tensors: dict[str, set[str]] = {}
        for name, module in self._modules.items():
            plain = flat(canonical(name).removesuffix(".weight"))
            for called in (flat(module), plain, original(plain, self._layers)):
                self._tensors.setdefault(called, set()).add(name)

    def module(self, tensor: str) -> str:
        """Return the name under which diffusers holds the module of a tensor."""
        return self._modules[tensor]

    def find(self, named: str) -> str | None:
        """Return the base's tensor of a module as a file names it; None if it is not one."""
        for name in strip_prefixes(flat(modern(named))):
            for candidate in (name, original(name, self._layers)):
                tensors = self._tensors.get(candidate, set())
                if len(tensors) == 1:
                    return next(iter(tensors))
        return None


def _count_layers(modules: Iterable[str]) -> int:
    """Return how many resnets a block of a UNet has, by either family of names."""
    resnets, downsamplers = set(), []
    for module in modules:
        if module.startswith("down_blocks.0.resnets."):
            resnets.add(module.split(".")[3])
        elif match := DOWNSAMPLER.search(module):
            downsamplers.append(int(match[1]))
    return len(resnets) or min(downsamplers, default=1) - 1


def flat(name: str) -> str:
    """Return a name with underscores for its dots, as kohya writes it."""
    return name.replace(".", "_")


def strip_prefixes(name: str) -> Iterator[str]:
    """Yield a name, then the name less each prefix that it has, one after the other."""
    yield name
    for prefix in PREFIXES:
        if name.startswith(prefix):
            yield from strip_prefixes(name.removeprefix(prefix))
            return


OUTSIDE: Mapping[str, str] = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}
INSIDE: Mapping[str, str] = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}


def original(name: str, layers: int) -> str:
    """Return diffusers' name for a module of the original UNet with `layers` resnets per block.

    Input block 0 is the first convolution; then each block has `layers` resnets, with their
    attentions, and a downsampler. Output blocks have one resnet more, the last of which has the
    upsampler. Another name stays as it is.
    """
    if name in OUTSIDE:
        return OUTSIDE[name]
    match = re.fullmatch(
        r"(input_blocks_(\d{1,3})|middle_block|output_blocks_(\d{1,3}))_(\d)(?:_(.+))?", name
    )
    if match is None or layers == 0:
        return name
    inner, rest = int(match[4]), match[5] or ""
    if match[2]:
        block, layer = divmod(int(match[2]) - 1, layers + 1)
        where = f"down_blocks_{block}"
        if rest == "op":
            return f"{where}_downsamplers_0_conv"
    elif match[3]:
        block, layer = divmod(int(match[3]), layers + 1)
        where = f"up_blocks_{block}"
        if rest == "conv":
            return f"{where}_upsamplers_0_conv"
    else:
        where, (inner, layer) = "mid_block", ((1, 0) if inner == 1 else (0, inner // 2))
    return f"{where}_{'attentions' if inner else 'resnets'}_{layer}_{INSIDE.get(rest, rest)}"
