from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from torch import Tensor

from demerge.errors import ComparisonError, UsageError
from demerge.evaluation.report.report import Report
from demerge.evaluation.report.tables import escape_markdown, table_lines
from demerge.evaluation.scores import Scores, tables_of
from demerge.reporting.html import STYLE, PageFigure, escape_formula
from demerge.reporting.theme import DARK, KINDS, render

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
        self.loads += [
            value or ""
            for name, value in attrs
            if name in ("src", "srcset", "href", "action", "data")
        ]
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
        *(
            replace(score, metrics={**score.metrics, "precision": 0.92})
            for score in make_scores("experts", "ensemble", [6.9, 7.0, 7.1], shift=0.02)
        ),
    ]


@pytest.fixture(scope="module")
def folder(
    scores: list[Scores], noise: Callable[..., Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("run") / "report"
    contact = {HOSTILE: noise(4), "base": noise(4, seed=1)}
    figures = [PageFigure("heat <map>", b"<svg xmlns='http://www.w3.org/2000/svg'/>")]
    report = Report.of(
        scores,
        title="A <b> title",
        contact=contact,
        figures=figures,
        commands=["demerge <x>"],
        notes=["a & b"],
    )
    page = report.save(out)
    assert page == out / "index.html"
    return page.parent


def test_everything_is_written(folder: Path) -> None:
    plots = {
        f"{name}.{kind}" for name in ("ranking", "tradeoff", "losses") for kind in ("svg", "png")
    }
    assert {path.name for path in folder.iterdir()} == plots | {
        "index.html",
        "scores.csv",
        "scores.md",
        "contact.png",
    }
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
    for word in (
        "A &lt;b&gt; title",
        "demerge &lt;x&gt;",
        "a &amp; b",
        "heat &lt;map&gt;",
        "&lt;script&gt;",
    ):
        assert word in text


def test_the_page_says_what_counts(folder: Path) -> None:
    text = (folder / "index.html").read_text()
    for word in (
        "merging helped",
        "beats the base",
        "beats the joint control",
        "noise floor",
        "not FID",
        "against joint",
    ):
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
    assert {"features_sha256", "sampler", "steps", "reference_n", "num_images", "seeds"} <= set(
        frame.columns
    )


def test_markdown_keeps_its_columns(folder: Path) -> None:
    text = (folder / "scores.md").read_text()
    ranking, losses = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    for table, count in ((ranking, 5), (losses, 2 * 4)):
        lines = table.splitlines()
        assert len(lines) == 2 + count
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "<script>" not in text


def test_losses_stand_in_one_table_with_paired_differences(
    scores: list[Scores], folder: Path
) -> None:
    report = Report.of(scores)
    document = report.document()["losses"]
    assert [line["range"] for line in document] == ["0000-0500"] * 4 + ["0500-1000"] * 4
    assert [line["kind"] for line in document[:4]] == ["ensemble", "merge", "joint", "base"]
    ensemble, merged, _, base = document[:4]
    assert list(merged["against"]) == ["base", "joint", "ensemble"]
    assert list(ensemble["against"]) == ["base", "joint"] and "base" not in base["against"]
    change = merged["against"]["ensemble"]
    assert change["value"] == pytest.approx(0.995 / 1.035 - 1)
    assert change["high"] < 0, "blocks that differ by a constant leave no doubt"
    assert merged["loss"]["low"] < 0.995 < merged["loss"]["high"]
    assert report.losses["against.base.value"][1] == merged["against"]["base"]["value"]
    (line,) = [line for line in str(report).splitlines() if line.startswith("0000-0500")]
    assert re.search(r"0000-0500  experts +1\.035 ± 0\.021 +\+1\.97 ± 0\.0\d %", line)
    assert "against ensemble" in (folder / "index.html").read_text()
    frame = pd.read_csv(folder / "scores.csv")
    assert frame["loss 0000-0500 low"][1] == pytest.approx(merged["loss"]["low"])


def test_losses_on_other_draws_are_not_paired(make_scores: Make) -> None:
    base, merged = make_scores("base", "base", [8.0]), make_scores("ties", "merge", [7.0])
    losses = merged[0].losses
    assert losses is not None
    report = Report.of([*base, replace(merged[0], losses=replace(losses, draws="64 others"))])
    assert all(not line["against"] for line in report.document()["losses"])
    assert "losses" not in report.plots


def test_the_same_scores_make_the_same_bytes(scores: list[Scores], tmp_path: Path) -> None:
    first, second = (Report.of(scores).save(tmp_path / name).parent for name in ("a", "b"))
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_one_model_one_seed_is_enough(make_scores: Make, tmp_path: Path) -> None:
    page = Report.of(make_scores("mine", "model", [3.0])).save(tmp_path / "report")
    assert "nothing to say about merging" in page.read_text()


def test_unlike_protocols_and_no_models_are_refused(make_scores: Make) -> None:
    with pytest.raises(ComparisonError, match="steps"):
        Report.of(make_scores("a", "base", [8.0]) + make_scores("b", "merge", [7.0], steps=9))
    with pytest.raises(UsageError, match="no scores of a model"):
        Report.of(make_scores("real", "real", [8.0]))


def test_lines_for_a_terminal_hold_the_caveats_and_the_verdict(scores: list[Scores]) -> None:
    text = "\n".join(table_lines(tables_of(scores)))
    assert text.count("FD[digits-cnn] of 2,000 images") == 1
    assert (
        text.index("experts")
        < text.index("  joint  ")
        < text.index("  base  ")
        < text.index("digits train")
        < text.index("note: Training seeds: 1")
    )
    assert text.startswith("Merging helped: ")


def test_models_of_another_protocol_are_named_and_not_ranked(
    make_scores: Make, tmp_path: Path
) -> None:
    three = [
        score
        for name, kind in (("base", "base"), ("ties", "merge"))
        for score in make_scores(name, kind, [8.0, 7.0, 7.5])
    ]
    report = Report.of(
        [*make_scores("pictures", "model", [1.0], sampler="unknown", steps=0), *three]
    )
    assert sorted(row.model for row in report.ranked.rows) == ["base", "ties"]
    page = report.save(tmp_path).read_text()
    for shown in (page, (tmp_path / "scores.md").read_text(), str(report)):
        assert "Not ranked, since the protocol differs: pictures" in shown
    assert list(report.table["model"]) == ["base", "ties"]


def test_caveats_stand_beside_the_table(folder: Path) -> None:
    page, text = (folder / "index.html").read_text(), (folder / "scores.md").read_text()
    assert page.index("</table>") < page.index("Training seeds: 1") < page.index("<figure>")
    assert text.index("| 1 |") < text.index("Training seeds: 1") < text.index("Protocol:")


def test_a_table_without_a_test_says_why(make_scores: Make, tmp_path: Path) -> None:
    for seeds, changes, why in (
        (2, {}, "2 common seeds of 3"),
        (3, {"num_images": 64}, "rank-deficient"),
    ):
        scores = [
            s
            for name, kind in (("base", "base"), ("ties", "merge"))
            for s in make_scores(name, kind, [8.0, 7.0, 7.5][:seeds], **changes)
        ]
        report = Report.of(scores)
        page = report.save(tmp_path).read_text()
        assert why in page and why in (tmp_path / "scores.md").read_text() and why in str(report)
        assert not {"better", "worse", "inconclusive"} & set(report.table["vs_base_verdict"])
        assert report.outcome == "none"
        assert "No verdict" in page


def test_a_report_in_python(scores: list[Scores], noise: Callable[..., Tensor]) -> None:
    report = Report.of(scores, contact={"base": noise(4)})
    assert repr(report).startswith("Report(4 models, better: experts")
    assert report.plots == ["ranking", "tradeoff", "losses"]
    labels = [text.get_text() for text in report.plot().axes[0].get_yticklabels()]
    assert labels[0] == "1  experts"
    assert len(report.contact_sheet().axes) == 4
    assert "beats the base" in report.verdict
    assert "fd" in report.summary.columns and "features_sha256" not in report.summary.columns
    assert "beats the base" in report._repr_html_()
    assert report.html.startswith("<!doctype html>")
    with pytest.raises(UsageError, match="no images"):
        Report.of(scores).contact_sheet()
    with pytest.raises(UsageError, match="no plot 'bars'"):
        report.plot("bars")


def test_plots_are_transparent_on_dark_pages_and_plain_numbers_stand_on_a_log_axis(
    make_scores: Make,
) -> None:
    scores = [
        *make_scores("real", "real", [0.5]),
        *make_scores("base", "base", [8.0]),
        *make_scores("ties", "merge", [7.0]),
    ]
    report = Report.of(scores)
    axes = report.plot().axes[0]
    assert axes.get_xscale() == "log"
    low, high = axes.get_xlim()
    shown = [
        axes.xaxis.get_major_formatter()(value)
        for value in axes.get_xticks()
        if low <= value <= high
    ]
    assert shown == ["0.5", "1", "2", "5"]
    dark = render(report.plot(theme=DARK))
    assert not [
        fill for fill in re.findall(rb"fill: (#\w+)", dark) if fill in (b"#ffffff", b"#fff")
    ]


def test_kinds_of_models_have_one_colour_in_plots_and_pages(scores: list[Scores]) -> None:
    page = dict(re.findall(r"\.(\w+) { --kind: (#\w+); }", STYLE.read_text()))
    assert page == dict(KINDS)
    report = Report.of(scores)
    losses = report.plot("losses").axes[0]
    shown = [label.get_color() for label in losses.get_yticklabels()]
    assert shown == [KINDS[row.kind] for row in report.ranked.rows if row.kind != "base"]


def test_a_plot_with_nothing_to_show_is_left_out(make_scores: Make) -> None:
    alone = Report.of(make_scores("mine", "model", [3.0]))
    assert alone.plots == []
    same = Report.of(make_scores("a", "base", [3.0]) + make_scores("b", "merge", [3.0]))
    assert "tradeoff" not in same.plots, "all models have one precision and one recall"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", " =1", "\t=1", "\r1"])
def test_formulas_are_disarmed(text: str) -> None:
    assert escape_formula(text) == f"'{text}"
    assert escape_formula("ties density=0.2") == "ties density=0.2"


def test_markdown_signs_are_escaped() -> None:
    assert escape_markdown("a|b_c<d>\n`e`") == "a\\|b\\_c&lt;d&gt; \\`e\\`"


def test_a_figure_holds_all_that_is_drawn(scores: list[Scores]) -> None:
    images = {
        name: torch.zeros(3, 1, 8, 8, dtype=torch.uint8) for name in ("base", "joint", "experts")
    }
    report = Report.of(scores, contact=images)
    for figure in (*map(report.plot, report.plots), report.contact_sheet()):
        FigureCanvasAgg(figure).draw()
        held, drawn = figure.bbox_inches, figure.get_tightbbox()
        assert drawn.x0 >= held.x0 - 0.01 and drawn.y0 >= held.y0 - 0.01, "or savefig cuts it off"
        assert drawn.x1 <= held.x1 + 0.01 and drawn.y1 <= held.y1 + 0.01
