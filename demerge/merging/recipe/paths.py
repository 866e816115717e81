"""How a recipe writes paths: so that a folder of models can be moved, and nobody's home folder is named.

    ./x  ../x      relative to the folder of the recipe: the output's folder, or the one an output file lies in
    ~/x            in the home folder of whoever reads it, where the two have nothing but it or less in common
    /x             anywhere else
    owner/name     a model on the Hub, or the name of an embedded model

The same inputs and output, moved together, so give the same recipe and the same bytes.
"""

from __future__ import annotations

import os
from pathlib import Path

from demerge.storage.hub import EMBEDDED, HUB_ID


def stored(path: str, folder: Path) -> str:
    """Return how a recipe that lies in `folder` writes a path that was given as `path`."""
    if is_remote(path):
        return path
    there, here, home = Path(os.path.abspath(path)), Path(os.path.abspath(folder)), Path.home()
    common = Path(os.path.commonpath((there, here)))
    if common == Path(common.anchor) or common in home.parents:
        return (
            f"~/{there.relative_to(home).as_posix()}"
            if there.is_relative_to(home)
            else there.as_posix()
        )
    relative = Path(os.path.relpath(there, here)).as_posix()
    return relative if relative.startswith(".") else f"./{relative}"


def found(text: str, folder: Path) -> str:
    """Return the path that a recipe in `folder` writes as `text`."""
    path = Path(text).expanduser() if text.startswith("~") else folder / text
    return (
        text
        if not text.startswith((".", "~", "/")) and is_remote(text, folder)
        else os.path.normpath(path)
    )


def is_remote(text: str, folder: Path = Path()) -> bool:
    """Whether a text is the name of an embedded model or a Hub id, and no path in `folder`."""
    path = folder / text
    return text in EMBEDDED or (
        bool(HUB_ID.fullmatch(text)) and not path.exists() and not path.parent.exists()
    )
