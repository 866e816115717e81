"""UNets of Stable Diffusion 1, 2 and XL, in the names of the first code (LDM) and of diffusers.

Input block 0 is the first convolution. Then each block has `layers` resnets, with their attentions,
and a downsampler. Output blocks have one resnet more, the last of which has the upsampler.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from demerge.storage.names.family import Family, Names

OUTSIDE: Mapping[str, str] = {
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
INSIDE: Mapping[str, str] = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
FROM_INSIDE = {name: original for original, name in INSIDE.items()}
ORIGINAL = re.compile(
    r"(?:input_blocks[._](\d{1,3})|(middle_block)|output_blocks[._](\d{1,3}))[._](\d)(?:[._](.+))?"
)
DIFFUSERS = re.compile(
    r"(down|up|mid)_blocks?(?:\.(\d+))?"
    r"\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)(?:\.(.*))?"
)
DOWNSAMPLER = re.compile(r"input_blocks[._](\d{1,3})[._]0[._]op(?:\..*)?")
RESNET = re.compile(r"down_blocks[._]0[._]resnets[._](\d{1,3})[._]")
ATTENTION = re.compile(r"up_blocks[._](\d{1,3})[._]attentions[._]")
WORDS = re.compile(
    "(?:down|up)_blocks|mid_block|transformer_blocks|to_(?:q|k|v|out)|proj_(?:in|out)"
    "|conv_(?:in|out|shortcut|norm_out)|time_emb_proj|(?:time|add|class)_embedding|linear_[12]"
    "|group_norm"
)


@dataclass(frozen=True, eq=False)
class UNet(Family):
    """The names of a UNet; unlike a table's they depend on its number of resnets.

    Attributes:
        layers: resnets of a block that goes down.
        with_attention: the blocks that go up and have attention.
    """

    layers: int = 2
    with_attention: frozenset[str] = frozenset()
    is_known: bool = True

    @classmethod
    def of(cls, names: Iterable[str]) -> UNet:
        """Return the names of a UNet, given those of its modules in either layout."""
        names = list(names)
        resnets = {match[1] for match in map(RESNET.match, names) if match}
        downsamplers = [int(m[1]) for m in map(DOWNSAMPLER.fullmatch, names) if m]
        layers = len(resnets) or min(downsamplers, default=3) - 1
        is_known = bool(resnets or downsamplers)
        is_known |= any(ORIGINAL.match(n) or n.startswith(("down_", "up_", "mid_")) for n in names)
        unet = cls("UNet", {}, layers=layers, has_kohya_original=False, is_known=is_known)
        here = {name for name in names if ATTENTION.match(name)}
        here |= {renamed for name in names for renamed in unet.to_diffusers(name)}
        ups = frozenset(match[1] for match in map(ATTENTION.match, here) if match)
        is_xl = any(name.startswith(("label_emb", "add_embedding")) for name in names)
        return cls(
            "UNet", {}, layers=layers, with_attention=ups, has_kohya_original=is_xl,
            is_known=is_known,
        )  # fmt: skip

    def to_diffusers(self, name: str) -> Names:
        """Return diffusers' name of an original module, () if it is not one."""
        dot = "." if "." in name else "_"
        outside = next((n for o, n in OUTSIDE.items() if o.replace(".", dot) == name), None)
        if outside is not None:
            return (outside.replace(".", dot),)
        match = ORIGINAL.fullmatch(name)
        if match is None or self.layers == 0:
            return ()
        inner, rest = int(match[4]), match[5] or ""
        inside = next((n for o, n in INSIDE.items() if o.replace(".", dot) == rest), rest)
        kind = "attentions" if inner else "resnets"
        if match[2]:
            where, kind = ["mid_block"], "attentions" if inner == 1 else "resnets"
            layer = inner // 2
        else:
            number = int(match[1]) - 1 if match[1] else int(match[3])
            block, layer = divmod(number, self.layers + 1)
            where = ["down_blocks" if match[1] else "up_blocks", str(block)]
            if match[1] and rest == "op":
                return (dot.join([*where, "downsamplers", "0", "conv"]),)
            if match[3] and rest == "conv":
                return (dot.join([*where, "upsamplers", "0", "conv"]),)
        return (dot.join(part for part in [*where, kind, str(layer), inside] if part),)

    def to_original(self, name: str) -> tuple[str, int]:
        """Return the original name of one of diffusers' modules, which is dotted."""
        outside = next((o for o, n in OUTSIDE.items() if n == name), None)
        match = DIFFUSERS.fullmatch(name)
        if outside is not None or match is None:
            return outside or name, 0
        side, block, kind, number = match[1], match[2] or "0", match[3], int(match[4])
        rest, start = match[5] or "", int(block) * (self.layers + 1)
        if side == "mid":
            inner = 2 * number if kind == "resnets" else 2 * number + 1
            stem = f"middle_block.{inner}"
        elif kind == "downsamplers":
            stem, rest = f"input_blocks.{1 + start + self.layers}.0", "op"
        elif kind == "upsamplers":
            stem = f"output_blocks.{start + self.layers}.{2 if block in self.with_attention else 1}"
        else:
            first, blocks = (1, "input_blocks") if side == "down" else (0, "output_blocks")
            stem = f"{blocks}.{first + start + number}.{0 if kind == 'resnets' else 1}"
        rest = FROM_INSIDE.get(rest, rest) if kind == "resnets" else rest
        return f"{stem}.{rest}" if rest else stem, 0

    def dotted(self, name: str) -> str:
        """Return a module's name with dots, given the flat one, in the layout that it is of."""
        parts = self.to_diffusers(name)
        kept = WORDS.sub(lambda match: match[0].replace("_", "\0"), parts[0] if parts else name)
        plain = kept.replace("_", ".").replace("\0", "_")
        return self.to_original(plain)[0] if parts else plain
