"""The merge methods, one paper per file; `shared` holds what several of them use.

A method is a file of its own with a pure function under `@method`, see CONTRIBUTING.md.
"""

from __future__ import annotations

import importlib
import pkgutil


def import_all() -> None:
    """Import every module here, which registers the methods."""
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
