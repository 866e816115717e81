"""Pickled weights to safetensors: the tensors alone, read by torch's restricted unpickler.

A .bin, .ckpt or .pth file is a pickle, which may run any code when it is opened. `torch.load(weights_only=True)` makes
tensors, numbers and plain containers and refuses all else; still it is a parser of hostile input, so a user has to ask for it.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demerge.errors import InputError, UsageError
from demerge.storage.atomic import check_disk_space, check_is_new, place_for
from demerge.storage.checkpoint import TORCH_NAMES, commit_tensors

if TYPE_CHECKING:
    from torch import Tensor

LISTED = 5


def convert(
    source: Path | str, out: Path | str, *, allow_pickle: bool = False, key: str | None = None
) -> dict[str, Tensor]:
    """Write the tensors of a pickled state dict as one safetensors file and return them.

    Args:
        allow_pickle: must be true: the caller trusts the file as far as torch's restricted unpickler does.
        key: which table of the file holds the weights, where there are several, for example state_dict.

    Raises:
        UsageError: where `allow_pickle` is false, or `out` does not end in .safetensors or exists.
        InputError: where the file holds more than tensors and plain values, or no table of tensors.
        ResourceError: where the disk does not suffice.
    """
    source = Path(source)
    out = place_for(out)
    if not allow_pickle:
        raise UsageError(
            f"{source} may be a pickle, which may run code when opened",
            fix="give --allow-pickle if you trust it",
        )
    if out.suffix != ".safetensors":
        raise UsageError(
            f"'{out}' does not end in .safetensors",
            fix=f"for example {out.with_suffix('.safetensors')}",
        )
    if not source.is_file():
        raise InputError(f"{source}: no such file", fix="name a .bin, .ckpt or .pth file")
    check_is_new(out)
    tensors = unpickled(source, key)
    check_disk_space(out, sum(tensor.numel() * tensor.itemsize for tensor in tensors.values()))
    commit_tensors(out, tensors, {"format": "pt"})
    return tensors


def unpickled(source: Path, key: str | None = None) -> dict[str, Tensor]:
    """Read the tensors of a pickled state dict, by torch's restricted unpickler; `key` as for `convert`.

    Raises:
        InputError: if the file holds more than tensors and plain values, or no table of tensors.
    """
    return _checked(source, _chosen(source, _unpickled(source), key))


def _unpickled(source: Path) -> Any:
    import torch

    _check_not_compressed(source)
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = (
            str(error).partition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
            or "not a pickle of tensors"
        )
        what = f"{source}: more than tensors in it, or damaged: {reason[:200]}"
        raise InputError(
            what, fix="ask its author for safetensors; demerge opens no other pickle"
        ) from error
    except Exception as error:  # the unpickler meets damaged bytes with errors of any kind
        what = f"{source}: cannot be read as a PyTorch file: {type(error).__name__}"
        raise InputError(what, fix="fetch the file again") from error


def _check_not_compressed(source: Path) -> None:
    """Refuse an archive that would take more memory than its size: PyTorch stores tensors as they are."""
    if not zipfile.is_zipfile(source):
        return
    try:
        with zipfile.ZipFile(source) as archive:
            grown = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"{source}: a damaged archive", fix="fetch the file again") from error
    if grown > source.stat().st_size:
        raise InputError(
            f"{source}: unpacks to {grown:,} bytes, more than it has", fix="do not use this file"
        )


def _chosen(source: Path, found: Any, key: str | None) -> Mapping[Any, Any]:
    if key is None and _is_table(found):
        return dict(found)
    inner = {k: v for k, v in found.items() if _is_table(v)} if isinstance(found, Mapping) else {}
    if key is not None and key in inner:
        return dict(inner[key])
    if key is None and len(inner) == 1:
        return dict(next(iter(inner.values())))
    named = ", ".join(str(k)[:60] for k in list(inner)[:LISTED])
    what = (
        f"no table of tensors '{key}'"
        if key
        else "several tables of tensors"
        if inner
        else "no table of tensors"
    )
    raise InputError(
        f"{source}: {what} in it{f': {named}' if named else ''}",
        fix="give --key, or name another file",
    )


def _is_table(value: Any) -> bool:
    import torch

    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(v, torch.Tensor) for v in value.values())
    )


def _checked(source: Path, table: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Return the tensors by name, each with memory of its own: safetensors holds no two that share it."""
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in table.items():
        _check_tensor(source, name, tensor)
        memory = tensor.untyped_storage().data_ptr()
        found[name] = tensor.detach().clone() if memory in taken else tensor.detach()
        taken.add(memory)
    return found


def _check_tensor(source: Path, name: Any, tensor: Tensor) -> None:
    import torch

    kind = str(tensor.dtype).removeprefix("torch.")
    if (
        not isinstance(name, str)
        or tensor.layout != torch.strided
        or kind not in TORCH_NAMES.values()
    ):
        what = f"{source}: {str(name)[:100]!r} is of {kind}, which safetensors does not hold"
        raise InputError(what, fix="ask its author for safetensors")
    if tensor.numel() * tensor.itemsize > source.stat().st_size:
        what = f"{source}: {name[:100]!r} claims {list(tensor.shape)}, more than the file holds"
        raise InputError(what, fix="do not use this file")
