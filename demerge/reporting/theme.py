"""What all plots share: colours for light and dark pages, and figures as reproducible bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from io import BytesIO
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib as mpl
import seaborn as sns
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from demerge.storage.atomic import commit_bytes

DPI = 144


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of ink, faint ink, lines and ground; colour maps for -1 to 1 and for 0 and up."""

    ink: str
    faint: str
    line: str
    ground: str
    maps: str
    greys: str


BLUE, ORANGE, GREEN = sns.color_palette("colorblind", 3)
GREY = "0.55"
# The colour of each kind of model in every plot and, in assets/report.css, on every page.
KINDS: Mapping[str, str] = {
    "real": "#7d8590",
    "base": "#8a6fd1",
    "joint": "#d9822b",
    "expert": "#c05a86",
    "ensemble": "#2a9d8f",
    "merge": "#3b82f6",
    "model": "#5b7083",
}
LIGHT = Theme("#1f2328", "#656d76", "#d8dee4", "white", "vlag", "Greys")
DARK = Theme("#e6edf3", "#9198a1", "#3d444d", "none", "icefire", "Greys_r")
Draw = Callable[[Theme], Figure]
P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Make a drawing function use the colours of its argument of type `Theme`, LIGHT without one.

    LIGHT is dark ink on white, in print and in dark notebooks; the page shows through DARK.
    """

    @wraps(draw)
    def drawn(*arguments: P.args, **keywords: P.kwargs) -> Figure:
        themes = [each for each in (*arguments, *keywords.values()) if isinstance(each, Theme)]
        with mpl.rc_context(_style(themes[0] if themes else LIGHT)):
            return draw(*arguments, **keywords)

    return drawn


def render(figure: Figure, kind: str = "svg") -> bytes:
    """Encode a figure as `svg` or `png`; equal figures give equal bytes."""
    stream, figure.dpi = BytesIO(), DPI
    layout = figure.get_layout_engine()
    if layout is not None:
        layout.execute(figure)
        figure.set_layout_engine("none")
    with mpl.rc_context({"svg.hashsalt": "demerge"}):
        canvas: Any = FigureCanvasSVG(figure) if kind == "svg" else FigureCanvasAgg(figure)
        if kind == "svg":
            canvas.print_svg(stream, metadata={"Date": None})
        else:
            canvas.print_png(stream, metadata={"Software": None})
    return stream.getvalue()


def save_figure(figure: Figure, folder: str | Path, name: str) -> list[Path]:
    """Write a figure into a folder as NAME.svg and NAME.png; return both."""
    kinds = ("svg", "png")
    return [commit_bytes(Path(folder) / f"{name}.{kind}", render(figure, kind)) for kind in kinds]


@dataclass(frozen=True, slots=True)
class Pictures:
    """A plot as `svg` for light pages, as `dark` svg for dark pages, and as `png`."""

    svg: bytes
    dark: bytes
    png: bytes

    def files(self, name: str) -> dict[str, bytes]:
        """Return the files of the plot by their names."""
        return {f"{name}.svg": self.svg, f"{name}.dark.svg": self.dark, f"{name}.png": self.png}


def pictures(draw: Draw) -> Pictures:
    """Draw a plot with both themes; `draw` is a `styled` function of a theme."""
    light, dark = draw(LIGHT), draw(DARK)
    svg, png = render(light), render(light, "png")
    dark.set_layout_engine("none")
    for axes, like in zip(dark.axes, light.axes, strict=True):  # one layout serves both
        axes.set_position(like.get_position(original=True))
    return Pictures(svg, render(dark), png)


def _style(theme: Theme) -> dict[Any, Any]:
    return {
        **sns.axes_style("ticks"),
        "axes.edgecolor": theme.line,
        "axes.facecolor": theme.ground,
        "axes.labelcolor": theme.faint,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.facecolor": theme.ground,
        "font.size": 10.0,
        "text.color": theme.ink,
        "xtick.color": theme.faint,
        "ytick.color": theme.ink,
        "xtick.labelcolor": theme.faint,
    }


def plain(name: str) -> str:
    """Return a name that matplotlib prints as it is, at most 40 characters long."""
    return (name if len(name) <= 40 else f"{name[:18]}…{name[-21:]}").replace("$", r"\$")
