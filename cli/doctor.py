"""`demerge doctor`: whether this machine can run demerge; each line is ok, or says the one thing that mends it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

from demerge.cli.common import Json, cores, emit, show

GIB = 1 << 30
NEED_DISK = 2 * GIB
NEED_MEMORY = 2 * GIB
FAILED = 4
DRIVER = Path("/proc/driver/nvidia/version")
CUDA_WHEELS = "https://download.pytorch.org/whl/cu130"
PACKAGES = (
    "diffusers",
    "safetensors",
    "numpy",
    "pandas",
    "sklearn",
    "seaborn",
    "einops",
    "PIL",
    "typer",
)
EXTRAS = {"transformers": "sd", "datasets": "data", "nbclient": "notebook"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at; `fix` is empty where it is well."""

    name: str
    state: str
    fix: str = ""


def doctor(json: Json = False) -> None:
    """Look at Python, torch, devices, packages, disk, memory, threads. Exit code 4 where something must be mended."""
    findings = [finding for look in LOOKS for finding in look()]
    healthy = not any(finding.fix for finding in findings)
    emit({"ok": healthy, "findings": [asdict(finding) for finding in findings]}, None, json)
    if not json:
        for f in findings:
            show(
                f"{'FIX' if f.fix else 'ok':4}{f.name:14}{f.state}"
                + (f"\n    {f.fix}" if f.fix else "")
            )
    if not healthy:
        raise typer.Exit(FAILED)


def _python() -> Iterator[Finding]:
    fix = "" if sys.version_info >= (3, 11) else "install Python 3.11 or newer and make .venv again"
    yield Finding(
        "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}", fix
    )


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError, RuntimeError) as error:
        yield Finding(
            "torch", f"cannot be imported: {error}", "pip install --force-reinstall 'torch>=2.10'"
        )
        return
    old = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10)
    yield Finding("torch", torch.__version__, "pip install 'torch>=2.10'" if old else "")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    mps = ["Apple GPU"] if torch.backends.mps.is_available() else []
    fix = "" if names or mps else _unused_gpu(torch.version.cuda)
    yield Finding(
        "devices",
        "an NVIDIA GPU that torch cannot use" if fix else ", ".join([*names, *mps, "CPU"]),
        fix,
    )
    threads, most = torch.get_num_threads(), cores()
    over = threads > most
    yield Finding(
        "threads",
        f"torch uses {threads} of {most} cores",
        f"export OMP_NUM_THREADS={most}" if over else "",
    )


def _unused_gpu(cuda: str | None) -> str:
    """Return what lets torch use the NVIDIA GPU of this machine; empty if there is none."""
    if not DRIVER.exists():
        return ""
    if cuda is None:
        return f"this torch is built for the CPU: pip install --force-reinstall torch --index-url {CUDA_WHEELS}"
    return f"this torch needs a driver for CUDA {cuda}: update the driver, or install a torch of an older CUDA"


def _packages() -> Iterator[Finding]:
    for module in PACKAGES:
        yield _imported(module)


def _extras() -> Iterator[Finding]:
    from importlib.util import find_spec

    for module, extra in EXTRAS.items():
        if find_spec(module):
            yield _imported(module)
        else:
            yield Finding(
                module,
                f"not installed; the extra '{extra}' brings it: pip install 'demerge[{extra}]'",
            )


def _imported(module: str) -> Finding:
    from importlib import import_module
    from importlib.metadata import packages_distributions, version

    try:
        import_module(f"{module}.pipelines" if module == "diffusers" else module)
        found = packages_distributions().get(module, [module])[0]
        return Finding(module, version(found))
    except Exception as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        broken = "torchvision" in str(error)
        fix = (
            "pip uninstall torchvision (demerge does not need it)"
            if broken
            else f"pip install --force-reinstall {module}"
        )
        return Finding(module, f"cannot be imported: {reason[0]}", fix)


def _disk() -> Iterator[Finding]:
    free = shutil.disk_usage(Path.cwd()).free
    state = f"{free / GIB:.1f} GiB free in this folder"
    yield Finding(
        "disk",
        state,
        "" if free >= NEED_DISK else "free some space: a run of the demo's size takes 1 GiB",
    )
    writable = os.access(Path.cwd(), os.W_OK)
    yield Finding(
        "folder",
        "writable" if writable else "read-only",
        "" if writable else "change to a folder of yours",
    )


def _memory() -> Iterator[Finding]:
    from demerge.device import free_bytes

    free = free_bytes()
    if free is not None:
        fix = "" if free >= NEED_MEMORY else "close other programs, or lower the batch size"
        yield Finding("memory", f"{free / GIB:.1f} GiB available", fix)


LOOKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _python,
    _torch,
    _packages,
    _extras,
    _disk,
    _memory,
)
