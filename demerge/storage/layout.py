"""Where a denoiser lies on disk: a file, a component folder or a pipeline folder; never outside it.

Weights are named `STEM[.VARIANT].safetensors`, or by an index of shards
`STEM[.VARIANT].safetensors.index[.VARIANT].json`. If a folder holds both, the shards are taken, as
diffusers does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from demerge.errors import InputError
from demerge.storage.safetensors_header import read_json, read_scheduler

COMPONENTS = ("unet", "transformer")
PART_NAME = re.compile(r"[A-Za-z0-9_]{1,64}")  # of a folder that model_index.json names
SECOND = "transformer_2"  # the denoiser of low noise, if a pipeline has two
STEMS = ("diffusion_pytorch_model", "model", "pytorch_lora_weights", "adapter_model")
WEIGHTS = re.compile(
    rf"({'|'.join(STEMS)})(?:\.([\w-]+))?\.safetensors(\.index(?:\.([\w-]+))?\.json)?"
)
SHARD = re.compile(r".*-\d{5}-of-\d{5}\.safetensors")
STATISTICS = frozenset({"fisher.safetensors", "gram.safetensors"})  # they are not weights
PROJECTED = "projected.safetensors"  # weights and the W of `finetune --projection paper`
PICKLES = ("*.bin", "*.ckpt", "*.pth", "*.pt")


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

    def find_file(self, name: str) -> Path | None:
        """Return the file `name` in the pipeline's folder, the component's or the one around it."""
        around = self.component.parent if self.component else self.path.parent
        for folder in (self.pipeline, self.component, around):
            if folder is not None and (folder / name).is_file():
                return folder / name
        return None


def read_index(pipeline: Path) -> dict[str, Any]:
    """Read a model_index.json, whose keys may name folders.

    Raises:
        InputError: if it is damaged, or a key cannot name a component.
    """
    index = read_json(pipeline / "model_index.json")
    for key in index:
        if not PART_NAME.fullmatch(key):
            what = f"{pipeline}/model_index.json: {key[:80]!r} is not a name of a component"
            raise InputError(what, fix="fetch the pipeline again")
    return index


def read_pipeline_scheduler(pipeline: Path) -> dict[str, Any]:
    """Return the config of a pipeline's scheduler, empty if there is none."""
    for folder in (pipeline / "scheduler", pipeline):
        if (folder / "scheduler_config.json").is_file():
            return read_scheduler(folder / "scheduler_config.json")
    return {}


def locate(
    path: Path,
    variant: str | None = None,
    component: str | None = None,
    *,
    projected: bool = False,
) -> CheckpointLocation:
    """Find the denoiser's weights: a .safetensors file, a component folder or a pipeline folder.

    Args:
        variant: which weights of a folder that holds several, for example fp16. If a folder holds
            one kind it is taken as it is, and so is a file.
        component: which folder of a pipeline; the unet or transformer by default.
        projected: whether the weights may come with those of `finetune --projection paper`.

    Raises:
        InputError: if there is none, only pickles, several variants and none wanted, a path that
            leads out of the folder, or a projection that is not expected.
    """
    if path.is_file():
        _check_projection(path, projected)
        if path.name.endswith(".json"):
            return _sharded(path, None, path.parent, path)
        return CheckpointLocation(path, None, None, (path,))
    if not path.is_dir():
        what = f"{path}: no such file or folder"
        fix = "name a pipeline folder, a component folder or a .safetensors file"
        raise InputError(what, fix=fix)
    if not (path / "model_index.json").is_file():
        return component_place(path, variant, projected=projected)
    index = read_index(path)
    wanted = COMPONENTS if component is None else (component,)
    for name in wanted:
        if name in index and (path / name).is_dir():
            inside(path, path / name)
            return component_place(path / name, variant, pipeline=path, projected=projected)
    if (path / "config.json").is_file() and component is None:
        return component_place(path, variant, pipeline=path, projected=projected)
    what = f"{path}: no folder {' or '.join(wanted)}"
    raise InputError(what, fix="use a pipeline with a UNet or a transformer")


def component_place(
    folder: Path,
    variant: str | None = None,
    *,
    pipeline: Path | None = None,
    projected: bool = False,
) -> CheckpointLocation:
    """Find the weights in the folder of a component, alone or of a pipeline; see `locate`."""
    path, whole = pipeline or folder, folder / PROJECTED
    if whole.is_file():
        _check_projection(whole, projected)
        return CheckpointLocation(path, pipeline, folder, (inside(folder, whole),))
    present = [p for p in sorted(folder.glob("*.safetensors*")) if p.name not in STATISTICS]
    chosen = _main_file(folder, present, variant) or _only_file(present)
    if chosen is None:
        raise _no_weights(folder, present)
    if chosen.suffix == ".json":
        return _sharded(path, pipeline, folder, inside(folder, chosen))
    return CheckpointLocation(path, pipeline, folder, (inside(folder, chosen),))


