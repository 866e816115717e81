"""Where a denoiser lies on disk: a file, a component folder or a pipeline folder, sharded or not; never outside it.

Weights are named `STEM[.VARIANT].safetensors`, or by an index of shards `STEM[.VARIANT].safetensors.index[.VARIANT].json`.
Where a folder holds both, the shards are taken, as diffusers does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from demerge.errors import InputError
from demerge.storage.safetensors_header import read_json

COMPONENTS = ("unet", "transformer")
PART_NAME = re.compile(r"[A-Za-z0-9_]{1,64}")  # of a folder that model_index.json names
SECOND = "transformer_2"  # the denoiser of low noise, where a pipeline has two
STEMS = ("diffusion_pytorch_model", "model", "pytorch_lora_weights", "adapter_model")
WEIGHTS = re.compile(
    rf"({'|'.join(STEMS)})(?:\.([\w-]+))?\.safetensors(\.index(?:\.([\w-]+))?\.json)?"
)
SHARD = re.compile(r".*-\d{5}-of-\d{5}\.safetensors")
BESIDE = frozenset(
    {"fisher.safetensors", "gram.safetensors"}
)  # tensors that lie beside the weights and are none


@dataclass(frozen=True, slots=True)
class CheckpointLocation:
    """Where a denoiser lies.

    Attributes:
        path: as it was named.
        pipeline: the pipeline folder with model_index.json, or None.
        component: the folder with config.json and weights, or None for a single file.
        files: the safetensors files.
        index: which file each tensor lies in, for shards.
    """

    path: Path
    pipeline: Path | None
    component: Path | None
    files: tuple[Path, ...]
    index: Mapping[str, str] | None = None

    def beside(self, name: str) -> Path | None:
        """Return the file `name` in the pipeline folder, the component's or the one around it, where there is one."""
        folders = (
            self.pipeline,
            self.component,
            self.component.parent if self.component else self.path.parent,
        )
        return next((f / name for f in folders if f is not None and (f / name).is_file()), None)


def read_index(pipeline: Path) -> dict[str, Any]:
    """Read a model_index.json, whose keys may name folders.

    Raises:
        InputError: where it is damaged, or a key is no name of a component.
    """
    index = read_json(pipeline / "model_index.json")
    odd = next((key for key in index if not PART_NAME.fullmatch(key)), None)
    if odd is not None:
        raise InputError(
            f"{pipeline}/model_index.json: {odd[:80]!r} is not a name of a component",
            fix="fetch the pipeline again",
        )
    return index


def locate(
    path: Path, variant: str | None = None, component: str | None = None
) -> CheckpointLocation:
    """Find the denoiser's weights: a .safetensors file, a component folder or a pipeline folder, sharded or not.

    Args:
        variant: which weights to take of a folder that holds several, for example fp16; a folder that holds one kind, and
            a file, are taken as they are.
        component: which folder of a pipeline; the unet or transformer by default.

    Raises:
        InputError: where there is none, only pickles, several variants and none asked for, or a path that leads out of
            the folder.
    """
    if path.is_file():
        if path.name.endswith(".json"):
            return _sharded(path, None, path.parent, path)
        return CheckpointLocation(path, None, None, (path,))
    if not path.is_dir():
        raise InputError(
            f"{path}: no such file or folder",
            fix="name a pipeline folder, a component folder or a .safetensors file",
        )
    if not (path / "model_index.json").is_file():
        return component_place(path, variant)
    index = read_index(path)
    wanted = COMPONENTS if component is None else (component,)
    name = next((c for c in wanted if c in index and (path / c).is_dir()), None)
    if name is not None:
        inside(path, path / name)
        return _component(path, path, path / name, variant)
    if (path / "config.json").is_file() and component is None:
        return _component(path, path, path, variant)
    raise InputError(
        f"{path}: no folder {' or '.join(wanted)}",
        fix="use a pipeline with a UNet or a transformer",
    )


def component_place(folder: Path, variant: str | None = None) -> CheckpointLocation:
    """Find the weights in a component's folder, as `locate` does."""
    return _component(folder, None, folder, variant)


def _component(
    path: Path, pipeline: Path | None, folder: Path, variant: str | None
) -> CheckpointLocation:
    present = [p for p in sorted(folder.glob("*.safetensors*")) if p.name not in BESIDE]
    chosen = _main(folder, present, variant) or _only(present)
    if chosen is None:
        raise _no_weights(folder, [p for p in present if p.suffix == ".safetensors"])
    if chosen.suffix == ".json":
        return _sharded(path, pipeline, folder, inside(folder, chosen))
    return CheckpointLocation(path, pipeline, folder, (inside(folder, chosen),))


