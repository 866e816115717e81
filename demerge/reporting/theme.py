"""What the reports' plots share: colours for light and dark pages, and figures as bytes, the same ones for the same input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from io import BytesIO
from typing import Any, ParamSpec

import matplotlib as mpl
import seaborn as sns
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of ink, faint ink and lines."""

    ink: str
    faint: str
    line: str
    maps: str


BLUE, ORANGE, GREEN = sns.color_palette("colorblind", 3)
GREY = "0.55"
KINDS: Mapping[
    str, str
] = {  # the colour of each kind of model in every plot and, in assets/report.css, on every page
    "real": "#7d8590",
    "base": "#8a6fd1",
    "joint": "#d9822b",
    "expert": "#c05a86",
    "ensemble": "#2a9d8f",
    "merge": "#3b82f6",
    "model": "#5b7083",
}
LIGHT = Theme("#1f2328", "#656d76", "#d8dee4", "vlag")
DARK = Theme("#e6edf3", "#9198a1", "#3d444d", "icefire")
Draw = Callable[[Theme], Figure]
P = ParamSpec("P")


def render(draw: Draw, theme: Theme, kind: str) -> bytes:
    """Draw with a theme and return the bytes of an `svg`, whose ground is the page behind it, or of a `png` on white."""
    ground = "none" if kind == "svg" else "white"
    stream = BytesIO()
    with mpl.rc_context(_style(theme, ground)):
        figure = draw(theme)
        FigureCanvasAgg(figure)
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(
            stream, format=kind, dpi=160, bbox_inches="tight", facecolor=ground, metadata=metadata
        )
    return stream.getvalue()


def draw_on_white(draw: Draw) -> Figure:
    """Draw for a notebook: dark ink on white."""
    with mpl.rc_context(_style(LIGHT, "white")):
        return draw(LIGHT)


def _style(theme: Theme, ground: str) -> dict[Any, Any]:
    return {
        **sns.axes_style("ticks"),
        "axes.edgecolor": theme.line,
        "axes.facecolor": ground,
        "axes.labelcolor": theme.faint,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.facecolor": ground,
        "font.size": 10.0,
        "svg.hashsalt": "demerge",
        "text.color": theme.ink,
        "xtick.color": theme.faint,
        "ytick.color": theme.ink,
        "xtick.labelcolor": theme.faint,
    }


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Make a drawing function use dark ink on white, whatever style is set: readable in print and in dark notebooks.

    Called with `theme=DARK`, where it takes a theme, it uses bright ink and leaves the ground to the page behind it.
    """

    @wraps(draw)
    def drawn(*arguments: P.args, **keywords: P.kwargs) -> Figure:
        inks = dict.fromkeys(
            ("axes.labelcolor", "text.color", "xtick.color", "ytick.color"), DARK.ink
        )
        grounds = dict.fromkeys(("axes.facecolor", "figure.facecolor"), "none")
        dark = {**inks, **grounds, "axes.edgecolor": DARK.faint}
        with sns.axes_style("ticks", dark if keywords.get("theme") is DARK else {}):
            return draw(*arguments, **keywords)

    return drawn


def plain(name: str) -> str:
    """Return a name that matplotlib prints as it is, at most 40 characters long."""
    return (name if len(name) <= 40 else f"{name[:18]}…{name[-21:]}").replace("$", r"\$")
