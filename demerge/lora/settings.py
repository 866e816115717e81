"""What a LoRA's configuration says next to its keys: ranks, alphas, rsLoRA, DoRA.

It is read from the file's metadata, as diffusers and kohya write it, and from peft's
adapter_config.json in the same folder, which belongs to a file in peft's names whatever its own
name is. A setting that asks for other mathematics than a product of factors is refused by name. So
is an unknown setting, which may change the delta.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PrivateAttr, field_validator

from demerge.errors import InputError
from demerge.storage.checkpoint import Checkpoint
from demerge.storage.safetensors_header import parse_json, read_json
from demerge.storage.schema import Foreign, checked

CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"
ALPHAS = ("lora_alpha", "ss_network_alpha", "network_alpha", "alpha")  # the first one wins
BASE_CHANGING = ("pissa", "olora", "loftq", "corda", "lora_ga")  # of init_lora_weights
OTHER_PARTS = ("text_encoder", "transformer_2.")
USED = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "peft_type",
    "init_lora_weights", "bias", "alpha",
)  # fmt: skip
HARMLESS = (  # of training, or where the deltas go, which the keys say
    "auto_mapping", "arrow_config", "base_model_name_or_path", "corda_config", "eva_config",
    "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_version",
    "revision", "runtime_config", "target_modules", "task_type", "ensure_weight_tying",
    "qalora_group_size", "rank_dropout", "rank_dropout_scale", "module_dropout", "init_weights",
    "use_effective_conv2d", "decompose_both", "decompose_factor",
)  # fmt: skip
REFUSED = (
    "alora_invocation_tokens", "fan_in_fan_out", "layer_replication", "lora_bias",
    "modules_to_save", "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora",
)  # fmt: skip
KINDS = ("LORA", "LOHA", "LOKR")
LARGEST = 1e9
REGEX_CHARACTERS = frozenset("*+?[](){}|\\^$")
MERGE_FIRST = "merge the adapter into its base first"


Number = Annotated[float, Field(gt=-LARGEST, lt=LARGEST)]
Numbers = dict[str, Number | None]  # by module


class Settings(Foreign):
    """Ranks and alphas by module, with their defaults; None if the configuration does not say."""

    r: Number | None = None
    lora_alpha: Number | None = None
    rank_pattern: Numbers | None = None
    alpha_pattern: Numbers | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    _without_alpha: list[str] = PrivateAttr(default_factory=list)  # whose alpha is taken as r

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _check_modules(cls, table: Numbers | None) -> Numbers:
        modules = {key.replace("\\.", "."): number for key, number in (table or {}).items()}
        for module in modules:
            if set(module.removeprefix("^")) & REGEX_CHARACTERS:
                raise ValueError(f"must name modules, {module[:60]!r} is a regular expression")
        return modules

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Settings:
        """Read the configuration of a file, if it has one.

        Raises:
            InputError: if it is damaged, contradicts itself or asks for other mathematics.
        """
        where, values = str(checkpoint.place.path), _read_metadata(checkpoint)
        path = find_config(checkpoint)
        if path is not None:
            where, config = str(path), read_json(path)
            for name in USED:
                if name in values and name in config and values[name] != config[name]:
                    one, other = str(config[name])[:40], str(values[name])[:40]
                    what = f"{name} is {one} in {path}, {other} in its metadata"
                    fix = "move the file to a folder of its own"
                    raise InputError(f"{checkpoint.place.path}: {what}", fix=fix)
            values = config | values
            if "alpha" in config:  # of LoHa and LoKr
                values.setdefault("lora_alpha", config["alpha"])
        _check_kind(values, where)
        return checked(values, cls, where, fix="fetch the configuration again")

    def scale(self, module: str, rank: int | None, alpha: float | None) -> float:
        """Return s = alpha / r, or alpha / sqrt(r) with rsLoRA.

        Args:
            rank: of the factors; None for whole ones, whose s is 1 without a configuration.
            alpha: of the file's keys, which wins; without any alpha it is r.

        Raises:
            ValueError: if the configuration names another rank than the factors have.
        """
        named = _match(self.rank_pattern, module, self.r)
        if rank is None:
            if named is None:
                return 1.0
            rank = int(named)
        if named is not None and named != rank:
            raise ValueError(f"{module} has rank {rank}, the configuration says {named:g}")
        if alpha is None:
            alpha = _match(self.alpha_pattern, module, self.lora_alpha)
        if alpha is None:
            self._without_alpha.append(module)
            alpha = rank
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def notes(self, modules: int) -> list[str]:
        """Return what was assumed about a LoRA of so many modules."""
        count = len(self._without_alpha)
        if not count:
            return []
        share = "" if count == modules else f" for {count} of {modules} modules"
        scale = "sqrt(r), as rsLoRA has it" if self.use_rslora else "1"
        note = f"alpha not given{share}: taken as r, so the scale is {scale}"
        return [f"{note}; put its {CONFIG} next to it if it has one"]


def find_config(checkpoint: Checkpoint) -> Path | None:
    """Return the adapter_config.json in the folder of a file that peft wrote."""
    files = checkpoint.place.files
    config = files[0].parent / CONFIG if files else None
    if config is None or not config.is_file():
        return None
    has_peft_names = any(".lora_A." in name for name in checkpoint)
    has_peft_names |= any(name.startswith("base_model.model.") for name in checkpoint)
    return config if has_peft_names or files[0].name.startswith("adapter_model") else None


def _read_metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what the metadata of a file says: diffusers' table, else single values."""
    metadata = checkpoint.metadata
    if METADATA in metadata:
        try:
            table = parse_json(metadata[METADATA])
        except ValueError as error:
            what = f"{checkpoint.place.path}: {METADATA}: {error}"
            raise InputError(what, fix="fetch the file again") from error
        own = [key for key in table if not key.startswith(OTHER_PARTS)]
        return {key.rpartition(".")[2]: table[key] for key in own}
    known = {*USED, *REFUSED}
    values = {key: _parse(text) for key, text in metadata.items() if key in known}
    for key in ALPHAS:
        alpha = _parse(metadata.get(key, "None"))
        if alpha is not None:
            return values | {"lora_alpha": alpha}
    return values