def _main(folder: Path, present: list[Path], variant: str | None) -> Path | None:
    """Return the file or index of the first stem in the variant asked for: the plain one, or the only one there is."""
    for stem in STEMS:
        kinds = dict(_named(present, stem))
        if len(kinds) == 1 or (variant or "") in kinds:
            return kinds.get(variant or "") or next(iter(kinds.values()))
        if kinds:
            there = ", ".join(kind or "plain" for kind in kinds)
            asked = (
                f"no variant '{variant}'" if variant else "several variants and none of them plain"
            )
            raise InputError(
                f"{folder}: {asked}, there is {there}",
                fix=f"give --variant {max(kinds)}, or name a file",
            )
    return None


def _named(present: list[Path], stem: str) -> Iterator[tuple[str, Path]]:
    """Yield (variant, path) of the weights of a stem, indexes last; "" is the plain kind."""
    for path in sorted(present, key=lambda p: (p.suffix == ".json", p.name)):
        match = WEIGHTS.fullmatch(path.name)
        if match and match[1] == stem and not SHARD.fullmatch(path.name):
            yield match[2] or match[4] or "", path


def plain_names(folder: Path, variant: str | None) -> dict[str, str | None]:
    """Return for the weights in a component folder the names that stock loaders look for if no variant is asked for.

    None stands for files of other variants than the one that is taken.

    Raises:
        InputError: if the folder holds several variants, none plain and none asked for.
    """
    present = sorted(folder.glob("*.safetensors*"))
    chosen = _main(folder, present, variant)
    match = WEIGHTS.fullmatch(chosen.name) if chosen else None
    if chosen is None or match is None:
        return {}
    plain = f"{match[1]}.safetensors" + (".index.json" if match[3] else "")
    shards = read_json(chosen).get("weight_map", {}).values() if match[3] else ()
    weights = [p.name for p in present if WEIGHTS.fullmatch(p.name) or SHARD.fullmatch(p.name)]
    return {
        name: name if name in shards else plain if name == chosen.name else None for name in weights
    }


def _only(present: list[Path]) -> Path | None:
    """Return the only index, or the only file, of whatever name."""
    indexes = [p for p in present if p.name.endswith(".index.json")]
    files = [p for p in present if p.suffix == ".safetensors"]
    return next((found[0] for found in (indexes, files) if len(found) == 1), None)


def _no_weights(folder: Path, files: list[Path]) -> InputError:
    if files:
        names = ", ".join(p.name for p in files[:5])
        return InputError(
            f"{folder}: several weight files, none the main one: {names}",
            fix="name one of the files",
        )
    pickles = [
        p for kind in ("*.bin", "*.ckpt", "*.pth", "*.pt") for p in sorted(folder.glob(kind))
    ]
    if pickles:
        what = f"only pickled weights, which may run code when opened: {pickles[0].name}"
        target = pickles[0].with_suffix(".safetensors").name
        return InputError(
            f"{folder}: {what}",
            fix=f"demerge convert {pickles[0]} {folder / target} --allow-pickle",
        )
    return InputError(
        f"{folder}: no .safetensors weights",
        fix="name the folder that holds diffusion_pytorch_model.safetensors",
    )


def _sharded(path: Path, pipeline: Path | None, folder: Path, index: Path) -> CheckpointLocation:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise InputError(
            f"{index}: weight_map is not a table of file names", fix="fetch the index again"
        )
    names = dict.fromkeys(weight_map.values())
    for name in names:
        parts = PurePosixPath(name).parts
        if (
            not parts
            or PurePosixPath(name).is_absolute()
            or ".." in parts
            or "\\" in name
            or "\0" in name
        ):
            raise InputError(
                f"{index}: weight_map leads out of its folder: {name[:200]!r}",
                fix="do not use this checkpoint",
            )
    return CheckpointLocation(
        path, pipeline, folder, tuple(inside(folder, folder / name) for name in names), weight_map
    )


def inside(root: Path, path: Path) -> Path:
    """Return `path` once its real place is known to lie inside `root`, or among the blobs of the Hub cache around `root`.

    Raises:
        InputError: where a link leads elsewhere.
    """
    try:
        home, real = root.resolve(), path.resolve()
    except (
        OSError,
        RuntimeError,
    ) as error:  # Python tells a circle of links by either, as its version is
        raise InputError(
            f"{path} is a link in a circle", fix="put the file itself into the folder"
        ) from error
    blobs = [
        p.parent / "blobs"
        for p in home.parents
        if p.name == "snapshots" and p.parent.name.startswith("models--")
    ]
    if not real.is_relative_to(home) and real.parent not in blobs:
        raise InputError(
            f"{path} leads out of {root}, to {real}", fix="put the file itself into the folder"
        )
    return path
