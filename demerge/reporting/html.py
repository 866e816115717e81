"""HTML pages that load nothing: style and images lie inside, and a content security policy says so.

Every text that came from outside (names of models, captions, commands) passes `escape`;
`escape_formula` does the like for the cells of a spreadsheet.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ASSETS = Path(__file__).resolve().parents[1] / "assets"
STYLE = ASSETS / "report.css"
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none';"
    " form-action 'none'"
)
MEDIA = {"svg": "image/svg+xml", "png": "image/png"}


@dataclass(frozen=True, slots=True)
class PageFigure:
    """A picture with its caption; `dark` is shown on dark pages if there is one."""

    caption: str
    data: bytes
    kind: str = "svg"
    dark: bytes | None = None


def escape(value: object) -> str:
    """Return a value as text without HTML's own signs in force."""
    return html.escape(str(value), quote=True)


def render_page(title: str, subtitle: object, sections: Iterable[str], footer: str) -> str:
    """Return the page of some sections; empty ones are left out."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n"
        "</head>\n<body>\n<main>\n"
        f"<header><h1>{escape(title)}</h1>\n<p>{escape(subtitle)}</p></header>\n"
        + "\n".join(part for part in sections if part)
        + f"\n<footer>{escape(footer)}</footer>\n</main>\n</body>\n</html>\n"
    )


def is_page(path: str | Path) -> bool:
    """Whether a file is a page that demerge wrote, of this version or an older one."""
    with Path(path).open("rb") as stream:
        return POLICY.encode() in stream.read(1024)


def section(title: str, lead: str, body: str) -> str:
    """Return a section: its title, a sentence or two, and HTML."""
    introduction = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{introduction}{body}\n</section>"


def figure(exhibit: PageFigure) -> str:
    """Return a picture with its caption."""
    image = f'<img alt="{escape(exhibit.caption)}" src="{uri(exhibit.data, exhibit.kind)}">'
    if exhibit.dark is None:
        body = f'<div class="plate">{image}</div>'
    else:
        dark = uri(exhibit.dark, exhibit.kind)
        source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        body = f"<picture>{source}{image}</picture>"
    return f"<figure>{body}<figcaption>{escape(exhibit.caption)}</figcaption></figure>"


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], texts: int = 1) -> str:
    """Return a table of escaped values; the first `texts` columns are text, the others numbers."""
    kinds = ['class="name"' if i < texts else 'class="num"' for i in range(len(heads))]
    head = "".join(
        f"<th {kind}>{escape(name)}</th>" for kind, name in zip(kinds, heads, strict=True)
    )
    lines = (
        "".join(f"<td {kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True))
        for row in rows
    )
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def uri(data: bytes, kind: str) -> str:
    """Return a picture as the address of itself."""
    return f"data:{MEDIA[kind]};base64,{base64.b64encode(data).decode('ascii')}"


def printable(text: str) -> str:
    """Return a name without control characters and without bytes that are not UTF-8."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def escape_formula(text: str) -> str:
    """Return the text so that no spreadsheet takes it for a formula."""
    is_formula = text.lstrip().startswith(("=", "+", "-", "@"))
    return f"'{text}" if is_formula or text.startswith(("\t", "\r", "\n")) else text