def _parse(text: str) -> Any:
    """Return the value of a text in JSON, or in Python's words for it; else the text."""
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except (ValueError, RecursionError):
        return text


def _check_kind(values: Mapping[str, Any], where: str) -> None:
    kind = str(values.get("peft_type") or "LORA").upper()
    initial = str(values.get("init_lora_weights", "")).lower()
    bias = str(values.get("bias") or "none").lower()
    others = [name for name in REFUSED if values.get(name)]
    if kind not in KINDS:
        others.insert(0, kind[:40])
    if initial.startswith(BASE_CHANGING):
        others.append(f"init_lora_weights {initial[:40]}")
    if bias != "none":
        others.append(f"bias {bias[:40]}")
    if others:
        what = f"{where}: made with {', '.join(others)}, which demerge does not expand"
        raise InputError(what, fix=MERGE_FIRST)
    for name in sorted(set(values) - {*USED, *HARMLESS, *REFUSED}):
        if values[name]:
            setting = f"the setting {name[:60]} {str(values[name])[:40]}"
            what = f"{where}: {setting} is unknown, and may change what the adapter does"
            raise InputError(what, fix=f"{MERGE_FIRST}, or remove the setting if it is harmless")


def _match(table: Numbers | None, module: str, default: float | None) -> float | None:
    """Return the first number whose key is the module's name or its end behind a dot."""
    for key, value in (table or {}).items():
        is_suffix = not key.startswith("^") and module.endswith(f".{key}")
        if value is not None and (is_suffix or module == key.removeprefix("^")):
            return value
    return default
