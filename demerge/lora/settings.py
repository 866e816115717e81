"""What a LoRA's configuration says beside its keys: ranks, alphas, rsLoRA, DoRA.

It is read from the file's own metadata, as diffusers and kohya write it, and from peft's adapter_config.json in the same
folder, which is for a file in peft's names whatever the file is called. What asks for other mathematics than a product of
factors is refused by name, and so is a setting that is not known: it may change the delta.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demerge.errors import InputError
from demerge.lora.names import in_names_of_peft
from demerge.storage.checkpoint import Checkpoint
from demerge.storage.layout import CheckpointLocation
from demerge.storage.safetensors_header import parse_json, read_json

CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"
ALPHAS = (
    "lora_alpha",
    "ss_network_alpha",
    "network_alpha",
    "alpha",
)  # in metadata, the first that is there
OTHER_BASE = (
    "pissa",
    "olora",
    "loftq",
    "corda",
    "lora_ga",
)  # initial values that change the base's weights as well
OTHER_PARTS = ("text_encoder", "transformer_2.")
USED = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "peft_type",
    "init_lora_weights",
    "bias",
)
HARMLESS = (  # of training, or where the deltas go, which the keys say
    "auto_mapping", "arrow_config", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "peft_version", "revision", "runtime_config", "target_modules", "task_type",
    "ensure_weight_tying", "qalora_group_size",
)  # fmt: skip
REFUSED = (
    "alora_invocation_tokens", "fan_in_fan_out", "layer_replication", "lora_bias", "modules_to_save", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_qalora",
)  # fmt: skip
LARGEST = 1e9
EXPRESSION = frozenset("*+?[](){}|\\^$")


@dataclass(frozen=True, slots=True)
class Settings:
    """Ranks and alphas by module, with their defaults; None where nothing is said.

    Attributes:
        unsaid: modules whose alpha nothing says, so that it is taken as r; filled by `scale`.
    """

    rank: float | None
    alpha: float | None
    ranks: Mapping[str, float]
    alphas: Mapping[str, float]
    rslora: bool
    dora: bool
    unsaid: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Settings:
        """Read the configuration of a file, if it has one.

        Raises:
            InputError: if it is damaged, contradicts itself or asks for other mathematics.
        """
        where, found = str(checkpoint.place.path), _of_metadata(checkpoint)
        config = config_beside(checkpoint)
        if config is not None:
            where, beside = str(config), read_json(config)
            unlike = [
                name
                for name in USED
                if name in found and name in beside and found[name] != beside[name]
            ]
            if unlike:
                values = f"{unlike[0]} is {str(beside[unlike[0]])[:40]} in {config}, {str(found[unlike[0]])[:40]} in its metadata"
                raise InputError(
                    f"{checkpoint.place.path}: {values}", fix="move the file to a folder of its own"
                )
            found = beside | found
        _check_kind(found, where)
        return cls(
            _number(found.get("r"), "r", where),
            _number(found.get("lora_alpha"), "lora_alpha", where),
            _table(found.get("rank_pattern"), "rank_pattern", where),
            _table(found.get("alpha_pattern"), "alpha_pattern", where),
            _switch(found.get("use_rslora"), "use_rslora", where),
            _switch(found.get("use_dora"), "use_dora", where),
        )

    def scale(self, module: str, rank: int, alpha: float | None) -> float:
        """Return s = alpha / r, or alpha / sqrt(r) with rsLoRA; the `alpha` of the file's keys wins, without any it is r.

        Raises:
            ValueError: if the configuration names another rank than the factors have.
        """
        named = _matched(self.ranks, module, self.rank)
        if named is not None and named != rank:
            raise ValueError(f"{module} has rank {rank}, the configuration says {named:g}")
        settled = alpha if alpha is not None else _matched(self.alphas, module, self.alpha)
        if settled is None:
            self.unsaid.append(module)
        return (rank if settled is None else settled) / (math.sqrt(rank) if self.rslora else rank)

    def notes(self, modules: int) -> list[str]:
        """Return what had to be supposed about a LoRA of so many modules."""
        if not self.unsaid:
            return []
        share = (
            "" if len(self.unsaid) == modules else f" for {len(self.unsaid)} of {modules} modules"
        )
        scale = "sqrt(r), as rsLoRA has it" if self.rslora else "1"
        return [
            f"alpha not given{share}: taken as r, so the scale is {scale}; put its {CONFIG} next to it if it has one"
        ]


def config_beside(checkpoint: Checkpoint) -> Path | None:
    """Return the adapter_config.json in the folder of a file, if the file is one that peft wrote."""
    place: CheckpointLocation = checkpoint.place
    config = place.files[0].parent / CONFIG if place.files else None
    if config is None or not config.is_file():
        return None
    return (
        config
        if place.files[0].name.startswith("adapter_model") or in_names_of_peft(checkpoint)
        else None
    )


def _of_metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what the metadata of a file says: diffusers' table, else single values."""
    path = checkpoint.place.path
    if METADATA in checkpoint.metadata:
        try:
            table = parse_json(checkpoint.metadata[METADATA])
        except ValueError as error:
            raise InputError(f"{path}: {METADATA}: {error}", fix="fetch the file again") from error
        return {
            key.rpartition(".")[2]: value
            for key, value in table.items()
            if not key.startswith(OTHER_PARTS)
        }
    known = {*USED, *REFUSED}
    found = {key: _value(text) for key, text in checkpoint.metadata.items() if key in known}
    alpha = next(
        (
            value
            for key in ALPHAS
            if (value := _value(checkpoint.metadata.get(key, "None"))) is not None
        ),
        None,
    )
    return found if alpha is None else found | {"lora_alpha": alpha}


