"""Pickled weights to safetensors: the tensors alone, read by torch's restricted unpickler.

A .bin, .ckpt or .pth file is a pickle, which may run any code when it is opened.
`torch.load(weights_only=True)` makes tensors, numbers and plain containers and refuses all else. It
is still a parser of hostile input, so a user has to ask for it.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demerge.errors import InputError, UsageError, listed
from demerge.storage.atomic import check_disk_space, new_safetensors
from demerge.storage.checkpoint import TORCH_NAMES, commit_tensors

if TYPE_CHECKING:
    from torch import Tensor

NO_SAFETENSORS = "ask its author for safetensors"


def convert(
    source: Path | str, out: Path | str, *, allow_pickle: bool = False, key: str | None = None
) -> dict[str, Tensor]:
    """Write the tensors of a pickled state dict as one safetensors file and return them.

    Args:
        allow_pickle: must be true: the caller trusts the file as far as the restricted unpickler.
        key: which table of the file holds the weights if it has several, for example state_dict.

    Raises:
        UsageError: if `allow_pickle` is false, or `out` exists or does not end in .safetensors.
        InputError: if the file holds more than tensors and plain values, or no table of tensors.
        ResourceError: if the disk does not suffice.
    """
    source = Path(source)
    if not allow_pickle:
        what = f"{source} may be a pickle, which may run code when opened"
        raise UsageError(what, fix="give --allow-pickle if you trust it")
    out = new_safetensors(out)
    if not source.is_file():
        raise InputError(f"{source}: no such file", fix="name a .bin, .ckpt or .pth file")
    tensors = unpickled(source, key)
    check_disk_space(out, sum(tensor.numel() * tensor.itemsize for tensor in tensors.values()))
    commit_tensors(out, tensors, {"format": "pt"})
    return tensors


def unpickled(source: Path, key: str | None = None) -> dict[str, Tensor]:
    """Read the tensors of a pickled state dict, each with its own memory; `key` as for `convert`.

    Raises:
        InputError: if the file holds more than tensors and plain values, or no table of tensors.
    """
    tensors: dict[str, Tensor] = {}
    memories: set[int] = set()
    for name, tensor in _select_table(source, _unpickle(source), key).items():
        _check_tensor(source, name, tensor)
        memory = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.detach().clone() if memory in memories else tensor.detach()
        memories.add(memory)
    return tensors


def _unpickle(source: Path) -> Any:
    import torch

    _check_not_compressed(source)
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        reason = reason[:200] or "not a pickle of tensors"
        what = f"{source}: it holds more than tensors, or is damaged: {reason}"
        raise InputError(what, fix=f"{NO_SAFETENSORS}; demerge opens no other pickle") from error
    except Exception as error:  # the unpickler raises errors of any kind on damaged bytes
        what = f"{source}: cannot be read as a PyTorch file: {type(error).__name__}"
        raise InputError(what, fix="fetch the file again") from error


def _check_not_compressed(source: Path) -> None:
    """Check that an archive takes no more memory than its size: PyTorch does not compress."""
    if not zipfile.is_zipfile(source):
        return
    try:
        with zipfile.ZipFile(source) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"{source}: a damaged archive", fix="fetch the file again") from error
    if unpacked > source.stat().st_size:
        what = f"{source}: unpacks to {unpacked:,} bytes, more than it has"
        raise InputError(what, fix="do not use this file")


def _select_table(source: Path, content: Any, key: str | None) -> Mapping[Any, Any]:
    """Return the table of tensors: the whole, that under `key`, or the only one inside."""
    if key is None and _is_table(content):
        return dict(content)
    tables: dict[Any, Any] = {}
    if isinstance(content, Mapping):
        tables = {name: value for name, value in content.items() if _is_table(value)}
    if key is None and len(tables) == 1:
        key = next(iter(tables))
    if key in tables:
        return dict(tables[key])
    what = "several tables of tensors" if tables else "no table of tensors"
    if key is not None:
        what = f"no table of tensors '{key}'"
    names = f": {listed([str(name)[:60] for name in tables])}" if tables else ""
    raise InputError(f"{source}: it has {what}{names}", fix="give --key, or name another file")


def _is_table(value: Any) -> bool:
    import torch

    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(tensor, torch.Tensor) for tensor in value.values())


def _check_tensor(source: Path, name: Any, tensor: Tensor) -> None:
    import torch

    kind = str(tensor.dtype).removeprefix("torch.")
    is_strided = tensor.layout == torch.strided
    if not isinstance(name, str) or not is_strided or kind not in TORCH_NAMES.values():
        what = f"{source}: {str(name)[:100]!r} is of {kind}, which safetensors does not hold"
        raise InputError(what, fix=NO_SAFETENSORS)
    if tensor.numel() * tensor.itemsize > source.stat().st_size:
        what = f"{source}: {name[:100]!r} claims {list(tensor.shape)}, more than the file holds"
        raise InputError(what, fix="do not use this file")
