"""Where a denoiser lies on disk: a file, a component folder or a pipeline folder, sharded or not; never outside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from demerge.errors import InputError
from demerge.headers import read_json

COMPONENTS = ("unet", "transformer")
STEMS = ("diffusion_pytorch_model", "model")
BESIDE = frozenset({"fisher.safetensors"})  # tensors that lie beside the weights and are none


@dataclass(frozen=True, slots=True)
class Place:
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
        folders = (self.pipeline, self.component, self.component.parent if self.component else self.path.parent)
        return next((f / name for f in folders if f is not None and (f / name).is_file()), None)


def locate(path: Path) -> Place:
    """Find the denoiser's weights: a .safetensors file, a component folder or a pipeline folder, sharded or not.

    Raises:
        InputError: where there is none, only pickles, or a path that leads out of the folder.
    """
    if path.is_file():
        if path.name.endswith(".index.json"):
            return _sharded(path, None, path.parent, path)
        return Place(path, None, None, (path,))
    if not path.is_dir():
        raise InputError(
            f"{path}: no such file or folder", fix="name a pipeline folder, a component folder or a .safetensors file"
        )
    if not (path / "model_index.json").is_file():
        return _component(path, None, path)
    index = read_json(path / "model_index.json")
    name = next((c for c in COMPONENTS if c in index and (path / c).is_dir()), None)
    if name is None and (path / "config.json").is_file():
        return _component(path, path, path)
    if name is None:
        wanted = " or ".join(COMPONENTS)
        raise InputError(f"{path}: no folder {wanted}", fix="use a pipeline with a UNet or a transformer")
    return _component(path, path, path / name)


def _component(path: Path, pipeline: Path | None, folder: Path) -> Place:
    present = [p for p in sorted(folder.glob("*.safetensors*")) if p.name not in BESIDE]
    wanted = [f"{stem}.safetensors{end}" for stem in STEMS for end in ("", ".index.json")]
    main = [p for name in wanted for p in present if p.name == name][:1]
    indexes = [p for p in present if p.name.endswith(".index.json")]
    files = [p for p in present if p.suffix == ".safetensors"]
    chosen = next((found[0] for found in (main, indexes, files) if len(found) == 1), None)
    if chosen is None:
        raise _no_weights(folder, files)
    if chosen.suffix == ".json":
        return _sharded(path, pipeline, folder, chosen)
    return Place(path, pipeline, folder, (inside(folder, chosen),))


def _no_weights(folder: Path, files: list[Path]) -> InputError:
    if files:
        names = ", ".join(p.name for p in files[:5])
        return InputError(f"{folder}: several weight files, none the main one: {names}", fix="name one of the files")
    if any(folder.glob("*.bin")) or any(folder.glob("*.ckpt")):
        what = "only pickled weights, which may run code when opened"
        return InputError(f"{folder}: {what}", fix="convert them to safetensors")
    return InputError(
        f"{folder}: no .safetensors weights", fix="name the folder that holds diffusion_pytorch_model.safetensors"
    )


def _sharded(path: Path, pipeline: Path | None, folder: Path, index: Path) -> Place:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise InputError(f"{index}: weight_map is not a table of file names", fix="fetch the index again")
    names = dict.fromkeys(weight_map.values())
    for name in names:
        parts = PurePosixPath(name).parts
        if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name or "\0" in name:
            raise InputError(f"{index}: weight_map leads out of its folder: {name[:200]!r}", fix="do not use this checkpoint")
    return Place(path, pipeline, folder, tuple(inside(folder, folder / name) for name in names), weight_map)


def inside(root: Path, path: Path) -> Path:
    """Return `path` once its real place is known to lie inside `root`, or in the Hub cache that `root` belongs to.

    Raises:
        InputError: where a link leads elsewhere.
    """
    home, real = root.resolve(), path.resolve()
    cache = next((p for p in home.parents if p.name.startswith("models--") and (p / "snapshots").is_dir()), home)
    if not real.is_relative_to(cache):
        raise InputError(f"{path} leads out of {root}, to {real}", fix="put the file itself into the folder")
    return path
