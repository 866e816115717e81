from __future__ import annotations

import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from torch import Tensor

from demerge.errors import ComparisonError, UsageError
from demerge.evaluate.protocol import Scores
from demerge.evaluate.report import build_report
from demerge.evaluate.tables import escaped, lines
from demerge.pages import Exhibit, harmless

Make = Callable[..., list[Scores]]
HOSTILE = '=cmd|"/C calc"!A0 <script>alert(1)</script> $x_{1}$ | ` \n'
VOID = {"meta", "img", "br", "source", "link", "hr", "input"}


class Nesting(HTMLParser):
    """Every tag is closed in order; what is loaded, and what runs, is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "action", "data")]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def scores(make_scores: Make) -> list[Scores]:
    return [
        *make_scores("digits train", "real", [2.0], sampler="none", steps=0),
        *make_scores("base", "base", [8.0, 8.1, 8.2]),
        *make_scores("joint", "joint", [7.5, 7.6, 7.7], shift=-0.01),
        *make_scores(HOSTILE, "merge", [7.0, 7.1, 7.2], shift=-0.02),
        *make_scores("experts", "ensemble", [6.9, 7.0, 7.1], shift=0.02),
    ]


@pytest.fixture(scope="module")
def folder(scores: list[Scores], noise: Callable[..., Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "report"
    contact = {HOSTILE: noise(4), "base": noise(4, seed=1)}
    figures = [Exhibit("heat <map>", b"<svg xmlns='http://www.w3.org/2000/svg'/>")]
    page = build_report(
        out, scores, title="A <b> title", contact=contact, figures=figures, commands=["demerge <x>"], notes=["a & b"]
    )
    assert page == out / "index.html"
    return page.parent


def test_everything_is_written(folder: Path) -> None:
    plots = {f"{name}.{kind}" for name in ("ranking", "tradeoff", "losses") for kind in ("svg", "png")}
    assert {path.name for path in folder.iterdir()} == plots | {"index.html", "scores.csv", "scores.md", "contact.png"}
    for path in folder.glob("*.png"):
        assert np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("L")).std() > 0


def test_the_page_is_well_formed_escaped_and_loads_nothing(folder: Path) -> None:
    text = (folder / "index.html").read_text()
    parser = Nesting()
    parser.feed(text)
    assert parser.open == []
    assert parser.loads
    assert all(url.startswith("data:image/") for url in parser.loads)
    assert not parser.tags & {"script", "iframe", "link", "object", "form"}
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text
    for word in ("A &lt;b&gt; title", "demerge &lt;x&gt;", "a &amp; b", "heat &lt;map&gt;", "&lt;script&gt;"):
        assert word in text


def test_the_page_says_what_counts(folder: Path) -> None:
    text = (folder / "index.html").read_text()
    for word in ("Merging helped", "beats the base", "beats the joint control", "noise floor", "not FID", "against joint"):
        assert word in text


def test_the_table_is_ranked_and_holds_the_protocol(folder: Path) -> None:
    frame = pd.read_csv(folder / "scores.csv")
    assert frame["fd"][:4].is_monotonic_increasing
    assert list(frame["kind"]) == ["ensemble", "merge", "joint", "base", "real"]
    assert frame["model"][1].startswith("'=cmd")
    assert frame["fd_sd"][0] == pytest.approx(0.1)
    assert frame["vs_base_verdict"][1] == "better"
    assert frame["loss 0000-0500"][3] == pytest.approx(1.015)
    assert set(frame["distance"]) == {"FD[digits-cnn]"}
    assert {"features_sha256", "sampler", "steps", "reference_n", "num_images", "seeds"} <= set(frame.columns)


def test_markdown_keeps_its_columns(folder: Path) -> None:
    text = (folder / "scores.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 5
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    assert "<script>" not in text


def test_the_same_scores_make_the_same_bytes(scores: list[Scores], tmp_path: Path) -> None:
    first, second = (build_report(tmp_path / name, scores).parent for name in ("a", "b"))
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_one_model_one_seed_is_enough(make_scores: Make, tmp_path: Path) -> None:
    page = build_report(tmp_path / "report", make_scores("mine", "model", [3.0]))
    assert "nothing to say about merging" in page.read_text()


def test_unlike_protocols_and_no_models_are_refused(make_scores: Make, tmp_path: Path) -> None:
    with pytest.raises(ComparisonError, match="steps"):
        build_report(tmp_path, make_scores("a", "base", [8.0]) + make_scores("b", "merge", [7.0], steps=9))
    with pytest.raises(UsageError, match="no scores of a model"):
        build_report(tmp_path, make_scores("real", "real", [8.0]))
    assert not list(tmp_path.iterdir())


def test_lines_for_a_terminal_group_by_protocol(scores: list[Scores]) -> None:
    text = "\n".join(lines(scores))
    assert text.count("FD[digits-cnn] of 2,000 images") == 2
    assert text.index("experts") < text.index("joint") < text.index("base ")


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", " =1", "\t=1", "\r1"])
def test_formulas_are_disarmed(text: str) -> None:
    assert harmless(text) == f"'{text}"
    assert harmless("ties density=0.2") == "ties density=0.2"


def test_markdown_signs_are_escaped() -> None:
    assert escaped("a|b_c<d>\n`e`") == "a\\|b\\_c&lt;d&gt; \\`e\\`"
