"""What a LoRA's configuration says beside its keys: ranks, alphas, rsLoRA, DoRA.

It is read from peft's adapter_config.json beside an adapter_model.safetensors, else from the metadata that diffusers writes
into the file. What asks for other mathematics than a product of factors is refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demerge.errors import InputError
from demerge.headers import read_json
from demerge.places import Place
from demerge.weights import Checkpoint

CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"
OTHER_MATH = ("fan_in_fan_out", "lora_bias", "use_qalora", "use_bdlora", "layer_replication", "alora_invocation_tokens")
OTHER_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")  # initial values that change the base's weights as well
OTHER_PARTS = ("text_encoder", "transformer_2.")
LARGEST = 1e9
EXPRESSION = frozenset("*+?[](){}|\\^$")


@dataclass(frozen=True, slots=True)
class Settings:
    """Ranks and alphas by module, with their defaults; None where nothing is said."""

    rank: float | None
    alpha: float | None
    ranks: Mapping[str, float]
    alphas: Mapping[str, float]
    rslora: bool
    dora: bool

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Settings:
        """Read the configuration of a file, where it has one.

        Raises:
            InputError: where it is damaged or asks for other mathematics.
        """
        where = str(config_beside(checkpoint.place) or checkpoint.place.path)
        found = _configuration(checkpoint)
        _refuse_others(found, where)
        return cls(
            _number(found.get("r"), "r", where),
            _number(found.get("lora_alpha"), "lora_alpha", where),
            _table(found.get("rank_pattern"), "rank_pattern", where),
            _table(found.get("alpha_pattern"), "alpha_pattern", where),
            bool(found.get("use_rslora")),
            bool(found.get("use_dora")),
        )

    def scale(self, module: str, rank: int, alpha: float | None) -> float:
        """Return s = alpha / r, or alpha / sqrt(r) with rsLoRA; the `alpha` of the file's keys wins, without any it is r.

        Raises:
            ValueError: where the configuration names another rank than the factors have.
        """
        named = _matched(self.ranks, module, self.rank)
        if named is not None and named != rank:
            raise ValueError(f"{module} has rank {rank}, the configuration says {named:g}")
        settled = alpha if alpha is not None else _matched(self.alphas, module, self.alpha)
        return (rank if settled is None else settled) / (math.sqrt(rank) if self.rslora else rank)


def config_beside(place: Place) -> Path | None:
    """Return the adapter_config.json of a place, where peft wrote it."""
    config = place.files[0].parent / CONFIG if place.files else None
    return config if config and config.is_file() and place.files[0].name.startswith("adapter_model") else None


def _configuration(checkpoint: Checkpoint) -> dict[str, Any]:
    config = config_beside(checkpoint.place)
    if config is not None:
        return read_json(config)
    try:
        found = json.loads(checkpoint.metadata.get(METADATA, "{}"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{checkpoint.place.path}: {METADATA} is no JSON", fix="fetch the file again") from error
    if not isinstance(found, dict):
        raise InputError(f"{checkpoint.place.path}: {METADATA} is no table", fix="fetch the file again")
    return {key.rpartition(".")[2]: value for key, value in found.items() if not key.startswith(OTHER_PARTS)}


def _refuse_others(found: Mapping[str, Any], where: str) -> None:
    kind = str(found.get("peft_type") or "LORA").upper()
    initial = str(found.get("init_lora_weights", "")).lower()
    others = [
        *([kind[:40]] if kind != "LORA" else []),
        *(name for name in OTHER_MATH if found.get(name)),
        *([f"init_lora_weights {initial[:40]}"] if initial.startswith(OTHER_BASE) else []),
    ]
    if others:
        what = f"{where}: made with {', '.join(others)}, which demerge does not expand"
        raise InputError(what, fix="merge the adapter into its base first")


def _number(value: Any, name: str, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:
        raise InputError(f"{where}: {name} is {str(value)[:40]!r}, no number", fix="fetch the configuration again")
    return float(value)


def _table(value: Any, name: str, where: str) -> dict[str, float]:
    if value is not None and not isinstance(value, dict):
        raise InputError(f"{where}: {name} is no table", fix="fetch the configuration again")
    numbers = {key.replace("\\.", "."): _number(v, f"{name} of {key[:60]}", where) for key, v in (value or {}).items()}
    odd = next((key for key in numbers if set(key.removeprefix("^")) & EXPRESSION), None)
    if odd is not None:
        raise InputError(f"{where}: {name} has the regular expression {odd[:60]!r}", fix="write the modules' names out")
    return {key: number for key, number in numbers.items() if number is not None}


def _matched(table: Mapping[str, float], module: str, default: float | None) -> float | None:
    """Return the first entry whose key is the module's name, or the end of it behind a dot, as peft matches them."""
    for key, value in table.items():
        if module == key.removeprefix("^") or (not key.startswith("^") and module.endswith(f".{key}")):
            return value
    return default
