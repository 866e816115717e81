"""The blocks of a denoiser: short names for groups of tensors, in the order of the data's way.

    block     tensors of diffusers' UNets       tensors of its transformers (DiT, SD3, Flux, Wan)
    in        conv_in                           x_embedder, patch_embedding, pos_embed
    time      {time,add,class}_embedding        time_text_embed, condition_embedder, adaln_single
    text      encoder_hid_proj                  context_embedder, caption_projection
    down.N    down_blocks.N
    mid       mid_block
    up.N      up_blocks.N
    blocks.N                                    transformer_blocks.N, blocks.N
    single.N                                    single_transformer_blocks.N
    out       conv_norm_out, conv_out           norm_out, proj_out, proj_out_N, scale_shift_table

Single files in the layout of the original SD, SD3 and Flux code have the same blocks (`down.N` is
input_blocks.N). A tensor of another architecture has the block that its name begins with, up to the
first number (`layers.3`).

The community's names for the blocks of SD 1.5, SD 2 and SDXL, which have two layers per block, are
understood in any case:

    IN00..IN11      conv_in, then the layers and downsamplers of down_blocks; input_blocks.N
    M00, MID        mid_block
    OUT00..OUT11    the layers of up_blocks, each upsampler with the last one; output_blocks.N

A kind cuts across the blocks. It stands alone or behind a block (`attn`, `up.attn`, `down.1.conv`):

    attn      attention layers with their projections and norms: attn, attn1, ..., and attentions.N
              without its transformer_blocks
    ff        feed-forward layers of transformer blocks: ff, ff_context, ffn, mlp, proj_mlp
    conv      convolutions by name: conv, conv1, conv2, conv_in, conv_out, conv_shortcut
    norm      norms and modulations: norm, norm1, group_norm, conv_norm_out, ...
    resnet    residual blocks of UNets with all they hold: resnets.N
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache

PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # of single files
BLOCKS: tuple[tuple[str, str], ...] = (
    ("text", r"encoder_hid_proj|context_embedder|caption_projection|txt_in"
             r"|condition_embedder\.text_embedder"),
    ("time", r"(time|add|class)_embedding|time_text_embed|condition_embedder|adaln_single"
             r"|(time|label)_embed|label_emb|time_in|vector_in|guidance_in|[ty]_embedder"),
    ("in", r"conv_in|x_embedder|patch_embedding|pos_embed|img_in"),
    ("down", r"(?:down|input)_blocks\.(?P<down>\d+)"),
    ("mid", r"mid(?:dle)?_block"),
    ("up", r"(?:up|output)_blocks\.(?P<up>\d+)"),
    ("blocks", r"(?:(?:transformer|double|joint)_)?blocks\.(?P<blocks>\d+)"),
    ("single", r"single_(?:transformer_)?blocks\.(?P<single>\d+)"),
    ("out", r"conv_norm_out|conv_out|norm_out|proj_out(?:_\d+)?|final_layer|out|scale_shift_table"),
)  # fmt: skip
ORDER = ("in", "time", "text", "down", "mid", "up", "blocks", "single", "out")
KINDS = {
    "attn": r"\w*attn\d*|attentions\.\d+(?!\.transformer_blocks)",
    "ff": r"ff|ff_context|ffn|mlp|proj_mlp",
    "conv": r"conv\d*|conv_(?:in|out|shortcut)",
    "norm": r"(?:\w+_)?norm\w*",
    "resnet": r"resnets",
}
_BLOCK = re.compile(
    f"(?:{'|'.join(f'(?P<_{word}>{pattern})' for word, pattern in BLOCKS)})(?=\\.|$)"
)
_SINGLE = re.compile(r"(in|out)put_blocks\.(\d+)(?=\.|$)")
_LAYER = re.compile(
    r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)(?=\.|$)"
)
_KIND = {kind: re.compile(rf"(?:^|\.)(?:{pattern})(?=\.|$)") for kind, pattern in KINDS.items()}


@cache
def block_of(name: str) -> str:
    """Return the block of a tensor: `down.0`, `mid`, `time`; of an unknown name its beginning."""
    return _split(name)[0]


@cache
def with_block(name: str) -> str:
    """Return a tensor's name behind its block: `down.0.resnets.1.conv1.weight`."""
    block, rest = _split(name)
    return f"{block}.{rest}" if rest else block


@cache
def with_counted_block(name: str) -> str:
    """Return a tensor's name behind the community's block: `in04.norm1.weight`; else as it is."""
    bare = _without_prefix(name)
    if bare.startswith("conv_in."):
        return f"in00.{bare}"
    single, layer = _SINGLE.match(bare), _LAYER.match(bare)
    if single is not None:
        return f"{single[1]}{int(single[2]):02d}{bare[single.end() :]}"
    if layer is None:
        return bare
    is_down, index = layer[1] == "down", int(layer[4])
    place = 2 if layer[3] in ("downsamplers", "upsamplers") else index
    number = 3 * int(layer[2]) + place + is_down
    return f"{'in' if is_down else 'out'}{number:02d}{bare[layer.end() :]}"


def normalize_pattern(pattern: str) -> str:
    """Return a pattern with its block in our spelling: IN04 as in04, M00 as mid, Up.1 as up.1."""
    first, dot, rest = pattern.partition(".")
    small = first.lower()
    if re.fullmatch(r"(in|out)_?\d\d", small):
        return f"{small.replace('_', '')}{dot}{rest}"
    if small in ("m00", "mid00"):
        return f"mid{dot}{rest}"
    return f"{small}{dot}{rest}" if small in (*ORDER, *KINDS) else pattern


def is_kind(kind: str, name: str) -> bool:
    """Whether a tensor is of a kind, one of `KINDS`."""
    return _KIND[kind].search(_without_prefix(name)) is not None


def sort_blocks(names: Iterable[str]) -> list[str]:
    """Return the blocks of tensors, from input to output; unknown ones last, by name and number."""
    return sorted({block_of(name) for name in names}, key=_depth)


def group_by_block(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the tensors of each block, blocks from input to output, tensors in their order."""
    groups: dict[str, list[str]] = {block: [] for block in sort_blocks(names)}
    for name in names:
        groups[block_of(name)].append(name)
    return groups


def _without_prefix(name: str) -> str:
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    return name.removeprefix(prefix)


def _split(name: str) -> tuple[str, str]:
    """Return block and rest; the rest of a block without number is the whole name."""
    bare = _without_prefix(name)
    match = _BLOCK.match(bare)
    if match is None:
        unknown = re.match(r"(?:[^.\d][^.]*\.)*?\d+(?=\.)|[^.]+", bare)
        block = unknown[0] if unknown else bare
        return block, bare[len(block) + 1 :]
    word = next(word for word, _ in BLOCKS if match[f"_{word}"])
    if word in match.re.groupindex:
        return f"{word}.{int(match[word])}", bare[match.end() + 1 :]
    return word, bare[match.end() + 1 :] if word == "mid" else bare


def _depth(block: str) -> tuple[int, list[tuple[bool, int, str]]]:
    word = block.partition(".")[0]
    stage = ORDER.index(word) if word in ORDER else len(ORDER)
    parts = block.split(".")
    return stage, [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts]