def _check_projection(file: Path, projected: bool) -> None:
    """Refuse weights that are not complete without the W of `--projection paper`."""
    if file.name == PROJECTED and not projected:
        what = f"{file} keeps the W of `--projection paper`, which no stock model and no merge has"
        fix = "train the expert with `demerge finetune --projection foldable`"
        raise InputError(what, fix=fix)


def _main_file(folder: Path, present: Sequence[Path], variant: str | None) -> Path | None:
    """Return the file or index of the first stem in the wanted variant: plain, or the only one."""
    for stem in STEMS:
        kinds = dict(_variants(present, stem))
        if len(kinds) == 1 or (variant or "") in kinds:
            return kinds.get(variant or "") or next(iter(kinds.values()))
        if kinds:
            names = ", ".join(kind or "plain" for kind in kinds)
            problem = "several variants, none of them plain"
            if variant:
                problem = f"no variant '{variant}'"
            fix = f"give --variant {max(kinds)}, or name a file"
            raise InputError(f"{folder}: {problem}; it has {names}", fix=fix)
    return None


def _variants(present: Sequence[Path], stem: str) -> Iterator[tuple[str, Path]]:
    """Yield (variant, path) of the weights of a stem, indexes last; "" is the plain kind."""
    for path in sorted(present, key=lambda p: (p.suffix == ".json", p.name)):
        match = WEIGHTS.fullmatch(path.name)
        if match and match[1] == stem and not SHARD.fullmatch(path.name):
            yield match[2] or match[4] or "", path


def plain_names(folder: Path, variant: str | None) -> dict[str, str | None]:
    """Return for each weights file of a component the name that stock loaders read by default.

    None stands for files of other variants than the one that is taken.

    Raises:
        InputError: if the folder holds several variants, none plain and none wanted.
    """
    present = sorted(folder.glob("*.safetensors*"))
    chosen = _main_file(folder, present, variant)
    match = WEIGHTS.fullmatch(chosen.name) if chosen else None
    if chosen is None or match is None:
        return {}
    names: dict[str, str | None] = {}
    shards = read_json(chosen).get("weight_map", {}).values() if match[3] else ()
    for path in present:
        if path == chosen:
            names[path.name] = f"{match[1]}.safetensors" + (".index.json" if match[3] else "")
        elif WEIGHTS.fullmatch(path.name) or SHARD.fullmatch(path.name):
            names[path.name] = path.name if path.name in shards else None
    return names


def _only_file(present: Sequence[Path]) -> Path | None:
    """Return the only index, or the only file, of whatever name."""
    indexes = [p for p in present if p.name.endswith(".index.json")]
    files = [p for p in present if p.suffix == ".safetensors"]
    if len(indexes) == 1:
        return indexes[0]
    return files[0] if len(files) == 1 else None


def _no_weights(folder: Path, present: Sequence[Path]) -> InputError:
    files = [p.name for p in present if p.suffix == ".safetensors"]
    if files:
        what = f"{folder}: several weight files, none the main one: {', '.join(files[:5])}"
        return InputError(what, fix="name one of the files")
    pickles = [path for kind in PICKLES for path in sorted(folder.glob(kind))]
    if pickles:
        target = folder / pickles[0].with_suffix(".safetensors").name
        what = f"{folder}: only pickled weights, which may run code when opened: {pickles[0].name}"
        return InputError(what, fix=f"demerge convert {pickles[0]} {target} --allow-pickle")
    fix = "name the folder that holds diffusion_pytorch_model.safetensors"
    return InputError(f"{folder}: no .safetensors weights", fix=fix)


def _sharded(path: Path, pipeline: Path | None, folder: Path, index: Path) -> CheckpointLocation:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        what = f"{index}: weight_map is not a table of file names"
        raise InputError(what, fix="fetch the index again")
    files = []
    for name in dict.fromkeys(weight_map.values()):
        parts = PurePosixPath(name).parts
        is_odd = not parts or ".." in parts or "\\" in name or "\0" in name
        if is_odd or PurePosixPath(name).is_absolute():
            what = f"{index}: weight_map leads out of its folder: {name[:200]!r}"
            raise InputError(what, fix="do not use this checkpoint")
        files.append(inside(folder, folder / name))
    return CheckpointLocation(path, pipeline, folder, tuple(files), weight_map)


def inside(root: Path, path: Path) -> Path:
    """Return `path` if its real place is inside `root`, or among the Hub cache's blobs around it.

    Raises:
        InputError: if a link leads elsewhere.
    """
    fix = "put the file itself into the folder"
    try:
        home, real = root.resolve(), path.resolve()
    except (OSError, RuntimeError) as error:  # a circle raises either, by Python's version
        raise InputError(f"{path} is a link in a circle", fix=fix) from error
    caches = [p.parent for p in home.parents if p.name == "snapshots"]
    blobs = [cache / "blobs" for cache in caches if cache.name.startswith("models--")]
    if not real.is_relative_to(home) and real.parent not in blobs:
        raise InputError(f"{path} leads out of {root}, to {real}", fix=fix)
    return path
