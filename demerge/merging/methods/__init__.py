"""The merge methods, one paper per file, and what they share.

A method is a file of its own with a pure function under `@method`, see CONTRIBUTING.md.

Shared: `selection` exact k-th magnitudes, `statistics` Gram matrices and norms, `stages` the linear
or TIES merge at the end, `spectral` singular values through Gram matrices.
"""

from __future__ import annotations

import importlib
import pkgutil


def import_all() -> None:
    """Import every module here, which registers the methods."""
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