def _value(text: str) -> Any:
    """Return the value of a text in JSON, or in Python's words for it; a text that is neither stays."""
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except (ValueError, RecursionError):
        return text


def _check_kind(found: Mapping[str, Any], where: str) -> None:
    kind = str(found.get("peft_type") or "LORA").upper()
    initial = str(found.get("init_lora_weights", "")).lower()
    bias = str(found.get("bias") or "none").lower()
    unknown = set(found) - {*USED, *HARMLESS, *REFUSED}
    others = [
        *([kind[:40]] if kind != "LORA" else []),
        *(name for name in REFUSED if found.get(name)),
        *([f"init_lora_weights {initial[:40]}"] if initial.startswith(OTHER_BASE) else []),
        *([f"bias {bias[:40]}"] if bias != "none" else []),
    ]
    if others:
        what = f"{where}: made with {', '.join(others)}, which demerge does not expand"
        raise InputError(what, fix="merge the adapter into its base first")
    strange = next(
        (f"{name[:60]} {str(found[name])[:40]}" for name in sorted(unknown) if found[name]), None
    )
    if strange is not None:
        what = f"{where}: the setting {strange} is unknown, and may change what the adapter does"
        raise InputError(
            what,
            fix="merge the adapter into its base first, or take the setting out if it is harmless",
        )


def _number(value: Any, name: str, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:
        raise InputError(
            f"{where}: {name} is {str(value)[:40]!r}, not a number",
            fix="fetch the configuration again",
        )
    return float(value)


def _switch(value: Any, name: str, where: str) -> bool:
    if value is not None and not isinstance(value, bool):
        raise InputError(
            f"{where}: {name} is {str(value)[:40]!r}, not true or false",
            fix="fetch the configuration again",
        )
    return bool(value)


def _table(value: Any, name: str, where: str) -> dict[str, float]:
    if value is not None and not isinstance(value, dict):
        raise InputError(f"{where}: {name} is not a table", fix="fetch the configuration again")
    numbers = {
        key.replace("\\.", "."): _number(v, f"{name} of {key[:60]}", where)
        for key, v in (value or {}).items()
    }
    odd = next((key for key in numbers if set(key.removeprefix("^")) & EXPRESSION), None)
    if odd is not None:
        raise InputError(
            f"{where}: {name} has the regular expression {odd[:60]!r}",
            fix="write the modules' names out",
        )
    return {key: number for key, number in numbers.items() if number is not None}


def _matched(table: Mapping[str, float], module: str, default: float | None) -> float | None:
    """Return the first entry whose key is the module's name, or the end of it behind a dot, as peft matches them."""
    for key, value in table.items():
        if module == key.removeprefix("^") or (
            not key.startswith("^") and module.endswith(f".{key}")
        ):
            return value
    return default
