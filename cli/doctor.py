"""`demerge doctor`: whether this machine can run demerge, and one fix for each problem."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

from demerge.cli.common import Json, emit, show
from demerge.device import count_cores

GIB = 1 << 30
NEED_DISK = 2 * GIB
NEED_MEMORY = 2 * GIB
FAILED = 4
DRIVER = Path("/proc/driver/nvidia/version")
CUDA_WHEELS = "https://download.pytorch.org/whl/cu130"
PACKAGES = (
    "diffusers", "safetensors", "numpy", "pandas", "sklearn", "seaborn", "einops", "PIL", "typer",
)  # fmt: skip
EXTRAS = {"transformers": "sd", "datasets": "data", "peft": "lora", "nbclient": "notebook"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One check of the machine; `fix` is empty if it passes."""

    name: str
    state: str
    fix: str = ""


def doctor(json: Json = False) -> None:
    """Check Python, torch, devices, packages, disk and memory.

    The exit code is 4 if something must be fixed.
    """
    findings = [*_machine(), *_packages(), *_resources()]
    healthy = not any(finding.fix for finding in findings)
    emit({"ok": healthy, "findings": [asdict(finding) for finding in findings]}, None, json)
    for f in () if json else findings:
        show(f"{'FIX' if f.fix else 'ok':4}{f.name:14}{f.state}")
        if f.fix:
            show(f"    {f.fix}")
    if not healthy:
        raise typer.Exit(FAILED)


def _machine() -> Iterator[Finding]:
    """Check Python, torch, its devices and its threads."""
    state = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    is_old = sys.version_info < (3, 11)
    yield Finding("python", state, "install Python 3.11 or newer" if is_old else "")
    try:
        import torch
    except (ImportError, OSError, RuntimeError) as error:
        fix = "pip install --force-reinstall 'torch>=2.10'"
        yield Finding("torch", f"cannot be imported: {error}", fix)
        return
    major, minor = map(int, torch.__version__.split(".")[:2])
    fix = "pip install 'torch>=2.10'" if (major, minor) < (2, 10) else ""
    yield Finding("torch", torch.__version__, fix)
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("Apple GPU")
    fix = "" if names else _unused_gpu(torch.version.cuda)
    unused = "an NVIDIA GPU that torch cannot use"
    yield Finding("devices", unused if fix else ", ".join([*names, "CPU"]), fix)
    threads, most = torch.get_num_threads(), count_cores()
    fix = f"export OMP_NUM_THREADS={most}" if threads > most else ""
    yield Finding("threads", f"torch uses {threads} of {most} cores", fix)


def _unused_gpu(cuda: str | None) -> str:
    """Return the fix that lets torch use the NVIDIA GPU of this machine; empty without a GPU."""
    if not DRIVER.exists():
        return ""
    if cuda is None:
        install = f"pip install --force-reinstall torch --index-url {CUDA_WHEELS}"
        return f"this torch is built for the CPU: {install}"
    fix = "update the driver, or install a torch of an older CUDA"
    return f"this torch needs a driver for CUDA {cuda}: {fix}"


def _packages() -> Iterator[Finding]:
    from importlib.util import find_spec

    yield from map(_imported, PACKAGES)
    for module, extra in EXTRAS.items():
        if find_spec(module):
            yield _imported(module)
        else:
            install = f"pip install 'demerge[{extra}]'"
            yield Finding(module, f"not installed; the extra '{extra}' brings it: {install}")


def _imported(module: str) -> Finding:
    from importlib import import_module
    from importlib.metadata import packages_distributions, version

    try:
        import_module(f"{module}.pipelines" if module == "diffusers" else module)
        package = packages_distributions().get(module, [module])[0]
        return Finding(module, version(package))
    except Exception as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        fix = f"pip install --force-reinstall {module}"
        if "torchvision" in str(error):
            fix = "pip uninstall torchvision (demerge does not need it)"
        return Finding(module, f"cannot be imported: {reason[0]}", fix)


def _resources() -> Iterator[Finding]:
    """Check disk and memory."""
    from demerge.device import free_bytes

    free = shutil.disk_usage(Path.cwd()).free
    fix = "" if free >= NEED_DISK else "free some space: a run of the demo's size takes 1 GiB"
    yield Finding("disk", f"{free / GIB:.1f} GiB free in this folder", fix)
    if os.access(Path.cwd(), os.W_OK):
        yield Finding("folder", "writable")
    else:
        yield Finding("folder", "read-only", "change to a folder of yours")
    memory = free_bytes()
    if memory is not None:
        fix = "" if memory >= NEED_MEMORY else "close other programs, or lower the batch size"
        yield Finding("memory", f"{memory / GIB:.1f} GiB available", fix)
