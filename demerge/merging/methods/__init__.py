"""The merge methods, one paper per file, and what they share.

Add a method as a file of its own: a pure function with `@method`, see CONTRIBUTING.md; every module here is imported by
`import_all`, so there is no list to keep.

Shared: `selection` exact k-th magnitudes, `statistics` Gram matrices and norms, `stages` the linear or TIES merge at the
end, `spectral` singular values through Gram matrices.
"""

from __future__ import annotations

import importlib
import pkgutil


def import_all() -> None:
    """Import every module here, which registers the methods."""
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
