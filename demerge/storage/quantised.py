"""Quantised weights, known by names and dtypes: scaled fp8 is read, all else refused.

    scaled fp8    W = weight * scale_weight, or weight * weight_scale

The weight is in float8 and has one scale, or one for each output.

The keys next to such a weight (its scale, the scale of its input, `comfy_quant`) and the marker
`scaled_fp8` are not tensors of the model. float8 without a scale is a float like any other.
Everything else that stores codes is refused by its name: no arithmetic on codes means anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from demerge.errors import InputError
from demerge.storage.safetensors_header import Scale, Spec, parse_json

SCALES = ("scale_weight", "weight_scale")
BESIDE = ("scale_input", "input_scale", "comfy_quant")
MARKER = "scaled_fp8"
METADATA = "_quantization_metadata"
MOST = 1 << 16  # bytes of a layer's comfy_quant
FP8 = frozenset({"F8_E4M3", "F8_E5M2"})
FORMATS = frozenset({"float8_e4m3fn", "float8_e5m2"})
HARMLESS = frozenset({"format", "full_precision_matrix_mult"})
KINDS: Mapping[str, re.Pattern[str]] = {
    "bitsandbytes": re.compile(
        r"\.(?:nested_)?(?:absmax|quant_map)\Z|\.quant_state\b|\.SCB\Z|\.weight_format\Z"
    ),
    "GPTQ or AWQ": re.compile(r"\.(?:qweight|qzeros|g_idx)\Z"),
    "SVDQuant": re.compile(r"\.(?:wscales|wcscales|smooth_factor)\Z"),
    "compressed-tensors": re.compile(r"\.weight_(?:packed|zero_point|global_scale)\Z"),
    "optimum-quanto": re.compile(r"\.weight\._(?:data|scale|shift|packed|zeropoint)\Z"),
    "torchao": re.compile(r"(?:\.weight:|\._weight_)(?:qdata|scale|zero_point)\Z"),
    "HQQ": re.compile(r"\.W_q\Z"),
    "NVFP4": re.compile(r"\.weight_scale_2\Z"),
    "fp8 in blocks": re.compile(r"\.weight_scale_inv\Z"),
}
FIX = "name the float32, float16, bfloat16 or scaled fp8 file of this model"
Specs = dict[str, Spec]


def numbers(
    specs: Specs, metadata: Mapping[str, str], read: Callable[[Spec], bytes]
) -> tuple[Specs, Specs]:
    """Return the tensors that hold numbers, scaled fp8 with its scale; and the markers.

    Raises:
        InputError: naming file, tensor and kind, if a tensor holds codes that are not scaled fp8.
    """
    _check_kinds(specs)
    markers = {name: spec for name, spec in specs.items() if name.rpartition(".")[2] == MARKER}
    beside: dict[str, Specs] = {}  # weight -> last part of the key -> what lies next to it
    for name, spec in specs.items():
        stem, _, last = name.rpartition(".")
        if last in SCALES or last in BESIDE:
            beside.setdefault(f"{stem}.weight" if stem else "weight", {})[last] = spec
    if METADATA in metadata:
        _check_layers(metadata[METADATA], next(iter(specs.values())).file if specs else Path())
    has_layers = any("comfy_quant" in neighbours for neighbours in beside.values())
    is_declared = bool(markers) or METADATA in metadata or has_layers
    scaled = {}
    for weight, neighbours in beside.items():
        scale = _scale(weight, specs.get(weight), neighbours, read)
        if scale is not None:
            scaled[weight] = scale
        elif is_declared:
            last, spec = next(iter(neighbours.items()))
            kind = "scaled fp8 without a float8 weight and its scale"
            raise _refused([_key(weight, last)], spec, kind)
    left_out = {*markers, *(_key(weight, last) for weight in scaled for last in beside[weight])}
    held = {name: spec for name, spec in specs.items() if name not in left_out}
    return {n: replace(spec, scale=scaled.get(n)) for n, spec in held.items()}, markers


def _key(weight: str, last: str) -> str:
    return weight.removesuffix("weight") + last


def _scale(
    weight: str, spec: Spec | None, neighbours: Specs, read: Callable[[Spec], bytes]
) -> Scale | None:
    """Return the scale of a float8 weight; None if the weight is not in float8 or has none."""
    names = [name for name in SCALES if name in neighbours]
    if spec is None or spec.dtype not in FP8 or not names:
        return None
    scale = neighbours[names[0]]
    outputs = spec.shape[0] if len(spec.shape) > 1 else 1
    has_shape = scale.numel == 1 or (scale.shape[:1] == (outputs,) and scale.numel == outputs)
    if len(names) > 1 or not scale.is_float or scale.dtype in FP8 or not has_shape:
        what = f"{' and '.join(names)} {scale.dtype} {list(scale.shape)}"
        kind = f"fp8 whose {what} is not one scale or one for each output"
        raise _refused([weight], spec, kind)
    if "comfy_quant" in neighbours:
        quant = neighbours["comfy_quant"]
        _check_format(_parsed(read(quant)) if quant.numel < MOST else None, spec.file, weight)
    return Scale(names[0], scale, {name: neighbours[name] for name in BESIDE if name in neighbours})


def _check_kinds(specs: Specs) -> None:
    for kind, pattern in KINDS.items():
        if names := [name for name in specs if pattern.search(name)]:
            raise _refused(names, specs[names[0]], kind)
    weights = [name for name in specs if name.rpartition(".")[2] == "weight"]
    if names := [name for name in weights if not specs[name].is_float]:
        first = specs[names[0]]
        raise _refused(names, first, f"weights in {first.dtype}")


def _check_layers(text: str, file: Path) -> None:
    """Check that each layer of a table in the metadata has a known format."""
    table = _parsed(text) or {}
    layers = table.get("layers")
    for layer, entry in layers.items() if isinstance(layers, dict) else [("", None)]:
        _check_format(entry, file, layer)


def _check_format(entry: Any, file: Path, layer: str) -> None:
    if not isinstance(entry, dict) or entry.get("format") not in FORMATS or set(entry) - HARMLESS:
        stored = f"{layer[:200] or METADATA} is stored as {json.dumps(entry)[:120]}"
        raise InputError(f"{file}: {stored}, not as scaled fp8", fix=FIX)


def _parsed(text: str | bytes) -> dict[str, Any] | None:
    try:
        return parse_json(text)
    except ValueError:
        return None


def _refused(names: list[str], spec: Spec, kind: str) -> InputError:
    """Return the error of tensors that hold codes; `spec` is of the first."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    tensor = f"{names[0][:200]} {spec.dtype} {list(spec.shape)}{more}"
    what = f"{spec.file}: {tensor}: quantised ({kind}), codes are not numbers"
    return InputError(what, fix=FIX)
